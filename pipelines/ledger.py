"""Who became champion, when and why: a file that only ever grows, and the registry, which follows it.

`mlruns/ledger.jsonl` holds two kinds of lines: what was decided, and that the registry has followed. A decision is on
the disk before an alias moves; whoever comes next, after a kill at any instruction, first makes the registry follow
what is left. Each decision stands in full with the version it is about too (tag `ledger.00001` and so on), so that
another machine with the same registry has the whole ledger, and none is lost with mlruns/.

From reading the champion until the registry has followed a process holds a lock. What was done to the registry by other
hands is found then, and noted as `changed outside`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from filelock import FileLock, Timeout

from fadeformer import lines
from fadeformer.errors import UserError
from fadeformer.verdict import Decision
from pipelines import places, registry
from pipelines.registry import CHALLENGER, CHAMPION, PREVIOUS, Aliases, Version

Rival = TypeVar("Rival")
PATIENCE = 600  # seconds that another promotion may take
REMEDY = "move it aside: what it told is still with the versions of the registry"


def path() -> Path:
    """Where the ledger is kept."""
    return places.project() / "mlruns" / "ledger.jsonl"


@dataclass(frozen=True)
class Subject:
    """What a decision is about: a version, its content, and what it was trained and judged on."""

    version: str
    run_id: str | None
    content: str | None
    data: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """What was decided about one registered model, and what the registry says of it now.

    Of another registry, such as a server that was used before, nothing is taken over but what was taken back.

    Attributes:
        name: of the registered model.
        entries: what was decided about it, oldest first.
        aliases: as the registry has them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._registry = registry.identity(name)
        self._versions = registry.versions(name)
        records = lines.read(path(), REMEDY, mend=True)
        records += self._lost(records)
        decided = [record for record in records if record["kind"] == "decided" and record["model"] == name]
        self._everywhere = sorted(decided, key=lambda entry: (entry["time"], entry["number"]))
        here = [entry for entry in decided if entry["registry"] == self._registry]
        self.entries = sorted(here, key=lambda entry: entry["number"])
        followed = {record["entry"] for record in records if record["kind"] == "followed"}
        for entry in self.entries[-1:]:  # all before it were followed before it was written
            if entry["id"] not in followed:
                self._follow(entry)
        self.aliases = registry.aliases(name)
        self._notice()

    @property
    def champion(self) -> str | None:
        """The present champion's version."""
        return self.aliases.get(CHAMPION)

    @property
    def line(self) -> list[str]:
        """Versions that were champion one after the other and were not taken back, the present one last."""
        return [number for number in (self.entries[-1]["line"] if self.entries else []) if number in self._versions]

    def taken_back(self, subject: Subject) -> str | None:
        """Why a version, or one of the same content, was taken back; None where it was not, or came back by force."""

        def is_it(entry: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
            if one["content"] is not None and one["content"] == subject.content:
                return True
            return bool(entry["registry"] == self._registry and one["version"] == subject.version)

        for entry in reversed(self._everywhere):
            if entry["action"] == "forced" and is_it(entry, entry):
                return None
            if any(is_it(entry, one) for one in entry["taken_back"]):
                return str(entry["reason"])
        return None

    def decide(self, subject: Subject, decision: Decision) -> dict[str, Any]:
        """Writes down what the gate, or force, made of a version, and makes the registry follow; gives the entry."""
        number, before = subject.version, self.champion
        aliases, line = dict(self.aliases), self.line
        if decision.promoted and number != before:
            line = [*(one for one in line if one != number), number]
            aliases = self._aliases_of(line, out=[number])
        elif not decision.promoted and number != before and self.taken_back(subject) is None:
            aliases[CHALLENGER] = number
        if decision.forced is not None:
            action = "forced"
        elif not decision.promoted:
            action = "refused"
        else:
            action = "kept" if number == before else "promoted"
        return self._write(
            action, subject, aliases, line, decision.reason, auc=decision.auc, champion_auc=decision.champion_auc,
            **decision.as_dict(),
        )  # fmt: skip

    def roll_back(self, to: str | None, reason: str) -> dict[str, Any]:
        """Makes an earlier champion the champion again, and takes back those that came after it.

        Args:
            to: its version; None for the one before the present champion.
            reason: why, in words.

        Raises:
            UserError: there is none to go back to, or `to` was not one.
        """
        line = self.line
        earlier = line[:-1] if self.champion is not None else line
        if not earlier:
            raise UserError(f"{self.name} has no champion before {self._told(self.champion)} to go back to")
        target = to or earlier[-1]
        if target not in earlier:
            raise UserError(
                f"version {target} of {self.name} is not one to go back to; champions before"
                f" {self._told(self.champion)} were {', '.join(earlier)}"
            )
        kept = line[: line.index(target) + 1]
        gone = line[len(kept) :]
        aliases = self._aliases_of(kept, out=[target, *gone])
        taken = [{"version": number, "content": self._of(number).content} for number in gone]
        return self._write("rolled back", self._of(target), aliases, kept, reason, taken_back=taken)

    def _aliases_of(self, line: list[str], out: list[str]) -> Aliases:
        """Champion and previous by a line of champions, and the challenger, unless it is one of `out`."""
        challenger = self.aliases.get(CHALLENGER)
        found = {CHAMPION: line[-1]}
        if len(line) > 1:
            found[PREVIOUS] = line[-2]
        if challenger is not None and challenger not in out:
            found[CHALLENGER] = challenger
        return found

    def _of(self, number: str) -> Subject:
        """What is known of a version from what was decided about it."""
        for entry in reversed(self.entries):
            if entry["version"] == number and entry["content"] is not None:
                return Subject(number, entry["run_id"], entry["content"], entry["data"])
        known = self._versions.get(number)
        return Subject(number, known.run_id if known else None, None)

    @staticmethod
    def _told(number: str | None) -> str:
        return "the present one" if number is None else f"version {number}"

    def _notice(self) -> None:
        """Writes down what other hands have done to the aliases."""
        before = self.entries[-1]["aliases"] if self.entries else {}
        if self.aliases == before:
            return
        now, line = self.champion, self.line
        if now is None:
            line = []
        elif now in line:
            line = line[: line.index(now) + 1]
        else:
            line = [*line, now]
        changed = sorted(name for name in {*before, *self.aliases} if before.get(name) != self.aliases.get(name))
        told = ", ".join(f"{name} from {before.get(name)} to {self.aliases.get(name)}" for name in changed)
        about = self.aliases.get(changed[0]) or before.get(changed[0])
        reason, origin = f"found in the registry: {told}", {"from": before.get(CHAMPION)}
        self._write("changed outside", self._of(str(about)), self.aliases, line, reason, **origin)

    def _write(
        self, action: str, subject: Subject, aliases: Aliases, line: list[str], reason: str, **more: Any
    ) -> dict[str, Any]:
        entry = {
            "kind": "decided", "id": uuid.uuid4().hex, "number": self.entries[-1]["number"] + 1 if self.entries else 1,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "who": psutil.Process().username(),
            "model": self.name, "registry": self._registry, "action": action, "version": subject.version,
            "run_id": subject.run_id, "content": subject.content, "from": self.champion, "to": aliases.get(CHAMPION),
            "aliases": dict(aliases), "line": line, "reason": reason, "data": dict(subject.data), "taken_back": [],
            "auc": None, "champion_auc": None, "rules": [], **more,
        }  # fmt: skip
        lines.append(path(), entry)
        self._follow(entry)
        self.entries.append(entry)
        self._everywhere.append(entry)
        self.aliases = dict(aliases)
        return entry

    def _follow(self, entry: Mapping[str, Any]) -> None:
        """Makes the registry what an entry says, wherever it was left, and notes that it is."""
        registry.follow(entry)
        lines.append(path(), {"kind": "followed", "model": self.name, "entry": entry["id"]})

    def _lost(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries that are with the versions of the registry, and not in the file: of another machine, or a new one."""
        known = {record["id"] for record in records if record["kind"] == "decided"}
        there = [json.loads(text) for one in self._versions.values() for text in one.entries]
        lost = sorted((entry for entry in there if entry["id"] not in known), key=lambda entry: entry["number"])
        found = []
        for entry in lost:
            found += [entry, {"kind": "followed", "model": self.name, "entry": entry["id"]}]
        for record in found:
            lines.append(path(), record)
        return found


@contextmanager
def opened(name: str) -> Iterator[Ledger]:
    """The ledger of a registered model, while no other process decides about any.

    Raises:
        UserError: another one takes too long, or the ledger is damaged.
        Unreachable: MLflow is.
    """
    lock = FileLock(path().with_name(".ledger.lock"), timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{path()}: another promotion has gone on for {PATIENCE} s; see what it waits for, then run again"
        ) from error
    try:
        yield Ledger(name)
    finally:
        lock.release()


def judge(
    name: str,
    subject: Subject,
    prepare: Callable[[Version], Rival],
    decide: Callable[[Rival | None, str | None], Decision],
) -> tuple[Decision, dict[str, Any]]:
    """Judges a version against the champion of the moment.

    What takes long is done without the lock; where another process has made another champion meanwhile, it is done
    again for that one.

    Args:
        name: of the registered model.
        subject: the version.
        prepare: gives what the champion is compared by.
        decide: gives the decision, from that (None where there is no champion but the version itself) and from why the
            version was taken back once (None where it was not).

    Returns:
        The decision, and the ledger's entry about it.
    """
    number = registry.aliases(name).get(CHAMPION)
    while True:
        compared = number is not None and number != subject.version
        found = prepare(registry.versions(name)[str(number)]) if compared else None
        with opened(name) as book:
            if book.champion == number:
                decision = decide(found, book.taken_back(subject))
                return decision, book.decide(subject, decision)
            number = book.champion


def history(name: str | None) -> list[dict[str, Any]]:
    """What was decided, oldest first: about one registered model or all; another process may be writing."""
    records = lines.read(path(), REMEDY)
    found = [record for record in records if record["kind"] == "decided" and name in (None, record["model"])]
    return sorted(found, key=lambda entry: (entry["time"], entry["number"]))
