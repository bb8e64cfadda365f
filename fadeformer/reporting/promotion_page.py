"""HTML page of a promotion decision: the gate's checks with their results, and the ledger of earlier decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fadeformer.reporting import rendering
from fadeformer.reporting.tables import Table

MAX_ENTRIES = 200  # the newest entries of the ledger
LEDGER_COLUMNS = ("No.", "Time (UTC)", "Decision", "Version", "Candidate", "Champion", "AUC", "By", "Reason")
STATUS_LABELS = {"passed": "passed", "failed": "**failed**", "not assessed": "not assessed"}


@dataclass(frozen=True)
class CheckDetails(Table):
    """Results of a check per class, finding or subgroup, with the requirement as caption."""

    caption: str


def render_promotion_page(decision: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Render the promotion page.

    Args:
        decision: content of `reports/promotion.json`.
        entries: ledger entries of this model, oldest first.
    """
    is_promoted, version = decision["decision"] == "promoted", f"{decision['model']} version {decision['version']}"
    aliases = " and ".join(decision["aliases"])
    alias_note = f"It stays {aliases}." if aliases else "It gets no alias."
    head = ("Check", "Status", "Details")
    return rendering.load_template("promotion.html").render(
        title=f"Decision about {version}",
        model=decision["model"],
        good=is_promoted,
        status=f"{'Promoted' if is_promoted else 'Refused'}: {decision['counts']}.",
        outcome=f"{version} is champion." if is_promoted else alias_note,
        reason=decision["reason"],
        forced=decision["forced"],
        candidate=decision["candidate"],
        data_warnings=decision["data_warnings"],
        checks=Table(
            head,
            [(check["requirement"], STATUS_LABELS[check["status"]], check["details"]) for check in decision["checks"]],
        ),
        details=[
            CheckDetails(
                ("", "Status", "Details"),
                [(item["name"], STATUS_LABELS[item["status"]], item["details"]) for item in check["items"]],
                check["requirement"][0].upper() + check["requirement"][1:],
            )
            for check in decision["checks"]
            if check["items"]
        ],
        history=ledger_table(entries),
    )


def ledger_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return the ledger as a table, newest entry first."""
    return Table(
        tuple(LEDGER_COLUMNS), [tuple(ledger_row(entry).values()) for entry in reversed(entries[-MAX_ENTRIES:])]
    )


def ledger_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return a ledger entry as text cells by column."""
    cells = (
        str(entry["number"]), entry["time"].partition("+")[0].replace("T", " "), entry["action"], entry["version"],
        "" if entry.get("candidate") is None else str(entry["candidate"]),
        _champion_change(entry), "" if entry["auc"] is None else f"{entry['auc']:.4f}", entry["user"], entry["reason"],
    )  # fmt: skip
    return dict(zip(LEDGER_COLUMNS, cells, strict=True))


def _champion_change(entry: Mapping[str, Any]) -> str:
    """Format the champion version before and after a decision, or the unchanged one."""
    before, after = entry["from"] or "none", entry["to"] or "none"
    return str(after) if before == after else f"{before} → {after}"
