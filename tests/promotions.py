"""A process that promotes versions of one model one after the other: `python -m tests.promotions MODEL VERSION...`.

Each version has a quality, its number of an order that the arguments give, and becomes champion where it is better than
the champion. What was decided before, by this process until it was killed or by any other, is not decided again.
"""

import sys

from fadeformer.promotion.decision import FAILED, PASSED, Check, Decision
from pipelines.registry import ledger, versions
from pipelines.registry.ledger import JudgedVersion
from pipelines.registry.versions import ModelVersion
from pipelines.tracking import store


def decision(quality: int, champion: int | None) -> Decision:
    """By quality alone."""
    better = champion is None or quality > champion
    rule = Check("better", "better than the champion", PASSED if better else FAILED, f"{quality} against {champion}")
    return Decision((rule,), quality / 100, None if champion is None else champion / 100)


def quality_of(version: ModelVersion | str) -> int:
    """Of version n of 20 that of n * 7 modulo 20, so that the better ones come in no order."""
    return int(version if isinstance(version, str) else version.number) * 7 % 20


def main() -> None:
    """Decides about each version that the arguments name."""
    name, *numbers = sys.argv[1:]
    store.connect()
    for number in numbers:
        with ledger.open_ledger(name) as book:
            if any(entry["version"] == number for entry in book.entries):
                continue
            subject = JudgedVersion(number, versions.list_versions(name)[number].run_id, f"content of {number}")
            rival = book.champion_to_beat(subject)
            book.record_decision(subject, decision(quality_of(number), None if rival is None else quality_of(rival)))


if __name__ == "__main__":
    main()
