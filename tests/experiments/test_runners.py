"""Runs by `dvc exp run --temp`: what it is told of params.yaml, and how a run ends."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from fadeformer.config import schema
from fadeformer.errors import TransientError, UserError
from pipelines.experiments import runners
from pipelines.experiments.engine import PipelineRun
from tests.conftest import ROOT

text = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters='$\\"'), max_size=12)
values = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | text


@pytest.mark.parametrize(
    "changes",
    [
        {"train.learning_rate": 1e-9, "train.calibrate": False, "train.clip": 1.0, "train.monitor": "auc"},
        {"model.fade": None, "train.class_weights": {"nevus": 2.0, "melanoma": 1.0}},
        {"dataset.mirror": "/a b/it's=,{1}", "dataset.classes": ["x y", "z"], "augment.erasing_scale": [0.1, 0.2]},
    ],
)
def test_dvc_writes_the_values_of_a_run_into_params_yaml(tmp_path, changes):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    present = schema.load_params(path).as_nested_dict()
    target = schema.load_params(path).as_nested_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        target[section][name] = value
    found = list(runners.diff_params(present, target))
    assert dict(found) == changes
    apply_overrides(path, [f"{key}={runners.hydra_literal(value)}" for key, value in found])
    assert schema.load_params(path).as_nested_dict() == schema.parse_params(target, "it").as_nested_dict()
    apply_overrides(
        path, [f"{key}={runners.hydra_literal(value)}" for key, value in runners.diff_params(target, present)]
    )
    assert schema.load_params(path).as_nested_dict()["model"] == present["model"]


@given(st.lists(values, max_size=4))
def test_dvc_reads_any_value_as_it_was_written(tmp_path_factory, listed):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text("a: null\n")
    apply_overrides(path, [f"a={runners.hydra_literal(listed)}"])
    assert schema.read_yaml(path) == {"a": listed}


def test_a_text_that_dvc_would_change_is_refused():
    for value in ("a\\b", "${HOME}", ["a", "\\"]):
        with pytest.raises(UserError, match="cannot be passed to DVC"):
            runners.hydra_literal(value)


def test_runs_that_a_killed_command_left_keep_the_next_one_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://there")
    monkeypatch.setattr(runners.server, "temporary_server", nullcontext)
    with runners.open_runner(tmp_path / "rates"):
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(TransientError, match="works on rates, or runs that it started go on"):
        runners.open_runner(tmp_path / "rates").__enter__()
    left.communicate()
    with runners.open_runner(tmp_path / "rates") as runner:
        assert isinstance(runner, runners.PrefectRunner)


@pytest.fixture
def runner(tmp_path, monkeypatch) -> runners.DvcRunner:
    """Whose runs are a program that goes on until it is interrupted, as DVC does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    runner = runners.DvcRunner(tmp_path / "logs")
    started = subprocess.Popen

    def begin(command, **options):
        code = "import time\nprint('ready')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(1)"
        return started([sys.executable, "-c", code], **options)

    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(runners.subprocess, "Popen", begin)
    return runner


def test_a_run_that_is_stopped_is_no_failure_and_leaves_no_process(interruptible, runner, config):
    first, second = PipelineRun("first", config.nested(), "train"), PipelineRun("second", config.nested(), "train")
    for run in (first, second):
        runner.start(run)
        while "ready" not in (runner.logs / f"{run.name}.log").read_text():
            time.sleep(0.05)
    assert runner.status(first).state == "Running"
    runner.stop([first])
    while runner.status(first).state == "Running":
        time.sleep(0.05)
    assert runner.status(first).state == "Stopped"
    runners._send_signal(runner._processes["second"], signal.SIGKILL)
    runner.wait()
    failed = runner.status(second)
    assert failed.state == "Failed"
    assert failed.message == f"exit status -9; {runner.logs / 'second.log'} ends with:\nready"


def test_a_users_own_files_that_git_does_not_have_are_copied(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    own = config.nested()
    assert runners.untracked_inputs(own) == []
    (tmp_path / "scans").mkdir()
    (tmp_path / "dataset.lock").touch()
    own["dataset"] |= {"name": "folder", "root": "scans"}
    assert runners.untracked_inputs(own) == ["scans", "dataset.lock"]


@pytest.fixture
def deployment(prefect_server):
    """Name of a deployment that no worker serves."""
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        with get_client(sync_client=True) as client:
            client.create_deployment(
                client.create_flow_from_name("experiment"), name="run", enforce_parameter_schema=False
            )
        yield "experiment/run"


def test_a_run_on_a_server_is_found_again_until_it_has_ended(deployment, config):
    run, runner = PipelineRun("one", config.nested()), runners.PrefectRunner(deployment, runners.flow_parameters)
    runner.start(run)
    first = runner.flow_run_ids["one"]
    assert runner.status(run).state == "Running"
    runner.start(run)
    assert runner.flow_run_ids["one"] == first
    for _ in range(2):
        runner.stop([run])
        assert runner.status(run).state == "Stopped"
    runner.start(run)
    assert runner.flow_run_ids["one"] != first


def test_a_run_with_a_key_is_started_once(deployment, config):
    run, ids = PipelineRun("two", config.nested()), []
    for key in ("grid", "grid", "other"):
        runner = runners.PrefectRunner(deployment, runners.flow_parameters, key)
        runner.start(run)
        ids.append(runner.flow_run_ids["two"])
        runner.stop([run])
    assert ids[0] == ids[1] != ids[2]


def test_without_a_deployment_or_a_server_there_is_one_message(deployment, config):
    run = PipelineRun("three", config.nested())
    with pytest.raises(UserError, match="no such run or deployment; run `make deploy`"):
        runners.PrefectRunner("experiment/none", runners.flow_parameters).start(run)
    nowhere = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0})
    with nowhere, pytest.raises(TransientError, match="its runs"):
        runners.PrefectRunner(deployment, runners.flow_parameters).start(run)
