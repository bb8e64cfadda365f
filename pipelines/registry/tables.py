"""Print promotion checks and the ledger as tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fadeformer.promotion.decision import FAILED, NOT_ASSESSED, PASSED, Decision
from fadeformer.reporting import promotion_page

STYLES = {PASSED: "green", FAILED: "bold red", NOT_ASSESSED: "yellow"}
PLAIN_WIDTH = 120  # columns if stdout is not a terminal


def print_decision(decision: Decision) -> None:
    """Print status and details of each promotion check."""
    table = _create_table("check", "status", "details")
    for check in decision.checks:
        table.add_row(check.requirement, Text(check.status, STYLES[check.status]), check.details)
    _print_table(table)


def print_ledger(entries: Iterable[Mapping[str, Any]]) -> None:
    """Print the ledger, one decision per row, oldest first."""
    table = _create_table("Model", *promotion_page.LEDGER_COLUMNS)
    for entry in entries:
        table.add_row(entry["model"], *promotion_page.ledger_row(entry).values())
    _print_table(table)


def _create_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("No.", "status", "Version", "Decision", "AUC"))
    return table


def _print_table(table: Table) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)
