"""`fadeformer registry history`: show the decisions on the models of this project."""

from __future__ import annotations

import argparse
import json

from fadeformer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add action, model and output format."""
    parser.add_argument("action", choices=["history"], help="show the ledger: which version became champion, when, why")
    parser.add_argument("--model", metavar="NAME", help="registered model (default: all)")
    parser.add_argument("--json", action="store_true", help="print complete entries as JSON Lines")


def run(arguments: argparse.Namespace) -> str:
    """Print the ledger."""
    from pipelines.registry import ledger, tables

    entries = ledger.read_entries(arguments.model)
    if not entries:
        model = f" on {arguments.model}" if arguments.model else ""
        raise UserError(f"{ledger.ledger_path()}: no decision{model} yet; run `dvc repro`")
    if arguments.json:
        for entry in entries:
            print(json.dumps(entry, ensure_ascii=False))
    else:
        tables.print_ledger(entries)
    return f"{len(entries)} decisions in {ledger.ledger_path()}"
