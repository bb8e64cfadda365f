"""A stage as a task: what may pass is tried again, what may not is not, and what takes too long is asked to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fadeformer.errors import PassingError
from fadeformer.files import write_json
from pipelines import reproducing
from pipelines.places import COPY
from pipelines.reproducing import reproduce
from tests.conftest import ROOT

STAGES = """
stages:
  down: {cmd: "echo 'down: no server answers'; exit 75"}
  shut: {cmd: "echo 'shut: the data gate is shut'; exit 1"}
  later: {cmd: "if [ -e once ]; then echo later; else touch once; exit 75; fi"}
  talks: {cmd: "python talks.py"}
  long: {cmd: "trap 'echo kept > checkpoint; exit 143' TERM; sleep 60 & wait"}
"""
# Ends well only if what it printed is seen before it ends.
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
    print(reproduce.with_options(retry_delay_seconds=0)("{stage}", return_state=True).type.value, flush=True)

once()
"""
PROMOTE = """
from pipelines import flows

try:
    with flows._alone():
        print("it promotes")
except flows.UserError as error:
    print(error)
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with five stages, in which the test works."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(code: str, server: str) -> str:
    """What a program prints that has a Prefect server; not this process, whose threads later tests would fork."""
    environment = {**os.environ, "PREFECT_API_URL": server, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.usefixtures("stages")
def test_what_does_not_answer_may_pass_and_what_is_wrong_does_not():
    with pytest.raises(PassingError, match=r"down: no server answers$"):
        reproduce.fn("down")
    with pytest.raises(RuntimeError, match=r"stage shut failed: shut: the data gate is shut$"):
        reproduce.fn("shut")


def test_a_remote_of_results_that_does_not_answer_may_pass(stages, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    for command in (
        ("add", "--default", "results", "s3://bucket/dvc"), ("modify", "results", "endpointurl", "http://127.0.0.1:9"),
    ):  # fmt: skip
        subprocess.run(["dvc", "remote", *command], check=True)
    write_json(stages / COPY, {"repository": "", "revision": ""})
    with pytest.raises(PassingError, match="Could not connect"):
        reproduce.fn("later")
    assert not (stages / "once").exists()


@pytest.mark.parametrize(("stage", "ended", "starts"), [("later", "COMPLETED", 2), ("shut", "FAILED", 1)])
def test_it_is_tried_again_only_where_that_makes_sense(stages, prefect_server, stage, ended, starts):
    output = printed(IN_A_FLOW.format(stage=stage), prefect_server)
    assert output.splitlines()[-1] == ended
    assert output.count(f"Running stage '{stage}'") == starts


def test_after_its_hours_a_stage_is_asked_to_end(stages):
    with pytest.raises(RuntimeError, match="had not ended after"):
        reproduce.fn("long", hours=3 / 3600)
    assert (stages / "checkpoint").read_text() == "kept\n"


def test_what_a_stage_prints_is_told_while_it_runs(stages, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    told = []

    def tell(line: str) -> None:
        told.append(line)
        if line == "epoch 1":
            (stages / "seen").touch()

    monkeypatch.setattr(reproducing, "print", tell, raising=False)
    reproduce.fn("talks")
    assert told[0].startswith("Running stage 'talks'")
    assert "epoch 1" in told


def test_a_server_without_the_limit_of_promotions_is_told(prefect_server):
    assert "`make deploy` makes it" in printed(PROMOTE, prefect_server)
