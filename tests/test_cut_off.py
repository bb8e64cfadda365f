"""What a killed DVC or git leaves half written is mended; what others are at, or a person has to decide, is let be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cut_off
from tests.conftest import ROOT

STAGES = """
stages:
  first: {cmd: "echo first >> runs; cp source first", deps: [source], outs: [first]}
  second: {cmd: "echo second >> runs; cp first second", deps: [first], outs: [second]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose two stages were run, its dvc.lock committed; the test works in it."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "source").write_text("text\n")
    for command in (
        "git init --quiet --initial-branch=main", "git config user.name Test", "git config user.email t@example.org",
        "dvc init --quiet", "dvc repro --quiet", "git add --all", "git commit --quiet -m begin",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True)
    return tmp_path


def repro() -> subprocess.CompletedProcess[str]:
    return subprocess.run(["dvc", "repro"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("last", ["", "first:\n", "    de", "second:"])
@pytest.mark.parametrize("committed", [True, False])
def test_a_lock_that_was_cut_off_is_had_again_and_no_stage_runs_twice(project, capsys, last, committed):
    if not committed:
        subprocess.run(["git", "rm", "--quiet", "--cached", "dvc.lock"], check=True)
    whole = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(whole[: whole.index(last) + len(last)])
    assert "'./dvc.lock' " in repro().stderr
    cut_off.mend()
    became = "is what git has of it again" if committed else "is removed"
    assert f"dvc.lock was cut off when DVC was killed, and {became}" in capsys.readouterr().out
    done = repro()
    assert done.returncode == 0, done.stderr
    assert (project / "dvc.lock").read_text() == whole
    assert (project / "runs").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("text", ["", '{"write": {"/pro'])
def test_a_list_of_processes_that_was_cut_off_is_removed(project, capsys, text):
    (project / ".dvc/tmp/rwlock").write_text(text)
    (project / "source").write_text("another\n")
    assert "RWLock-file" in repro().stderr
    cut_off.mend()
    assert ".dvc/tmp/rwlock was cut off when DVC was killed, and is removed" in capsys.readouterr().out
    assert repro().returncode == 0


def test_what_is_whole_stays_and_nothing_is_told(project, capsys):
    (project / ".dvc/tmp/rwlock").write_text("{}")
    before = (project / "dvc.lock").read_text()
    cut_off.mend()
    assert (project / "dvc.lock").read_text() == before
    assert (project / ".dvc/tmp/rwlock").read_text() == "{}"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nschema: '2.0'\n=======\n>>>>>>> other\n", "schema: '9.0'\n"])
def test_what_is_no_work_of_a_kill_is_left_to_people(project, capsys, text):
    (project / "dvc.lock").write_text(text)
    if "9.0" in text:  # that of a newer DVC
        subprocess.run(["git", "add", "dvc.lock"], check=True)
    cut_off.mend()
    assert (project / "dvc.lock").read_text() == text
    assert capsys.readouterr().out == ""


def test_nothing_is_touched_while_another_dvc_writes(project):
    from dvc.lock import make_lock

    (project / "dvc.lock").write_text("")
    with make_lock(".dvc/tmp/lock"):
        cut_off.mend()
        assert (project / "dvc.lock").read_text() == ""


def test_before_dvc_has_run_there_is_nothing_to_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut_off.mend()
    assert not [*tmp_path.iterdir()]


def test_make_repro_mends_before_dvc_is_asked(project):
    """By `python -m pipelines.check`, with which it begins."""
    shutil.copy(ROOT / "params.yaml", project)
    whole = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text("")
    check = [sys.executable, "-m", "pipelines.check"]
    done = subprocess.run(
        check, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dvc.lock was cut off when DVC was killed, and is what git has of it again")
    assert (project / "dvc.lock").read_text() == whole


def test_git_goes_on_after_a_kill(project, capsys):
    (project / ".git/index.lock").touch()
    (project / "source").write_text("another\n")
    add = ["git", "add", "source"]
    assert subprocess.run(add, capture_output=True, check=False).returncode != 0
    cut_off.mend_git()
    assert capsys.readouterr().out == ".git/index.lock was left by a git that was killed, and is removed\n"
    subprocess.run(add, check=True)
