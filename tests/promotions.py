"""Promote versions of one model in a separate process: `python -m tests.promotions MODEL VERSION...`.

A version becomes champion if its quality is higher than the champion's. Versions that already have a decision, of this
process before it was killed or of another one, are skipped.
"""

import sys

from fadeformer.promotion.decision import FAILED, PASSED, Check, Decision
from pipelines.registry import ledger, versions
from pipelines.registry.ledger import JudgedVersion
from pipelines.registry.versions import ModelVersion
from pipelines.tracking import store


def decision(quality: int, champion: int | None) -> Decision:
    """Decide by quality alone."""
    better = champion is None or quality > champion
    rule = Check("better", "better than the champion", PASSED if better else FAILED, f"{quality} against {champion}")
    return Decision((rule,), quality / 100, None if champion is None else champion / 100)


def quality_of(version: ModelVersion | str) -> int:
    """Return n * 7 modulo 20 for version n, so that quality does not increase with the number."""
    return int(version if isinstance(version, str) else version.number) * 7 % 20


def main() -> None:
    """Record a decision about each version of the arguments."""
    name, *numbers = sys.argv[1:]
    store.connect()
    for number in numbers:
        with ledger.open_ledger(name) as model_ledger:
            if any(entry["version"] == number for entry in model_ledger.entries):
                continue
            judged = JudgedVersion(number, versions.list_versions(name)[number].run_id, f"content of {number}")
            champion = model_ledger.champion_to_beat(judged)
            model_ledger.record_decision(
                judged, decision(quality_of(number), None if champion is None else quality_of(champion))
            )


if __name__ == "__main__":
    main()
