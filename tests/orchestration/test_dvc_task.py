"""A stage as a task: a failure that may pass is repeated once; a stage that takes too long is asked to stop."""

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
  shut: {cmd: "python fails.py UserError"}
  later: {cmd: "if [ -e once ]; then echo later; else touch once; python fails.py TransientError; fi"}
  dies: {cmd: "kill -9 $$"}
  talks: {cmd: "python talks.py"}
  long: {cmd: "trap 'echo kept > checkpoint; exit 143' TERM; sleep 60 & wait"}
"""
FAILS = """
import sys
from fadeformer import errors
from pipelines import runner

def main() -> str:
    raise getattr(errors, sys.argv[1])("the data gate is shut")

runner.run("validate", main)
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
from pipelines.orchestration.dvc_task import reproduce

@flow(persist_result=False)
def once():
    for stage, seconds in (("later", None), ("shut", None), ("dies", None), ("long", 5)):
        task = reproduce.with_options(retry_delay_seconds=0, timeout_seconds=seconds)
        print("STATE", stage, task(stage, return_state=True).name, flush=True)

once()
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some stages, in which the test works."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("stages")
def test_a_failure_names_the_stage_and_its_last_lines():
    with pytest.raises(UserError, match=r"^stage shut failed:\n(.*\n)*validate: the data gate is shut\n"):
        reproduce.fn("shut")


def test_a_failure_is_repeated_once_unless_it_needs_a_person_or_took_too_long(stages, prefect_server):
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    done = subprocess.run(  # not in this process, whose threads later tests would fork
        [sys.executable, "-c", IN_A_FLOW], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout
    states = [line for line in output.splitlines() if line.startswith("STATE")]
    assert states == ["STATE later Completed", "STATE shut Failed", "STATE dies Failed", "STATE long TimedOut"]
    assert [output.count(f"Running stage '{stage}'") for stage in ("later", "shut", "dies", "long")] == [2, 1, 2, 1]
    assert (stages / "checkpoint").read_text() == "kept\n"


def test_the_output_of_a_stage_is_printed_while_it_runs(stages, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    lines = []

    def see(line: str) -> None:
        lines.append(line)
        if line == "epoch 1":
            (stages / "seen").touch()

    monkeypatch.setattr(dvc_task, "print", see, raising=False)
    reproduce.fn("talks")
    assert lines[0].startswith("Running stage 'talks'")
    assert "epoch 1" in lines
