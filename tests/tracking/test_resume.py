"""Trainings that have begun, of runs side by side: each finds its own again, and none takes another's from it."""

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

AT_ONCE = 4
ROUNDS = 25
# A run of its own process: trains, has its model noted, and forgets, while others do the same.
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
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Goes to a working copy of a deployment run, which is made first; "" is the project itself."""

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
    """Sets what the next training is made of."""
    return lambda seed: monkeypatch.setattr(resume, "compute_fingerprint", lambda: {"seed": seed})


def train(run_id: str) -> Path:
    """A training that ends: its folder."""
    with resume.open_training_folder() as folder:
        resume.mark_finished(folder, run_id)
    return folder


def test_what_another_run_has_finished_stays_until_that_run_forgets_it(
    copy: Callable[[str], Path], seed: Callable[[int], None]
) -> None:
    copy("one")
    seed(1)
    one = train("of one")
    copy("two")
    seed(2)
    train("of two")
    resume.remove_finished("of two")
    assert (one / resume.FINISHED_MARKER).is_file()
    copy("one")
    resume.remove_finished("of one")
    assert not any(path.is_dir() for path in one.parent.iterdir())


@pytest.mark.parametrize(("before", "after"), [("", ""), ("one", "one"), ("gone", "two")])
def test_what_is_finished_and_nobody_can_need_goes_when_the_next_begins(
    copy: Callable[[str], Path], seed: Callable[[int], None], before: str, after: str
) -> None:
    left_in = copy(before)
    seed(1)
    left = train("before")
    copy(after)
    if after != before:
        shutil.rmtree(left_in)
    seed(2)
    assert train("after").is_dir()
    assert not left.exists()


def test_a_finished_training_that_is_taken_up_again_is_not_removed_meanwhile(
    copy: Callable[[str], Path],
    seed: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy("one")
    seed(1)
    train("same")
    copy("two")
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0)
    with resume.open_training_folder() as folder:
        resume.remove_finished("same")
        assert (folder / resume.FINGERPRINT).is_file()
    assert "resuming the unfinished training" in capsys.readouterr().out
    resume.remove_finished("same")
    assert not folder.exists()


def test_a_training_that_another_process_is_at_is_not_told_as_left(
    copy: Callable[[str], Path], seed: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    copy("one")
    seed(1)
    with resume.open_training_folder():
        copy("two")
        seed(2)
        train("of two")
        assert "training from the start" not in capsys.readouterr().out
    seed(3)
    train("of three")
    assert "training from the start" in capsys.readouterr().out


def test_the_very_same_training_is_begun_once(
    copy: Callable[[str], Path], seed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "LOCK_TIMEOUT", 0)
    copy("one")
    seed(1)
    told = "another process runs the same training"
    with resume.open_training_folder(), pytest.raises(TransientError, match=told), resume.open_training_folder():
        pass


def test_half_of_a_training_that_was_being_removed_is_never_gone_on_with(
    copy: Callable[[str], Path], seed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy("one")
    seed(1)
    folder = train("one")

    def killed(folder: Path) -> None:
        (folder / resume.FINISHED_MARKER).unlink()
        raise KeyboardInterrupt

    def remove_half() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(resume.shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                resume.remove_finished("one")

    (folder / "step-00000001.pt").touch()
    remove_half()
    with resume.open_training_folder() as again:
        assert again == folder
        assert json.loads((again / resume.FINGERPRINT).read_text()) == {"seed": 1}
        assert {path.name for path in again.iterdir()} == {resume.FINGERPRINT}
        resume.mark_finished(again, "one")
    remove_half()
    seed(2)
    assert train("two").is_dir()
    assert not folder.exists()


def test_runs_that_begin_and_end_at_once_do_not_fail(copy: Callable[[str], Path], tmp_path: Path) -> None:
    copies = [str(copy(f"run-{number}")) for number in range(AT_ONCE)]
    runs = [subprocess.Popen([sys.executable, "-c", RUN, folder], stderr=subprocess.PIPE) for folder in copies]
    told = [run.communicate()[1].decode() for run in runs]
    assert [(run.returncode, text) for run, text in zip(runs, told, strict=True)] == [(0, "")] * AT_ONCE
    assert not any(path.is_dir() for path in (tmp_path / paths.UNFINISHED_TRAININGS).iterdir())
