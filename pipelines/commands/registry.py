"""`fadeformer registry`: what the registry of models tells."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The question."""
    parser.add_argument("question", choices=["history"], help="history: every decision about a model, oldest first")


def run(arguments: argparse.Namespace) -> str:
    """Answers it."""
    raise NotImplementedError
