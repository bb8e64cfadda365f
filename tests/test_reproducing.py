"""A stage as a task: what may pass is tried again, what may not is not, and what takes too long is asked to end."""

import subprocess
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from fadeformer.errors import PassingError, UserError
from pipelines import flows
from pipelines.reproducing import reproduce

STAGES = """
stages:
  down: {cmd: "echo 'down: no server answers'; exit 75"}
  shut: {cmd: "echo 'shut: the data gate is shut'; exit 1"}
  later: {cmd: "if [ -e once ]; then echo later; else touch once; exit 75; fi"}
  long: {cmd: "trap 'echo kept > checkpoint; exit 143' TERM; sleep 60 & wait"}
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four stages, in which the test works."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def end(stage: str, server: str) -> str:
    """State in which the task ends in a flow, without pauses."""

    @flow(persist_result=False)
    def once() -> str:
        return reproduce.with_options(retry_delay_seconds=0)(stage, return_state=True).type.value

    with temporary_settings({PREFECT_API_URL: server}):
        return once()


@pytest.mark.usefixtures("stages")
def test_what_does_not_answer_may_pass_and_what_is_wrong_does_not():
    with pytest.raises(PassingError, match=r"down: no server answers$"):
        reproduce.fn("down")
    with pytest.raises(RuntimeError, match=r"stage shut failed: shut: the data gate is shut$"):
        reproduce.fn("shut")


@pytest.mark.parametrize(("stage", "ended", "starts"), [("later", "COMPLETED", 2), ("shut", "FAILED", 1)])
def test_it_is_tried_again_only_where_that_makes_sense(stages, prefect_server, capfd, stage, ended, starts):
    assert end(stage, prefect_server) == ended
    assert capfd.readouterr().out.count(f"Running stage '{stage}'") == starts


def test_after_its_hours_a_stage_is_asked_to_end(stages):
    with pytest.raises(RuntimeError, match="had not ended after"):
        reproduce.fn("long", hours=3 / 3600)
    assert (stages / "checkpoint").read_text() == "kept\n"


def test_a_server_without_the_limit_of_promotions_is_told(prefect_server):
    with (
        temporary_settings({PREFECT_API_URL: prefect_server}),
        pytest.raises(UserError, match="`make deploy` makes it"),
        flows._alone(),
    ):
        pytest.fail("it promotes")
