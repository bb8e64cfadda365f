"""The page of a decision of the gate: its rules with their verdicts and figures, and what was decided before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fadeformer.reporting import rendering
from fadeformer.reporting.tables import Table

MAX_ENTRIES = 200  # decisions of the ledger, the newest
LEDGER_COLUMNS = ("No.", "Time (UTC)", "Decision", "Version", "Champion", "AUC", "By", "Reason")  # of the ledger
OUTCOME_LABELS = {"passed": "passed", "failed": "**failed**", "not evaluated": "not evaluated"}


@dataclass(frozen=True)
class RuleDetails(Table):
    """What a rule found of each class, finding or subgroup, and the rule in words."""

    caption: str


def render_promotion_page(told: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Writes the page.

    Args:
        told: what `reports/promotion.json` holds.
        entries: of the ledger about this model, oldest first.
    """
    promoted, version = told["decision"] == "promoted", f"{told['model']} version {told['version']}"
    held = " and ".join(told["aliases"])
    stays = f"It stays {held}." if held else "It gets no alias."
    head = ("Check", "Status", "Details")
    return rendering.load_template("verdict.html").render(
        title=f"Decision about {version}",
        model=told["model"],
        good=promoted,
        verdict="Promoted." if promoted else "Refused.",
        outcome=f"{version} is champion." if promoted else stays,
        forced=told["reason"] if told["forced"] else None,
        rules=Table(head, [(rule["requirement"], OUTCOME_LABELS[rule["status"]], rule["details"]) for rule in told["checks"]]),
        parts=[
            RuleDetails(
                ("", "Status", "Details"),
                [(part["name"], OUTCOME_LABELS[part["status"]], part["details"]) for part in rule["items"]],
                rule["requirement"][0].upper() + rule["requirement"][1:],
            )
            for rule in told["checks"]
            if rule["items"]
        ],
        history=ledger_table(entries),
    )


def ledger_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The ledger, the newest first."""
    return Table(
        tuple(LEDGER_COLUMNS), [tuple(ledger_row(entry).values()) for entry in reversed(entries[-MAX_ENTRIES:])]
    )


def ledger_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """An entry of the ledger as text, by column."""
    cells = (
        str(entry["number"]), entry["time"].partition("+")[0].replace("T", " "), entry["action"], entry["version"],
        _champion_change(entry), "" if entry["auc"] is None else f"{entry['auc']:.4f}", entry["user"], entry["reason"],
    )  # fmt: skip
    return dict(zip(LEDGER_COLUMNS, cells, strict=True))


def _champion_change(entry: Mapping[str, Any]) -> str:
    """The champion before and after a decision, or the one that stayed."""
    before, after = entry["from"] or "none", entry["to"] or "none"
    return str(after) if before == after else f"{before} → {after}"
