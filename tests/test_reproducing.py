"""A stage as a task: a failed one is repeated once, and one that takes too long or is cancelled is asked to stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import reproducing
from pipelines.reproducing import reproduce
from tests.conftest import ROOT

STAGES = """
stages:
  shut: {cmd: "echo 'shut: the data gate is shut'; exit 1"}
  later: {cmd: "if [ -e once ]; then echo later; else touch once; exit 75; fi"}
  talks: {cmd: "python talks.py"}
  long: {cmd: "trap 'echo kept > checkpoint; exit 143' TERM; sleep 60 & wait"}
"""
# Succeeds only if its output is read before it exits.
TALKS = """
import sys, time
from pathlib import Path
print("epoch 1")
deadline = time.monotonic() + 60
while not Path("seen").exists():
    if time.monotonic() > deadline:
        sys.exit("nobody saw it")
    time.sleep(0.05)
"""
IN_A_FLOW = """
from prefect import flow
from pipelines.reproducing import reproduce

@flow(persist_result=False)
def once():
    for stage, seconds in (("later", None), ("shut", None), ("long", 5)):
        task = reproduce.with_options(retry_delay_seconds=0, timeout_seconds=seconds)
        print("STATE", stage, task(stage, return_state=True).name, flush=True)

once()
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four stages, in which the test works."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("stages")
def test_a_failure_names_the_stage_and_its_last_lines():
    with pytest.raises(RuntimeError, match=r"^stage shut failed:\n(.*\n)*shut: the data gate is shut\n"):
        reproduce.fn("shut")


def test_a_failed_stage_is_repeated_once_and_one_that_takes_too_long_is_not(stages, prefect_server):
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # not in this process, whose threads later tests would fork
        [sys.executable, "-c", IN_A_FLOW], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout
    states = [line for line in output.splitlines() if line.startswith("STATE")]
    assert states == ["STATE later Completed", "STATE shut Failed", "STATE long TimedOut"]
    assert [output.count(f"Running stage '{stage}'") for stage in ("later", "shut", "long")] == [2, 2, 1]
    assert (stages / "checkpoint").read_text() == "kept\n"


def test_the_output_of_a_stage_is_printed_while_it_runs(stages, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lines = []

    def see(line: str) -> None:
        lines.append(line)
        if line == "epoch 1":
            (stages / "seen").touch()

    monkeypatch.setattr(reproducing, "print", see, raising=False)
    reproduce.fn("talks")
    assert lines[0].startswith("Running stage 'talks'")
    assert "epoch 1" in lines
