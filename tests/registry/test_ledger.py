"""Ledger, aliases and tags stay consistent after kills, concurrent promotions and external registry changes."""

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


def register_versions(name: str, count: int) -> list[JudgedVersion]:
    """Register versions that have no files."""
    with runs.start_run() as run_id:
        client = MlflowClient()
        experiment = client.get_run(run_id).info.experiment_id
        for _ in range(count):
            logged_model = client.create_logged_model(experiment, name=runs.LOGGED_MODEL_NAME, source_run_id=run_id)
            client.finalize_logged_model(logged_model.model_id, "READY")
            versions.register_version(name, run_id, logged_model.model_id)
    return [JudgedVersion(str(n), run_id, f"content of {n}", {"name": "phantom"}) for n in range(1, count + 1)]


def decision(promoted: bool, forced: str | None = None) -> Decision:
    rule = Check("min_auc", "lower bound of the test AUC at least 0.9", PASSED if promoted else FAILED, "0.95")
    return Decision((rule,), 0.95, None, forced)


GOOD, BAD = decision(True), decision(False)


def record_decision(name: str, judged: JudgedVersion, outcome: Decision) -> dict:
    with ledger.open_ledger(name) as model_ledger:
        return model_ledger.record_decision(judged, outcome)


def roll_back(name: str, to: str | None = None, reason: str = "fails on the new scanner") -> dict:
    with ledger.open_ledger(name) as model_ledger:
        return model_ledger.roll_back(to, reason)


def aliases(name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(name).aliases.items()}


def check_consistency(name: str) -> None:
    """Check the invariants that hold when no decision is in progress."""
    entries = ledger.read_entries(name)
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    for before, after in itertools.pairwise(entries):
        assert after["from"] == before["to"]
    assert aliases(name) == entries[-1]["aliases"]
    tagged = {}
    for version in MlflowClient().search_model_versions(f"name = '{name}'"):
        tags = {key: text for key, text in version.tags.items() if key.startswith("ledger.")}
        tagged |= {key: json.loads(text) for key, text in tags.items()}
        own_entries = [entry for entry in entries if entry["version"] == str(version.version)]
        assert len(tags) == len(own_entries)
        judged = [entry for entry in own_entries if entry["checks"]]
        if judged:
            (check,) = judged[-1]["checks"]
            verdict = f"{check['status']}: {check['requirement']}: {check['details']}"
            assert version.tags[f"gate.{check['name']}"] == verdict
    assert tagged == {f"ledger.{entry['number']:05d}": entry for entry in entries}


# Steps (action, version), the aliases after them, and the action of the last entry.
P, R, F, B = "promote", "refuse", "force", "roll back"
CASES = {
    "first model passes": ([(P, "1")], {"champion": "1"}, "promoted"),
    "first model is refused": ([(R, "1")], {"challenger": "1"}, "refused"),
    "better model": ([(P, "1"), (P, "2")], {"champion": "2", "previous": "1"}, "promoted"),
    "worse model": ([(P, "1"), (R, "2")], {"champion": "1", "challenger": "2"}, "refused"),
    "worse model, then better model": (
        [(P, "1"), (R, "2"), (P, "3")], {"champion": "3", "previous": "1", "challenger": "2"}, "promoted",
    ),
    "challenger passes second time": (
        [(P, "1"), (R, "2"), (P, "2")], {"champion": "2", "previous": "1"}, "promoted",
    ),
    "champion passes again": ([(P, "1"), (P, "1")], {"champion": "1"}, "kept"),
    "champion is refused later": (
        [(P, "1"), (P, "2"), (R, "2")], {"champion": "2", "previous": "1"}, "refused",
    ),
    "old champion passes again": (
        [(P, "1"), (P, "2"), (P, "1")], {"champion": "1", "previous": "2"}, "promoted",
    ),
    "old champion is refused again": (
        [(P, "1"), (P, "2"), (R, "1")], {"champion": "2", "previous": "1", "challenger": "1"}, "refused",
    ),
    "forced": ([(P, "1"), (F, "2")], {"champion": "2", "previous": "1"}, "forced"),
    "rolled back": ([(P, "1"), (P, "2"), (B, None)], {"champion": "1"}, "rolled back"),
    "rolled back by one": (
        [(P, "1"), (P, "2"), (P, "3"), (B, None)], {"champion": "2", "previous": "1"}, "rolled back",
    ),
    "rolled back by two": ([(P, "1"), (P, "2"), (P, "3"), (B, "1")], {"champion": "1"}, "rolled back"),
    "rolled back twice": ([(P, "1"), (P, "2"), (P, "3"), (B, None), (B, None)], {"champion": "1"}, "rolled back"),
    "rolled back, then new model": (
        [(P, "1"), (P, "2"), (B, None), (P, "3")], {"champion": "3", "previous": "1"}, "promoted",
    ),
    "rolled back, then refused": ([(P, "1"), (P, "2"), (B, None), (R, "2")], {"champion": "1"}, "refused"),
    "rolled back, then forced": (
        [(P, "1"), (P, "2"), (B, None), (F, "2")], {"champion": "2", "previous": "1"}, "forced",
    ),
    "rolled back with a challenger": (
        [(P, "1"), (P, "2"), (R, "3"), (B, None)], {"champion": "1", "challenger": "3"}, "rolled back",
    ),
}  # fmt: skip


def apply_steps(name: str, steps: list[tuple[str, str | None]], judged_versions: list[JudgedVersion]) -> dict:
    last = {}
    for step, number in steps:
        if step == B:
            last = roll_back(name, number)
        else:
            forced = "only model that reads DICOM" if step == F else None
            last = record_decision(name, judged_versions[int(number) - 1], decision(step == P, forced))
    return last


@pytest.mark.parametrize("case", CASES)
def test_aliases_and_action_after_steps(case):
    steps, expected, action = CASES[case]
    last = apply_steps(case, steps, register_versions(case, 3))
    assert last["action"] == action
    assert aliases(case) == expected
    check_consistency(case)


def test_entry_records_user_time_data_and_reason():
    entry = record_decision("entry", register_versions("entry", 1)[0], GOOD)
    assert {"user", "time", "from", "to", "data", "checks", "reason", "auc"} <= entry.keys()
    assert (entry["from"], entry["to"], entry["data"]) == (None, "1", {"name": "phantom"})
    assert entry["checks"][0]["details"] == "0.95"
    assert entry["time"].endswith("+00:00")
    text = ledger.ledger_path().read_text()
    assert str(Path.cwd()) not in text  # the ledger may be moved with its store


def test_revoked_content_stays_revoked_under_another_number():
    first, second, third = register_versions("content", 3)
    apply_steps("content", [(P, "1"), (P, "2"), (B, None)], [first, second, third])
    retrained = JudgedVersion(third.version, third.run_id, second.content)
    with ledger.open_ledger("content") as model_ledger:
        assert (
            model_ledger.revocation_reason(second)
            == model_ledger.revocation_reason(retrained)
            == "fails on the new scanner"
        )
        assert model_ledger.revocation_reason(first) is None
        assert model_ledger.revocation_reason(third) is None
    assert MlflowClient().get_model_version("content", "2").tags["rolled_back"] == "fails on the new scanner"
    record_decision("content", second, decision(False, "the scanner was repaired"))
    with ledger.open_ledger("content") as model_ledger:
        assert model_ledger.revocation_reason(second) is None
    tags = MlflowClient().get_model_version("content", "2").tags
    assert tags["forced"].startswith("FORCED: the scanner was repaired; without force: 1 failed; lower bound")


def test_forced_tag_stays_after_a_later_decision():
    judged_versions = register_versions("marked", 1)
    apply_steps("marked", [(F, "1"), (P, "1")], judged_versions)
    assert "forced" in MlflowClient().get_model_version("marked", "1").tags
    assert [entry["action"] for entry in ledger.read_entries("marked")] == ["forced", "kept"]


def test_rollback_needs_an_earlier_champion():
    judged_versions = register_versions("alone", 3)
    record_decision("alone", judged_versions[0], GOOD)
    with pytest.raises(UserError, match="alone has no champion before version 1 to roll back to"):
        roll_back("alone")
    apply_steps("alone", [(R, "2"), (P, "3")], judged_versions)
    with pytest.raises(
        UserError, match="cannot roll back to version 2 of alone; the champions before version 3 were 1"
    ):
        roll_back("alone", "2")
    with pytest.raises(UserError, match="cannot roll back to version 3 of alone"):
        roll_back("alone", "3")


def test_external_alias_changes_are_recorded():
    judged_versions = register_versions("hands", 3)
    record_decision("hands", judged_versions[0], GOOD)
    client = MlflowClient()
    client.set_registered_model_alias("hands", "champion", "2")
    client.set_registered_model_alias("hands", "mine", "3")  # not an alias of this project
    entry = record_decision("hands", judged_versions[2], GOOD)
    external = ledger.read_entries("hands")[1]
    assert external["action"] == "external change"
    assert external["reason"] == "changed in the registry: champion from 1 to 2"
    assert (external["from"], external["to"]) == ("1", "2")
    assert (entry["from"], entry["to"], entry["aliases"]["previous"]) == ("2", "3", "2")
    client.delete_registered_model_alias("hands", "mine")
    check_consistency("hands")
    client.delete_registered_model_alias("hands", "champion")
    assert record_decision("hands", judged_versions[0], BAD)["from"] is None
    assert ledger.read_entries("hands")[3]["reason"] == "changed in the registry: champion from 3 to None"


def test_rollback_skips_a_deleted_champion():
    judged_versions = register_versions("deleted", 3)
    apply_steps("deleted", [(P, "1"), (P, "2"), (P, "3")], judged_versions)
    MlflowClient().delete_model_version("deleted", "2")
    assert roll_back("deleted")["to"] == "1"
    assert aliases("deleted") == {"champion": "1"}


def test_lost_ledger_is_restored_from_registry_tags(tmp_path):
    judged_versions = register_versions("gone", 2)
    apply_steps("gone", [(P, "1"), (R, "2"), (P, "2")], judged_versions)
    before = ledger.read_entries("gone")
    shutil.move(ledger.ledger_path(), tmp_path / "ledger.jsonl")
    with ledger.open_ledger("gone") as model_ledger:
        assert model_ledger.entries == before
    assert ledger.read_entries("gone") == before
    records = jsonl.read_records(tmp_path / "ledger.jsonl", "")
    for record in records:  # those of other tests
        if record.get("model") != "gone":
            jsonl.append_record(ledger.ledger_path(), record)


def test_new_registry_starts_empty_but_keeps_revocations():
    judged_versions = register_versions("elsewhere", 3)
    apply_steps("elsewhere", [(P, "1"), (P, "2"), (B, None)], judged_versions)
    MlflowClient().delete_registered_model("elsewhere")  # as on another MLflow server
    retrained = register_versions("elsewhere", 2)
    with ledger.open_ledger("elsewhere") as model_ledger:
        assert (model_ledger.champion, model_ledger.champions, model_ledger.entries) == (None, [], [])
        assert model_ledger.revocation_reason(retrained[1]) == "fails on the new scanner"  # same content
        assert model_ledger.revocation_reason(retrained[0]) is None
        other = JudgedVersion("2", retrained[1].run_id, "content of another training")
        assert model_ledger.revocation_reason(other) is None
    entry = record_decision("elsewhere", retrained[0], GOOD)
    assert (entry["number"], entry["from"], entry["action"]) == (1, None, "promoted")
    assert len(ledger.read_entries("elsewhere")) == 4


def test_truncated_line_is_removed_and_damage_reported():
    judged_versions = register_versions("torn", 2)
    record_decision("torn", judged_versions[0], GOOD)
    with ledger.ledger_path().open("ab") as file:
        file.write(b'{"kind": "decision", "mod')
    assert len(ledger.read_entries("torn")) == 1  # readers do not repair the file
    record_decision("torn", judged_versions[1], GOOD)
    check_consistency("torn")
    content = ledger.ledger_path().read_bytes()
    ledger.ledger_path().write_bytes(b"{nonsense\n" + content)
    with pytest.raises(UserError, match=r"ledger.jsonl is damaged .* move it aside"):
        record_decision("torn", judged_versions[1], GOOD)
    ledger.ledger_path().write_bytes(content)


class Killed(BaseException):
    """Simulates a kill: not an `Exception`, so that no handler catches it."""


CALLS = (
    (jsonl, "append_record"), (MlflowClient, "set_registered_model_alias"),
    (MlflowClient, "delete_registered_model_alias"),
    (MlflowClient, "set_model_version_tag"), (MlflowClient, "delete_model_version_tag"),
)  # fmt: skip


@pytest.mark.parametrize("steps", [[(P, "2")], [(R, "2")], [(F, "3")], [(B, None)]], ids=lambda steps: steps[0][0])
def test_kill_at_any_step_leaves_recoverable_state(steps, monkeypatch):
    """Kill before each modifying call in turn, which is also after the previous one; then open the ledger again."""
    for index in range(1, 100):
        name = f"killed {steps[0][0]} {index}"
        judged_versions = register_versions(name, 4)
        apply_steps(name, [(P, "1"), (P, "4"), (R, "2")], judged_versions)
        calls = 0

        def kill_at_call(function):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == index:  # noqa: B023
                    raise Killed
                function(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for owner, function in CALLS:
                patch.setattr(owner, function, kill_at_call(getattr(owner, function)))
            try:
                apply_steps(name, steps, judged_versions)
                finished = True
            except Killed:
                finished = False
        with ledger.open_ledger(name):
            pass
        check_consistency(name)
        assert "champion" in aliases(name)
        if finished:
            assert index > 3
            return
    pytest.fail("did not finish within 99 calls")


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URI of a PostgreSQL server for this module; skipped if PostgreSQL is not installed, unless CI requires it."""
    require()
    server = PostgreSQL("secret")
    try:
        server.execute("create database registry")
        yield f"postgresql://postgres:secret@127.0.0.1:{server.port}/registry"
    finally:
        server.remove()


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def test_concurrent_promotions_with_kills_stay_consistent(database, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if database == "postgresql":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("postgresql"))
    mlflow_store.connect()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", locations.tracking_uri())
    name, rng = "at once", random.Random(0)  # noqa: S311
    register_versions(name, 20)
    version_lists = [[str(number) for number in range(first, 21, 4)] for first in range(1, 5)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start_process(numbers: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tests.promotions", name, *numbers], env=environment)

    running, kills = [start_process(numbers) for numbers in version_lists], 0
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in running):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        num_decisions = len(ledger.read_entries(name))
        if kills < 6 and num_decisions > 2 * kills:  # while decisions are made, not during startup
            index = rng.randrange(4)
            if running[index].poll() is None:
                running[index].send_signal(signal.SIGKILL)
                running[index].wait()
                running[index], kills = start_process(version_lists[index]), kills + 1
    assert kills == 6
    assert [process.returncode for process in running] == [0, 0, 0, 0]
    entries = ledger.read_entries(name)
    assert sorted(int(entry["version"]) for entry in entries) == list(range(1, 21))  # exactly once
    check_consistency(name)
    best = max((str(number) for number in range(1, 21)), key=promotions.quality_of)
    assert aliases(name)["champion"] == best
    for entry in entries:  # each was compared with the champion at that time
        better = entry["from"] is None or promotions.quality_of(entry["version"]) > promotions.quality_of(entry["from"])
        assert entry["action"] == ("promoted" if better else "refused")


def judged_on(content: str, test: str = "test images") -> JudgedVersion:
    return JudgedVersion("1", None, content, {"test_content": test})


def test_candidates_are_counted_by_test_content():
    register_versions("first name", 1)
    register_versions("second name", 1)
    for name, content in [("first name", "a"), ("second name", "b"), ("first name", "a"), ("second name", "c")]:
        record_decision(name, judged_on(content), BAD)
    with ledger.open_ledger("first name") as model_ledger:
        numbers = [model_ledger.candidate_number(judged_on(content)) for content in ("a", "b", "c", "d")]
        assert numbers == [1, 2, 3, 4]
        assert model_ledger.candidate_number(judged_on("d", "other images")) == 1


def test_best_champion_has_highest_recorded_auc():
    judged_versions = register_versions("best", 4)
    for judged, auc in zip(judged_versions, (0.93, 0.97, 0.95, 0.96), strict=True):
        record_decision("best", judged, Decision(GOOD.checks, auc, None))
        with ledger.open_ledger("best") as model_ledger:
            best = model_ledger.best_champion(JudgedVersion("5", None, "new"))
            assert (None if best is None else best.number) == (None if int(judged.version) < 3 else "2")
    roll_back("best", "1")
    with ledger.open_ledger("best") as model_ledger:
        assert model_ledger.best_champion(JudgedVersion("5", None, "new")) is None
