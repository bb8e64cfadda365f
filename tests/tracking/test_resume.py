"""Folders of unfinished trainings: concurrent runs resume their own training and do not remove others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fadeformer.errors import TransientError
from pipelines import paths
from pipelines.tracking import locations, resume

NUM_PROCESSES = 4
ROUNDS = 25
# A run in a separate process: it trains, marks the training as finished, and removes it, concurrently with others.
RUN = f"""
import os, sys
from pipelines.tracking import resume
os.chdir(sys.argv[1])
for number in range({ROUNDS}):
    resume.compute_fingerprint = lambda: {{"run": sys.argv[1], "number": number}}
    with resume.open_training_folder() as folder:
        resume.mark_finished(folder, f"{{sys.argv[1]}} {{number}}")
    resume.remove_finished(f"{{sys.argv[1]}} {{number}}")
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Change to the workspace of a deployment run, which is created first; "" is the project itself."""

    def go_to(name: str) -> Path:
        folder = tmp_path / locations.WORKSPACES / name if name else tmp_path
        if name and not folder.exists():
            (folder / locations.WORKSPACE_MARKER).parent.mkdir(parents=True)
            (folder / locations.WORKSPACE_MARKER).write_text("{}")
        monkeypatch.chdir(folder)
        return folder

    return go_to


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the fingerprint of the next training."""
    return lambda seed: monkeypatch.setattr(resume, "compute_fingerprint", lambda: {"seed": seed})


def train(run_id: str) -> Path:
    """Run a training to its end and return its folder."""
    with resume.open_training_folder() as folder:
        resume.mark_finished(folder, run_id)
    return folder


def test_finished_training_stays_until_its_run_removes_it(
    workspace: Callable[[str], Path], seed: Callable[[int], None]
) -> None:
    workspace("one")
    seed(1)
    first = train("run of one")
    workspace("two")
    seed(2)
    train("run of two")
    resume.remove_finished("run of two")
    assert (first / resume.FINISHED_TRAINING).is_file()
    workspace("one")
    resume.remove_finished("run of one")
    assert not any(path.is_dir() for path in first.parent.iterdir())


@pytest.mark.parametrize(("before", "after"), [("", ""), ("one", "one"), ("gone", "two")])
def test_stale_finished_training_is_removed_by_the_next(
    workspace: Callable[[str], Path], seed: Callable[[int], None], before: str, after: str
) -> None:
    folder = workspace(before)
    seed(1)
    training = train("before")
    workspace(after)
    if after != before:
        shutil.rmtree(folder)
    seed(2)
    assert train("after").is_dir()
    assert not training.exists()


def test_finished_training_in_use_is_not_removed(
    workspace: Callable[[str], Path],
    seed: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace("one")
    seed(1)
    train("same")
    workspace("two")
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0)
    with resume.open_training_folder() as folder:
        resume.remove_finished("same")
        assert (folder / resume.FINGERPRINT).is_file()
    assert "resuming the unfinished training" in capsys.readouterr().out
    resume.remove_finished("same")
    assert not folder.exists()


def test_running_training_is_not_reported_as_unfinished(
    workspace: Callable[[str], Path], seed: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace("one")
    seed(1)
    with resume.open_training_folder():
        workspace("two")
        seed(2)
        train("run of two")
        assert "training from the start" not in capsys.readouterr().out
    seed(3)
    train("run of three")
    assert "training from the start" in capsys.readouterr().out


def test_same_training_cannot_run_twice(
    workspace: Callable[[str], Path], seed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0)
    workspace("one")
    seed(1)
    message = "another process runs the same training"
    with resume.open_training_folder(), pytest.raises(TransientError, match=message), resume.open_training_folder():
        pass


def test_partially_removed_training_is_not_resumed(
    workspace: Callable[[str], Path], seed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace("one")
    seed(1)
    folder = train("one")

    def kill_during_removal(folder: Path) -> None:
        (folder / resume.FINISHED_TRAINING).unlink()
        raise KeyboardInterrupt

    def interrupt_removal() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(resume.shutil, "rmtree", kill_during_removal)
            with pytest.raises(KeyboardInterrupt):
                resume.remove_finished("one")

    (folder / "step-00000001.pt").touch()
    interrupt_removal()
    with resume.open_training_folder() as resumed:
        assert resumed == folder
        assert json.loads((resumed / resume.FINGERPRINT).read_text()) == {"seed": 1}
        assert {path.name for path in resumed.iterdir()} == {resume.FINGERPRINT}
        resume.mark_finished(resumed, "one")
    interrupt_removal()
    seed(2)
    assert train("two").is_dir()
    assert not folder.exists()


def test_concurrent_runs_do_not_interfere(workspace: Callable[[str], Path], tmp_path: Path) -> None:
    workspaces = [str(workspace(f"run-{number}")) for number in range(NUM_PROCESSES)]
    runs = [subprocess.Popen([sys.executable, "-c", RUN, folder], stderr=subprocess.PIPE) for folder in workspaces]
    errors = [run.communicate()[1].decode() for run in runs]
    assert [(run.returncode, text) for run, text in zip(runs, errors, strict=True)] == [(0, "")] * NUM_PROCESSES
    assert not any(path.is_dir() for path in (tmp_path / paths.UNFINISHED_TRAININGS).iterdir())
