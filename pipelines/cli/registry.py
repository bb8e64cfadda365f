"""`fadeformer registry history`: what was decided about the models of this project."""

from __future__ import annotations

import argparse
import json

from fadeformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of which model, and how to print it."""
    parser.add_argument("what", choices=["history"], help="the ledger: who became champion, when and why")
    parser.add_argument("--model", metavar="NAME", help="registered model (default: all)")
    parser.add_argument("--json", action="store_true", help="whole entries, one a line")


def run(arguments: argparse.Namespace) -> str:
    """Prints the ledger."""
    from pipelines.registry import ledger, tables

    entries = ledger.read_entries(arguments.model)
    if not entries:
        of = f" about {arguments.model}" if arguments.model else ""
        raise UserError(f"{ledger.ledger_path()}: nothing was decided{of} yet; `dvc repro` decides")
    if arguments.json:
        for entry in entries:
            print(json.dumps(entry, ensure_ascii=False))
    else:
        tables.print_ledger(entries)
    return f"{len(entries)} decisions in {ledger.ledger_path()}"
