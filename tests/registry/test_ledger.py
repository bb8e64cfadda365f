"""The ledger, the aliases and the tags agree, whoever is killed when, and whatever other hands do to the registry."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fadeformer.errors import UserError
from fadeformer.io import jsonl
from fadeformer.promotion.decision import FAILED, PASSED, Check, Decision
from pipelines.registry import ledger, versions
from pipelines.registry.ledger import JudgedVersion
from pipelines.tracking import locations, runs
from pipelines.tracking import store as mlflow_store
from tests import promotions
from tests.conftest import ROOT
from tests.postgresql import PostgreSQL, require

pytestmark = pytest.mark.usefixtures("own_store")


def registered(name: str, count: int) -> list[JudgedVersion]:
    """Versions that are only rows of the store."""
    with runs.start_run() as run_id:
        client = MlflowClient()
        experiment = client.get_run(run_id).info.experiment_id
        for _ in range(count):
            made = client.create_logged_model(experiment, name=runs.LOGGED_MODEL_NAME, source_run_id=run_id)
            client.finalize_logged_model(made.model_id, "READY")
            versions.register_version(name, run_id, made.model_id)
    return [JudgedVersion(str(n), run_id, f"content of {n}", {"name": "phantom"}) for n in range(1, count + 1)]


def decision(promoted: bool, forced: str | None = None) -> Decision:
    rule = Check("min_auc", "lower bound of the test AUC at least 0.9", PASSED if promoted else FAILED, "0.95")
    return Decision((rule,), 0.95, None, forced)


GOOD, BAD = decision(True), decision(False)


def decide(name: str, subject: JudgedVersion, found: Decision) -> dict:
    with ledger.open_ledger(name) as book:
        return book.record_decision(subject, found)


def roll_back(name: str, to: str | None = None, reason: str = "fails on the new scanner") -> dict:
    with ledger.open_ledger(name) as book:
        return book.roll_back(to, reason)


def aliases(name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(name).aliases.items()}


def agree(name: str) -> None:
    """What must hold at any time at which nobody is at work."""
    entries = ledger.read_entries(name)
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    for before, after in itertools.pairwise(entries):
        assert after["from"] == before["to"]
    assert aliases(name) == entries[-1]["aliases"]
    tagged = {}
    for version in MlflowClient().search_model_versions(f"name = '{name}'"):
        tags = {key: text for key, text in version.tags.items() if key.startswith("ledger.")}
        tagged |= {key: json.loads(text) for key, text in tags.items()}
        mine = [entry for entry in entries if entry["version"] == str(version.version)]
        assert len(tags) == len(mine)
        judged = [entry for entry in mine if entry["checks"]]
        if judged:
            (check,) = judged[-1]["checks"]
            verdict = f"{check['status']}: {check['requirement']}: {check['details']}"
            assert version.tags[f"gate.{check['name']}"] == verdict
    assert tagged == {f"ledger.{entry['number']:05d}": entry for entry in entries}


# What is done to versions 1, 2, 3 ... in turn; the aliases after it, and what the last entry calls it.
P, R, F, B = "promote", "refuse", "force", "roll back"
CASES = {
    "the first model passes": ([(P, "1")], {"champion": "1"}, "promoted"),
    "the first model is refused": ([(R, "1")], {"challenger": "1"}, "refused"),
    "a better one": ([(P, "1"), (P, "2")], {"champion": "2", "previous": "1"}, "promoted"),
    "a worse one": ([(P, "1"), (R, "2")], {"champion": "1", "challenger": "2"}, "refused"),
    "a worse one, then a better one": (
        [(P, "1"), (R, "2"), (P, "3")], {"champion": "3", "previous": "1", "challenger": "2"}, "promoted",
    ),
    "the challenger on a second look": (
        [(P, "1"), (R, "2"), (P, "2")], {"champion": "2", "previous": "1"}, "promoted",
    ),
    "the champion judged again": ([(P, "1"), (P, "1")], {"champion": "1"}, "kept"),
    "the champion judged again and refused": (
        [(P, "1"), (P, "2"), (R, "2")], {"champion": "2", "previous": "1"}, "refused",
    ),
    "an old champion judged again and better": (
        [(P, "1"), (P, "2"), (P, "1")], {"champion": "1", "previous": "2"}, "promoted",
    ),
    "an old champion judged again and worse": (
        [(P, "1"), (P, "2"), (R, "1")], {"champion": "2", "previous": "1", "challenger": "1"}, "refused",
    ),
    "forced": ([(P, "1"), (F, "2")], {"champion": "2", "previous": "1"}, "forced"),
    "rolled back": ([(P, "1"), (P, "2"), (B, None)], {"champion": "1"}, "rolled back"),
    "rolled back by one of three": (
        [(P, "1"), (P, "2"), (P, "3"), (B, None)], {"champion": "2", "previous": "1"}, "rolled back",
    ),
    "rolled back by two": ([(P, "1"), (P, "2"), (P, "3"), (B, "1")], {"champion": "1"}, "rolled back"),
    "rolled back twice": ([(P, "1"), (P, "2"), (P, "3"), (B, None), (B, None)], {"champion": "1"}, "rolled back"),
    "rolled back, then a new one": (
        [(P, "1"), (P, "2"), (B, None), (P, "3")], {"champion": "3", "previous": "1"}, "promoted",
    ),
    "rolled back, then refused for that": ([(P, "1"), (P, "2"), (B, None), (R, "2")], {"champion": "1"}, "refused"),
    "rolled back, then forced": (
        [(P, "1"), (P, "2"), (B, None), (F, "2")], {"champion": "2", "previous": "1"}, "forced",
    ),
    "rolled back with a challenger": (
        [(P, "1"), (P, "2"), (R, "3"), (B, None)], {"champion": "1", "challenger": "3"}, "rolled back",
    ),
}  # fmt: skip


def play(name: str, steps: list[tuple[str, str | None]], subjects: list[JudgedVersion]) -> dict:
    last = {}
    for step, number in steps:
        if step == B:
            last = roll_back(name, number)
        else:
            forced = "no other reads DICOM" if step == F else None
            last = decide(name, subjects[int(number) - 1], decision(step == P, forced))
    return last


@pytest.mark.parametrize("case", CASES)
def test_a_case(case):
    steps, expected, action = CASES[case]
    last = play(case, steps, registered(case, 3))
    assert last["action"] == action
    assert aliases(case) == expected
    agree(case)


def test_who_when_what_and_why_are_told():
    entry = decide("told", registered("told", 1)[0], GOOD)
    assert {"user", "time", "from", "to", "data", "checks", "reason", "auc"} <= entry.keys()
    assert (entry["from"], entry["to"], entry["data"]) == (None, "1", {"name": "phantom"})
    assert entry["checks"][0]["details"] == "0.95"
    assert entry["time"].endswith("+00:00")
    text = ledger.ledger_path().read_text()
    assert str(Path.cwd()) not in text  # a ledger goes where its store goes


def test_what_was_taken_back_stays_so_under_another_number():
    first, second, third = registered("content", 3)
    play("content", [(P, "1"), (P, "2"), (B, None)], [first, second, third])
    again = JudgedVersion(third.version, third.run_id, second.content)
    with ledger.open_ledger("content") as book:
        assert book.revocation_reason(second) == book.revocation_reason(again) == "fails on the new scanner"
        assert book.revocation_reason(first) is None
        assert book.revocation_reason(third) is None
    assert MlflowClient().get_model_version("content", "2").tags["rolled_back"] == "fails on the new scanner"
    decide("content", second, decision(False, "the scanner was repaired"))
    with ledger.open_ledger("content") as book:
        assert book.revocation_reason(second) is None
    tags = MlflowClient().get_model_version("content", "2").tags
    assert tags["forced"].startswith("FORCED: the scanner was repaired; without force: lower bound")


def test_forced_stays_marked_when_it_is_judged_again():
    subjects = registered("marked", 1)
    play("marked", [(F, "1"), (P, "1")], subjects)
    assert "forced" in MlflowClient().get_model_version("marked", "1").tags
    assert [entry["action"] for entry in ledger.read_entries("marked")] == ["forced", "kept"]


def test_there_is_nothing_to_go_back_to():
    subjects = registered("alone", 3)
    decide("alone", subjects[0], GOOD)
    with pytest.raises(UserError, match="alone has no champion before version 1 to roll back to"):
        roll_back("alone")
    play("alone", [(R, "2"), (P, "3")], subjects)
    with pytest.raises(
        UserError, match="cannot roll back to version 2 of alone; the champions before version 3 were 1"
    ):
        roll_back("alone", "2")
    with pytest.raises(UserError, match="cannot roll back to version 3 of alone"):
        roll_back("alone", "3")


def test_other_hands_are_noted():
    subjects = registered("hands", 3)
    decide("hands", subjects[0], GOOD)
    client = MlflowClient()
    client.set_registered_model_alias("hands", "champion", "2")
    client.set_registered_model_alias("hands", "mine", "3")  # none of ours
    entry = decide("hands", subjects[2], GOOD)
    outside = ledger.read_entries("hands")[1]
    assert outside["action"] == "external change"
    assert outside["reason"] == "changed in the registry: champion from 1 to 2"
    assert (outside["from"], outside["to"]) == ("1", "2")
    assert (entry["from"], entry["to"], entry["aliases"]["previous"]) == ("2", "3", "2")
    client.delete_registered_model_alias("hands", "mine")
    agree("hands")
    client.delete_registered_model_alias("hands", "champion")
    assert decide("hands", subjects[0], BAD)["from"] is None
    assert ledger.read_entries("hands")[3]["reason"] == "changed in the registry: champion from 3 to None"


def test_a_champion_that_was_deleted_is_none_to_go_back_to():
    subjects = registered("deleted", 3)
    play("deleted", [(P, "1"), (P, "2"), (P, "3")], subjects)
    MlflowClient().delete_model_version("deleted", "2")
    assert roll_back("deleted")["to"] == "1"
    assert aliases("deleted") == {"champion": "1"}


def test_a_ledger_that_is_gone_comes_back_from_the_registry(tmp_path):
    subjects = registered("gone", 2)
    play("gone", [(P, "1"), (R, "2"), (P, "2")], subjects)
    before = ledger.read_entries("gone")
    shutil.move(ledger.ledger_path(), tmp_path / "ledger.jsonl")
    with ledger.open_ledger("gone") as book:
        assert book.entries == before
    assert ledger.read_entries("gone") == before
    rest = jsonl.read_records(tmp_path / "ledger.jsonl", "")
    for record in rest:  # of the other tests
        if record.get("model") != "gone":
            jsonl.append_record(ledger.ledger_path(), record)


def test_another_registry_has_a_line_of_its_own_and_what_was_taken_back_stays_so():
    subjects = registered("elsewhere", 3)
    play("elsewhere", [(P, "1"), (P, "2"), (B, None)], subjects)
    MlflowClient().delete_registered_model("elsewhere")  # as if another server were asked
    again = registered("elsewhere", 2)
    with ledger.open_ledger("elsewhere") as book:
        assert (book.champion, book.champions, book.entries) == (None, [], [])
        assert book.revocation_reason(again[1]) == "fails on the new scanner"  # of the same content
        assert book.revocation_reason(again[0]) is None
        other = JudgedVersion("2", again[1].run_id, "of another training")
        assert book.revocation_reason(other) is None
    entry = decide("elsewhere", again[0], GOOD)
    assert (entry["number"], entry["from"], entry["action"]) == (1, None, "promoted")
    assert len(ledger.read_entries("elsewhere")) == 4


def test_a_torn_line_is_cut_and_a_damaged_ledger_is_told():
    subjects = registered("torn", 2)
    decide("torn", subjects[0], GOOD)
    with ledger.ledger_path().open("ab") as file:
        file.write(b'{"kind": "decision", "mod')
    assert len(ledger.read_entries("torn")) == 1  # a reader leaves it alone
    decide("torn", subjects[1], GOOD)
    agree("torn")
    whole = ledger.ledger_path().read_bytes()
    ledger.ledger_path().write_bytes(b"{nonsense\n" + whole)
    with pytest.raises(UserError, match=r"ledger.jsonl is damaged .* move it aside"):
        decide("torn", subjects[1], GOOD)
    ledger.ledger_path().write_bytes(whole)


class Killed(BaseException):
    """Stands for a kill: nothing in the way of an `except Exception` stops it."""


CALLS = (
    (jsonl, "append"), (MlflowClient, "set_registered_model_alias"), (MlflowClient, "delete_registered_model_alias"),
    (MlflowClient, "set_model_version_tag"), (MlflowClient, "delete_model_version_tag"),
)  # fmt: skip


@pytest.mark.parametrize("steps", [[(P, "2")], [(R, "2")], [(F, "3")], [(B, None)]], ids=lambda steps: steps[0][0])
def test_killed_before_any_step_the_next_one_ends_consistent(steps, monkeypatch):
    """Before each call that changes something, so after the one before it; then somebody else comes."""
    for place in range(1, 100):
        name = f"killed {steps[0][0]} {place}"
        subjects = registered(name, 4)
        play(name, [(P, "1"), (P, "4"), (R, "2")], subjects)
        calls = 0

        def counted(function):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == place:  # noqa: B023
                    raise Killed
                function(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for owner, function in CALLS:
                patch.setattr(owner, function, counted(getattr(owner, function)))
            try:
                play(name, steps, subjects)
                ended = True
            except Killed:
                ended = False
        with ledger.open_ledger(name):
            pass
        agree(name)
        assert "champion" in aliases(name)
        if ended:
            assert place > 3
            return
    pytest.fail("there is no end to it")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """Address of a PostgreSQL server of this test alone; skipped where there is none, unless CI says there must be."""
    require()
    server = PostgreSQL("secret")
    try:
        server.ask("create database registry")
        yield f"postgresql://postgres:secret@127.0.0.1:{server.port}/registry"
    finally:
        server.remove()


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def test_twenty_promotions_by_four_processes_with_kills(database, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if database == "postgresql":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("postgresql"))
    mlflow_store.connect()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", locations.tracking_uri())
    name, dice = "at once", random.Random(0)  # noqa: S311
    registered(name, 20)
    shares = [[str(number) for number in range(first, 21, 4)] for first in range(1, 5)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def begin(share: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tests.promotions", name, *share], env=environment)

    running, kills = [begin(share) for share in shares], 0
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in running):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        at_work = len(ledger.read_entries(name))
        if kills < 6 and at_work > 2 * kills:  # while something is decided, not while all are still loading
            place = dice.randrange(4)
            if running[place].poll() is None:
                running[place].send_signal(signal.SIGKILL)
                running[place].wait()
                running[place], kills = begin(shares[place]), kills + 1
    assert kills == 6
    assert [process.returncode for process in running] == [0, 0, 0, 0]
    entries = ledger.read_entries(name)
    assert sorted(int(entry["version"]) for entry in entries) == list(range(1, 21))  # each once
    agree(name)
    best = max((str(number) for number in range(1, 21)), key=promotions.quality_of)
    assert aliases(name)["champion"] == best
    for entry in entries:  # each against the champion of its moment
        better = entry["from"] is None or promotions.quality_of(entry["version"]) > promotions.quality_of(entry["from"])
        assert entry["action"] == ("promoted" if better else "refused")
