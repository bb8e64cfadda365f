"""The Prefect task of a stage: retries of transient failures, timeouts, and output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fadeformer.errors import UserError
from pipelines.orchestration import dvc_task
from pipelines.orchestration.dvc_task import reproduce
from tests.conftest import ROOT

STAGES = """
stages:
  invalid: {cmd: "python fails.py UserError"}
  transient: {cmd: "if [ -e once ]; then echo success; else touch once; python fails.py TransientError; fi"}
  killed: {cmd: "kill -9 $$"}
  prints: {cmd: "python prints.py"}
  slow: {cmd: "trap 'echo saved > checkpoint; exit 143' TERM; sleep 60 & wait"}
"""
FAILS = """
import sys
from fadeformer import errors
from pipelines import runner

def main() -> str:
    raise getattr(errors, sys.argv[1])("data validation failed")

runner.run("validate", main)
"""
# Succeeds only if its output is read before it exits.
PRINTS = """
import sys, time
from pathlib import Path
print("epoch 1")
deadline = time.monotonic() + 60
while not Path("received").exists():
    if time.monotonic() > deadline:
        sys.exit("no output was received")
    time.sleep(0.05)
"""
IN_A_FLOW = """
from prefect import flow
from pipelines.orchestration.dvc_task import reproduce

@flow(persist_result=False)
def once():
    for stage, seconds in (("transient", None), ("invalid", None), ("killed", None), ("slow", 5)):
        task = reproduce.with_options(retry_delay_seconds=0, timeout_seconds=seconds)
        print("STATE", stage, task(stage, return_state=True).name, flush=True)

once()
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some stages, which is the current directory."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "prints.py").write_text(PRINTS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("stages")
def test_failure_contains_the_last_lines_of_output():
    with pytest.raises(UserError, match=r"^stage invalid failed:\n(.*\n)*validate: data validation failed\n"):
        reproduce.fn("invalid")


def test_only_transient_failures_are_retried(stages, prefect_server):
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    process = subprocess.run(  # in a new process, because later tests fork and Prefect starts threads
        [sys.executable, "-c", IN_A_FLOW], env=environment, capture_output=True, text=True, check=False
    )
    output = process.stdout
    states = [line for line in output.splitlines() if line.startswith("STATE")]
    assert states == [
        "STATE transient Completed", "STATE invalid Failed", "STATE killed Failed", "STATE slow TimedOut",
    ]  # fmt: skip
    names = ("transient", "invalid", "killed", "slow")
    assert [output.count(f"Running stage '{name}'") for name in names] == [2, 1, 2, 1]
    assert (stages / "checkpoint").read_text() == "saved\n"


def test_output_is_printed_while_the_stage_runs(stages, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lines = []

    def receive(line: str) -> None:
        lines.append(line)
        if line == "epoch 1":
            (stages / "received").touch()

    monkeypatch.setattr(dvc_task, "print", receive, raising=False)
    reproduce.fn("prints")
    assert lines[0].startswith("Running stage 'prints'")
    assert "epoch 1" in lines
