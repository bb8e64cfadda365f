"""The process beside a stage's own: it answers, raises what its functions raise, and never outlives the stage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fadeformer.errors import UserError
from pipelines import beside

ROOT = Path(__file__).parents[1]


@pytest.fixture
def working(monkeypatch):
    """A process that has this module loaded."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield beside.start(__name__)
    beside.give_up()


def sums(one: int, other: int) -> int:
    return one + other


def stumbles(message: str) -> None:
    raise UserError(message)


def breaks() -> None:
    raise ZeroDivisionError("no such number")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def waits(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_functions_are_asked_for_by_name_one_after_the_other(working):
    assert beside.start(__name__) is working
    working.begin("sums", 1, 2)
    working.begin("sums", 3, 4)
    assert (working.result(), working.result()) == (3, 7)
    assert working.call("waits", 0) != os.getpid()


def test_an_error_is_raised_here_and_the_process_goes_on(working):
    with pytest.raises(UserError, match="is no image"):
        working.call("stumbles", "a.png: is no image")
    with pytest.raises(ZeroDivisionError) as error:
        working.call("breaks")
    assert "in breaks" in error.value.__notes__[0]  # where it happened
    assert working.call("sums", 1, 1) == 2


def test_a_process_that_is_killed_is_told_of_with_what_it_may_mean(working):
    with pytest.raises(UserError, match=r"tests\.test_beside ended with status -9; .*memory ran out"):
        working.call("dies")


def test_signals_are_left_to_the_stage(working):
    number = working.call("waits", 0)
    for sent in (signal.SIGINT, signal.SIGTERM):
        os.kill(number, sent)
    assert working.call("sums", 2, 2) == 4


def test_giving_up_ends_it_whatever_it_does(working):
    number = working.call("waits", 0)
    working.begin("waits", 600)
    beside.give_up()
    assert not psutil.pid_exists(number)


def test_it_ends_when_the_stage_is_killed(tmp_path):
    program = (
        f"import os, signal\nfrom pipelines import beside\nif __name__ == '__main__':\n"
        f"    process = beside.start('{__name__}')\n    print(process.call('waits', 0), flush=True)\n"
        "    process.begin('waits', 600)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "stage.py").write_text(program)
    command = [sys.executable, str(tmp_path / "stage.py")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    number, deadline = int(done.stdout), time.monotonic() + 30
    assert done.returncode == -signal.SIGKILL
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
