"""Ledger of promotions: who became champion, when and why. The registry follows the ledger.

`mlruns/ledger.jsonl` only grows. A decision is on disk before an alias moves, and becomes a tag of its version once the
registry has followed. A decision without its tag, left by a process that was killed, is carried out by the next one; a
tag that is not in the file was made on another machine. A process holds a lock from reading the champion until the
registry has followed. Aliases changed elsewhere are recorded as `changed outside`.
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

LOCK_TIMEOUT = 3600  # seconds that another promotion may take, with predictions for the champion
REMEDY = "move it aside: its decisions are still tags of the registry's versions"


def ledger_path() -> Path:
    """Where the ledger is kept."""
    return locations.project_folder() / "mlruns" / "ledger.jsonl"


@dataclass(frozen=True)
class JudgedVersion:
    """What a decision is about: a version, its content, and what it was trained and judged on."""

    version: str
    run_id: str | None
    content: str | None
    data: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """Decisions about one registered model, and its aliases now.

    Of another registry with a model of the same name, only contents that were taken back count.
    """

    def __init__(self, name: str) -> None:
        self.name, self._registry, self._versions = name, versions.get_registry_id(name), versions.list_versions(name)
        known = [entry["id"] for entry in read_entries(name, repair=True)]
        tagged = [json.loads(text) for version in self._versions.values() for text in version.ledger_entries]
        for entry in sorted(tagged, key=lambda one: one["number"]):
            if entry["id"] not in known:
                jsonl.append_record(ledger_path(), entry)
        self._all_entries = read_entries(name)
        for entry in self.entries[-1:]:  # the registry had followed all before it when it was written
            if entry not in tagged and entry["version"] in self._versions:
                versions.apply_ledger_entry(entry)
        self.aliases = versions.get_aliases(name)
        self._record_external_changes()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Decisions in this registry, oldest first."""
        return [entry for entry in self._all_entries if entry["registry"] == self._registry]

    @property
    def champion(self) -> str | None:
        """The present champion's version."""
        return self.aliases.get(CHAMPION)

    @property
    def champions(self) -> list[str]:
        """Versions that were champion one after the other and were not taken back, the present one last."""
        return [number for number in (self.entries[-1]["line"] if self.entries else []) if number in self._versions]

    def champion_to_beat(self, subject: JudgedVersion) -> ModelVersion | None:
        """The present champion; None if there is none, or if it is the subject itself."""
        return None if self.champion in (None, subject.version) else self._versions[str(self.champion)]

    def revocation_reason(self, subject: JudgedVersion) -> str | None:
        """Why a version with this content was taken back; None if none was, or one was forced later."""
        for entry in reversed(self._all_entries):
            if entry["action"] == "forced" and entry["content"] == subject.content:
                return None
            if subject.content in [one["content"] for one in entry["taken_back"]]:
                return str(entry["reason"])
        return None

    def record_decision(self, subject: JudgedVersion, decision: Decision) -> dict[str, Any]:
        """Write down the gate's decision, or a forced one, and make the registry follow; return the entry."""
        number, aliases, line = subject.version, dict(self.aliases), self.champions
        action = "forced" if decision.force_reason is not None else "promoted" if decision.promoted else "refused"
        if number == self.champion:
            action = "kept" if action == "promoted" else action
        elif decision.promoted:
            line = [*(one for one in line if one != number), number]
            aliases = self._aliases_after(line, out=[number])
        elif self.revocation_reason(subject) is None:
            aliases[CHALLENGER] = number
        areas = {"auc": decision.auc, "champion_auc": decision.champion_auc}
        return self._append_entry(action, subject, aliases, line, decision.reason, **areas, **decision.to_dict())

    def roll_back(self, to: str | None, reason: str) -> dict[str, Any]:
        """Make version `to`, or else the champion before the present one, champion again; take back those after it.

        Raises:
            UserError: there is none to go back to, or `to` was not one.
        """
        line, now = self.champions, "the present one" if self.champion is None else f"version {self.champion}"
        earlier = line if self.champion is None else line[:-1]
        if not earlier:
            raise UserError(f"{self.name} has no champion before {now} to go back to")
        target = to or earlier[-1]
        if target not in earlier:
            was = f"champions before {now} were {', '.join(earlier)}"
            raise UserError(f"version {target} of {self.name} is not one to go back to; {was}")
        kept, gone = line[: line.index(target) + 1], line[line.index(target) + 1 :]
        taken = [{"version": number, "content": self._last_judged(number).content} for number in gone]
        aliases = self._aliases_after(kept, out=[target, *gone])
        return self._append_entry("rolled back", self._last_judged(target), aliases, kept, reason, taken_back=taken)

    def _aliases_after(self, line: list[str], out: list[str]) -> Aliases:
        """Champion and previous by a line of champions, and the challenger, unless it is one of `out`."""
        aliases = dict(zip((CHAMPION, PREVIOUS), reversed(line), strict=False))
        challenger = self.aliases.get(CHALLENGER)
        return aliases if challenger is None or challenger in out else {**aliases, CHALLENGER: challenger}

    def _last_judged(self, number: str) -> JudgedVersion:
        """A version by the last decision about it."""
        for entry in reversed(self.entries):
            if entry["version"] == number and entry["content"] is not None:
                return JudgedVersion(number, entry["run_id"], entry["content"], entry["data"])
        return JudgedVersion(number, self._versions[number].run_id if number in self._versions else None, None)

    def _record_external_changes(self) -> None:
        before = self.entries[-1]["aliases"] if self.entries else {}
        changed = [name for name in sorted({*before, *self.aliases}) if before.get(name) != self.aliases.get(name)]
        if not changed:
            return
        now, line = self.champion, self.champions
        if now is None:
            line = []
        elif now in line:
            line = line[: line.index(now) + 1]
        else:
            line = [*line, now]
        told = ", ".join(f"{name} from {before.get(name)} to {self.aliases.get(name)}" for name in changed)
        about = self._last_judged(str(self.aliases.get(changed[0]) or before.get(changed[0])))
        reason, origin = f"found in the registry: {told}", {"from": before.get(CHAMPION)}
        self._append_entry("changed outside", about, self.aliases, line, reason, **origin)

    def _append_entry(
        self, action: str, subject: JudgedVersion, aliases: Aliases, line: list[str], reason: str, **more: Any
    ) -> dict[str, Any]:
        entry = {
            "kind": "decided", "id": uuid.uuid4().hex, "number": len(self.entries) + 1, "model": self.name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "who": psutil.Process().username(),
            "registry": self._registry, "action": action, "from": self.champion, "to": aliases.get(CHAMPION),
            "aliases": dict(aliases), "line": line, "reason": reason, "taken_back": [], "checks": [], "auc": None,
            "champion_auc": None, **asdict(subject), **more,
        }  # fmt: skip
        jsonl.append_record(ledger_path(), entry)
        versions.apply_ledger_entry(entry)
        self._all_entries.append(entry)
        self.aliases = dict(aliases)
        return entry


@contextmanager
def open_ledger(name: str) -> Iterator[Ledger]:
    """The ledger of a registered model, while no other process decides about any.

    Raises:
        UserError: another one takes too long, or the ledger is damaged.
        Unreachable: MLflow is.
    """
    try:
        with FileLock(ledger_path().with_name(".ledger.lock"), timeout=LOCK_TIMEOUT):
            yield Ledger(name)
    except Timeout as error:
        told = f"another promotion has gone on for {LOCK_TIMEOUT} s; see what it waits for, then run again"
        raise UserError(f"{ledger_path()}: {told}") from error


def read_entries(name: str | None, *, repair: bool = False) -> list[dict[str, Any]]:
    """Decisions about one registered model or all, oldest first; `mend` is for a process that holds the lock."""
    records = jsonl.read_records(ledger_path(), REMEDY, truncate_partial=repair)
    decided = (one for one in records if one["kind"] == "decided" and name in (None, one["model"]))
    return sorted(decided, key=lambda entry: (entry["time"], entry["number"]))
