"""Append-only ledger of promotion decisions: which version became champion, when and why.

`mlruns/ledger.jsonl` is a write-ahead log. A decision is written to disk first, then applied to the registry, and then
stored as a tag of its version. A decision without its tag comes from a process that was killed: the next process
applies it. A tag that is not in the file was written on another machine: it is appended. A lock is held from reading
the champion until the registry is updated. Alias changes made outside this tool are recorded as `external change`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fadeformer.errors import UserError
from fadeformer.io import jsonl
from fadeformer.promotion.decision import Decision
from pipelines.registry import versions
from pipelines.registry.versions import CHALLENGER, CHAMPION, PREVIOUS, Aliases, ModelVersion
from pipelines.tracking import locations

LOCK_TIMEOUT = 3600  # seconds; another promotion may have to run inference with the champion
REMEDY = "move it aside: its decisions are also tags of the registry's versions"
KIND = "decision"  # of a record; records of another kind, such as of older versions, are ignored


def ledger_path() -> Path:
    """Return the path of the ledger."""
    return locations.project_folder() / "mlruns" / "ledger.jsonl"


@dataclass(frozen=True)
class JudgedVersion:
    """The model version that a decision is about.

    Attributes:
        version: Version number.
        run_id: MLflow run in which it was trained.
        content: Checksum of the package (`package.CONTENT_TAG`).
        data: Identity of the data it was trained and evaluated on.
    """

    version: str
    run_id: str | None
    content: str | None
    data: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """Decisions about one registered model, and its current aliases.

    Decisions about a model of the same name in another registry are ignored, except that a revoked model stays revoked.
    """

    def __init__(self, name: str) -> None:
        self.name, self._registry, self._versions = name, versions.get_registry_id(name), versions.list_versions(name)
        known = [entry["id"] for entry in read_entries(name, repair=True)]
        tags = (json.loads(text) for version in self._versions.values() for text in version.ledger_entries)
        tagged = [entry for entry in tags if entry["kind"] == KIND]
        for entry in sorted(tagged, key=lambda entry: entry["number"]):
            if entry["id"] not in known:
                jsonl.append_record(ledger_path(), entry)
        self._all_entries = read_entries(name)
        for entry in self.entries[-1:]:  # an entry is only written after all earlier ones were applied
            if entry not in tagged and entry["version"] in self._versions:
                versions.apply_ledger_entry(entry)
        self.aliases = versions.get_aliases(name)
        self._record_external_changes()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Decisions about the model in this registry, oldest first."""
        return [entry for entry in self._all_entries if entry["registry"] == self._registry]

    @property
    def champion(self) -> str | None:
        """Version number of the current champion."""
        return self.aliases.get(CHAMPION)

    @property
    def champions(self) -> list[str]:
        """Versions that have been champion and were not revoked, oldest first; the last one is the current champion."""
        return [
            number for number in (self.entries[-1]["champions"] if self.entries else []) if number in self._versions
        ]

    def champion_to_beat(self, judged: JudgedVersion) -> ModelVersion | None:
        """Return the current champion; None if there is none or if it is the judged version itself."""
        return None if self.champion in (None, judged.version) else self._versions[str(self.champion)]

    def best_champion(self, judged: JudgedVersion) -> ModelVersion | None:
        """Return the champion so far with the highest test AUC; None if it is the current one or the judged version."""
        aucs = {
            entry["version"]: entry["auc"]
            for entry in self.entries
            if entry["version"] in self.champions and entry["auc"] is not None
        }
        best = max(aucs, key=lambda number: aucs[number], default=None)
        return None if best in (None, self.champion, judged.version) else self._versions[str(best)]

    def candidate_number(self, judged: JudgedVersion) -> int:
        """Return the number of a model among all that were judged on the same test images, from 1.

        Models count by content and test images by content, so that other names of models, files or data sets reset
        nothing. A model that is judged again keeps its number.
        """
        contents = [
            entry["content"]
            for entry in read_entries(None)
            if entry["checks"] and entry["data"].get("test_content") == judged.data["test_content"]
        ]
        judged_before = list(dict.fromkeys(contents))
        return [*judged_before, judged.content].index(judged.content) + 1

    def revocation_reason(self, judged: JudgedVersion) -> str | None:
        """Return why a version with this content was revoked; None if it was not, or was promoted by force later."""
        for entry in reversed(self._all_entries):
            if entry["action"] == "forced" and entry["content"] == judged.content:
                return None
            if judged.content in [version["content"] for version in entry["revoked"]]:
                return str(entry["reason"])
        return None

    def record_decision(self, judged: JudgedVersion, decision: Decision, candidate: int = 1) -> dict[str, Any]:
        """Append a decision of the gate, or a forced one, to the ledger and apply it; return the entry.

        Args:
            judged: The model version.
            decision: About it.
            candidate: Number of the model among those that were judged on the same test images (`candidate_number`).
        """
        number, aliases, champions = judged.version, dict(self.aliases), self.champions
        action = "forced" if decision.force_reason is not None else "promoted" if decision.promoted else "refused"
        if number == self.champion:
            action = "kept" if action == "promoted" else action
        elif decision.promoted:
            champions = [*(version for version in champions if version != number), number]
            aliases = self._aliases_after(champions, removed=[number])
        elif self.revocation_reason(judged) is None:
            aliases[CHALLENGER] = number
        results = {"auc": decision.auc, "champion_auc": decision.champion_auc, "candidate": candidate}
        return self._append_entry(action, judged, aliases, champions, decision.reason, **results, **decision.to_dict())

    def roll_back(self, to: str | None, reason: str) -> dict[str, Any]:
        """Make version `to`, or by default the previous champion, champion again, and revoke all later champions.

        Raises:
            UserError: There is no earlier champion, or `to` is not one.
        """
        champions, current = self.champions, "the current one" if self.champion is None else f"version {self.champion}"
        earlier = champions if self.champion is None else champions[:-1]
        if not earlier:
            raise UserError(f"{self.name} has no champion before {current} to roll back to")
        target = to or earlier[-1]
        if target not in earlier:
            known = f"the champions before {current} were {', '.join(earlier)}"
            raise UserError(f"cannot roll back to version {target} of {self.name}; {known}")
        kept, revoked = champions[: champions.index(target) + 1], champions[champions.index(target) + 1 :]
        revoked_versions = [{"version": number, "content": self._last_judged(number).content} for number in revoked]
        aliases = self._aliases_after(kept, removed=[target, *revoked])
        return self._append_entry(
            "rolled back", self._last_judged(target), aliases, kept, reason, revoked=revoked_versions
        )

    def _aliases_after(self, champions: list[str], removed: list[str]) -> Aliases:
        """Return the aliases for a list of champions; the challenger stays unless its version is in `removed`."""
        aliases = dict(zip((CHAMPION, PREVIOUS), reversed(champions), strict=False))
        challenger = self.aliases.get(CHALLENGER)
        return aliases if challenger is None or challenger in removed else {**aliases, CHALLENGER: challenger}

    def _last_judged(self, number: str) -> JudgedVersion:
        """Return a version as recorded in the last decision about it."""
        for entry in reversed(self.entries):
            if entry["version"] == number and entry["content"] is not None:
                return JudgedVersion(number, entry["run_id"], entry["content"], entry["data"])
        return JudgedVersion(number, self._versions[number].run_id if number in self._versions else None, None)

    def _record_external_changes(self) -> None:
        before = self.entries[-1]["aliases"] if self.entries else {}
        changed = [name for name in sorted({*before, *self.aliases}) if before.get(name) != self.aliases.get(name)]
        if not changed:
            return
        champion, champions = self.champion, self.champions
        if champion is None:
            champions = []
        elif champion in champions:
            champions = champions[: champions.index(champion) + 1]
        else:
            champions = [*champions, champion]
        changes = ", ".join(f"{name} from {before.get(name)} to {self.aliases.get(name)}" for name in changed)
        judged = self._last_judged(str(self.aliases.get(changed[0]) or before.get(changed[0])))
        reason, origin = f"changed in the registry: {changes}", {"from": before.get(CHAMPION)}
        self._append_entry("external change", judged, self.aliases, champions, reason, **origin)

    def _append_entry(
        self, action: str, judged: JudgedVersion, aliases: Aliases, champions: list[str], reason: str, **more: Any
    ) -> dict[str, Any]:
        entry = {
            "kind": KIND, "id": uuid.uuid4().hex, "number": len(self.entries) + 1, "model": self.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "user": psutil.Process().username(),
            "registry": self._registry, "action": action, "from": self.champion, "to": aliases.get(CHAMPION),
            "aliases": dict(aliases), "champions": champions, "reason": reason, "revoked": [], "checks": [],
            "auc": None, "champion_auc": None, "candidate": None, **asdict(judged), **more,
        }  # fmt: skip
        jsonl.append_record(ledger_path(), entry)
        versions.apply_ledger_entry(entry)
        self._all_entries.append(entry)
        self.aliases = dict(aliases)
        return entry


@contextmanager
def open_ledger(name: str) -> Iterator[Ledger]:
    """Lock the ledger and yield that of a registered model; no other process can record decisions until it is released.

    Raises:
        UserError: The lock was not released in time, or the ledger is damaged.
        MLflowUnreachable: MLflow cannot be reached.
    """
    try:
        with FileLock(ledger_path().with_name(".ledger.lock"), timeout=LOCK_TIMEOUT):
            yield Ledger(name)
    except Timeout as error:
        message = (
            f"another promotion has held the lock for {LOCK_TIMEOUT} s; check why it does not finish, then run again"
        )
        raise UserError(f"{ledger_path()}: {message}") from error


def read_entries(name: str | None, *, repair: bool = False) -> list[dict[str, Any]]:
    """Return the decisions about one registered model, or all, oldest first; `repair` requires the lock."""
    records = jsonl.read_records(ledger_path(), REMEDY, truncate_partial=repair)
    decisions = (record for record in records if record["kind"] == KIND and name in (None, record["model"]))
    return sorted(decisions, key=lambda entry: (entry["time"], entry["number"]))
