"""Runs by `dvc exp run --temp`: what it is told of params.yaml, and how a run ends."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given
from hypothesis import strategies as st

from fadeformer import params
from pipelines.experiments import runners
from pipelines.experiments.engine import Run, State
from tests.conftest import ROOT

text = st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="$"), max_size=12)
values = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6).map(float) | text


@pytest.mark.parametrize(
    "changes",
    [
        {"train.learning_rate": 1e-9, "train.calibrate": False, "train.clip": 1.0, "train.monitor": "auc"},
        {"model.fade": None, "train.class_weights": {"nevus": 2.0, "melanoma": 1.0}},
        {"dataset.mirror": "/a b/it's=\\,{1}", "dataset.classes": ["x y", "z"], "augment.erasing_scale": [0.1, 0.2]},
    ],
)
def test_dvc_writes_the_values_of_a_run_into_params_yaml(tmp_path, changes):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    present = params.load(path).nested()
    target = params.load(path).nested()
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = target
        for section in sections:
            place = place[section]
        place[name] = value
    found = list(runners.differences(present, target))
    assert dict(found) == changes
    apply_overrides(path, [f"{key}={runners.literal(value)}" for key, value in found])
    assert params.load(path).nested() == params.parse(target, "it").nested()
    apply_overrides(path, [f"{key}={runners.literal(value)}" for key, value in runners.differences(target, present)])
    assert params.load(path).nested()["model"] == present["model"]


@given(st.lists(values, max_size=4))
def test_dvc_reads_any_value_as_it_was_written(tmp_path_factory, listed):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text("a: null\n")
    apply_overrides(path, [f"a={runners.literal(listed)}"])
    assert params.read(path) == {"a": listed}


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("epoch 1\n\ntrain: a: not found\nERROR: failed to reproduce 'train': x\n", "train: a: not found"),
        ("ERROR: Failed to parse params.yaml\n", "ERROR: Failed to parse params.yaml"),
        ("", "exit status 3, and nothing was printed"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_what_the_stage_printed_last(printed, told):
    assert runners.reason(printed, 3) == told


@pytest.fixture
def runner(tmp_path, monkeypatch) -> runners.DvcRunner:
    """Whose runs are a program that goes on until it is interrupted, as DVC does."""
    monkeypatch.chdir(tmp_path)
    runner = runners.DvcRunner(tmp_path / "logs")
    started = subprocess.Popen

    def begin(command, **options):
        code = "import time\nprint('ready')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(1)"
        return started([sys.executable, "-c", code], **options)

    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(runners.subprocess, "Popen", begin)
    return runner


def test_a_run_that_is_stopped_is_no_failure_and_leaves_no_process(runner, wanted):
    first, second = Run("first", wanted.nested(), "train"), Run("second", wanted.nested(), "train")
    for run in (first, second):
        runner.start(run)
        while "ready" not in (runner.logs / f"{run.name}.log").read_text():
            time.sleep(0.05)
    assert runner.status(first).state is State.RUNNING
    runner.stop([first])
    while runner.status(first).state is State.RUNNING:
        time.sleep(0.05)
    assert runner.status(first).state is State.STOPPED
    runner._signal(runner._processes["second"], signal.SIGKILL)
    runner.wait()
    failed = runner.status(second)
    assert failed.state is State.FAILED
    assert failed.message == f"ready; the log is {runner.logs / 'second.log'}"


def test_a_users_own_files_that_git_does_not_have_are_copied(tmp_path, monkeypatch, wanted):
    monkeypatch.chdir(tmp_path)
    own = wanted.nested()
    assert runners.untracked(own) == []
    (tmp_path / "scans").mkdir()
    (tmp_path / "dataset.lock").touch()
    own["dataset"] |= {"name": "folder", "root": "scans"}
    assert runners.untracked(own) == ["scans", "dataset.lock"]
