"""Runners: overrides passed to `dvc exp run --temp`, status of runs, and runs on a Prefect server."""

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
def test_dvc_writes_run_params_to_params_yaml(tmp_path, changes):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    base = schema.load_params(path).as_nested_dict()
    target = schema.load_params(path).as_nested_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        target[section][name] = value
    differences = list(runners.diff_params(base, target))
    assert dict(differences) == changes
    apply_overrides(path, [f"{key}={runners.hydra_literal(value)}" for key, value in differences])
    assert schema.load_params(path).as_nested_dict() == schema.parse_params(target, "params.yaml").as_nested_dict()
    restored = runners.diff_params(target, base)
    apply_overrides(path, [f"{key}={runners.hydra_literal(value)}" for key, value in restored])
    assert schema.load_params(path).as_nested_dict()["model"] == base["model"]


@given(st.lists(values, max_size=4))
def test_dvc_reads_back_any_value(tmp_path_factory, listed):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text("a: null\n")
    apply_overrides(path, [f"a={runners.hydra_literal(listed)}"])
    assert schema.read_yaml(path) == {"a": listed}


def test_strings_that_dvc_would_change_are_rejected():
    for value in ("a\\b", "${HOME}", ["a", "\\"]):
        with pytest.raises(UserError, match="cannot be passed to DVC"):
            runners.hydra_literal(value)


def test_lock_is_held_until_child_processes_exit(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.invalid")
    monkeypatch.setattr(runners.server, "temporary_server", nullcontext)
    with runners.open_runner(tmp_path / "rates"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(TransientError, match="another command for rates, or a run that it started, is still active"):
        runners.open_runner(tmp_path / "rates").__enter__()
    child.communicate()
    with runners.open_runner(tmp_path / "rates") as runner:
        assert isinstance(runner, runners.PrefectRunner)


@pytest.fixture
def runner(tmp_path, monkeypatch) -> runners.DvcRunner:
    """A runner whose runs are a program that runs until it is interrupted, as DVC does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    runner = runners.DvcRunner(tmp_path / "logs")
    popen = subprocess.Popen

    def start(command, **options):
        code = "import time\nprint('ready')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(1)"
        return popen([sys.executable, "-c", code], **options)

    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(runners.subprocess, "Popen", start)
    return runner


def test_stopped_run_differs_from_failed_run(interruptible, runner, config):
    params = config.as_nested_dict()
    first, second = PipelineRun("first", params, "train"), PipelineRun("second", params, "train")
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


def test_untracked_inputs_are_listed(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    params = config.as_nested_dict()
    assert runners.untracked_inputs(params) == []
    (tmp_path / "scans").mkdir()
    (tmp_path / "dataset.lock").touch()
    params["dataset"] |= {"name": "folder", "root": "scans"}
    assert runners.untracked_inputs(params) == ["scans", "dataset.lock"]


@pytest.fixture
def deployment(prefect_server):
    """Name of a deployment without a worker."""
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        with get_client(sync_client=True) as client:
            client.create_deployment(
                client.create_flow_from_name("experiment"), name="run", enforce_parameter_schema=False
            )
        yield "experiment/run"


def test_unfinished_run_on_server_is_reused(deployment, config):
    run = PipelineRun("one", config.as_nested_dict())
    runner = runners.PrefectRunner(deployment, runners.flow_parameters)
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


def test_idempotency_key_starts_run_once(deployment, config):
    run, ids = PipelineRun("two", config.as_nested_dict()), []
    for key in ("grid", "grid", "other"):
        runner = runners.PrefectRunner(deployment, runners.flow_parameters, key)
        runner.start(run)
        ids.append(runner.flow_run_ids["two"])
        runner.stop([run])
    assert ids[0] == ids[1] != ids[2]


def test_missing_deployment_or_server_is_reported(deployment, config):
    run = PipelineRun("three", config.as_nested_dict())
    with pytest.raises(UserError, match="no such run or deployment; run `make deploy`"):
        runners.PrefectRunner("experiment/none", runners.flow_parameters).start(run)
    unreachable = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0})
    with unreachable, pytest.raises(TransientError, match="its runs continue"):
        runners.PrefectRunner(deployment, runners.flow_parameters).start(run)
