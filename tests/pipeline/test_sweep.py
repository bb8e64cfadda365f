"""`fadeformer sweep` without servers: interrupted, resumed, and its best trial evaluated."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from fadeformer.config import schema
from pipelines.cli import main
from tests.conftest import Project, stages_run
from tests.pipeline.cluster import wait_until

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1200)]
RATES = """\
trials: 2
sampler: random
startup_trials: 1
warmup_epochs: 1
seed: 2
fixed: {train.epochs: 24, train.early_stopping_patience: 24, train.monitor: auc}
space:
  train.learning_rate: [0.003, 1.0e-9]
"""


@pytest.fixture(scope="module")
def swept(interruptible: None, reproduced: Project) -> str:
    """Output of a sweep that was interrupted in its first trial and started again."""
    project = reproduced
    (project.folder / "rates.yaml").write_text(RATES)
    shutil.copy(project.folder / "params.yaml", project.folder / "small.yaml")
    command = ["fadeformer", "sweep", "rates.yaml"]
    with subprocess.Popen(command, cwd=project.folder, env=project.environment, stdout=subprocess.PIPE) as process:
        wait_until(lambda: "epoch   3/24" in logs(project), 300)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 128 + signal.SIGINT
    assert not processes_in(project.folder)  # DVC and the stage
    assert "epoch  24/24" not in logs(project)
    return project.run(*command)


def logs(project: Project) -> str:
    """Output of all trials."""
    files = sorted((project.folder / ".cache" / "sweeps" / "rates").glob("*.log"))
    return "".join(file.read_text() for file in files)


def processes_in(folder: Path) -> list[str]:
    """Commands of processes with a working directory in a folder."""
    commands = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                commands.append(" ".join(process.cmdline()))
    return commands


@pytest.fixture(scope="module")
def runs(project: Project, swept: str) -> dict[str, Run]:
    """MLflow runs of the sweep by name."""
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    all_runs = client.search_runs([client.get_experiment_by_name("fadeformer").experiment_id])
    return {run.info.run_name: run for run in all_runs if run.info.run_name.startswith("rates")}


def test_sweep_is_resumed_and_prunes_trials(project, swept):
    lines = swept.splitlines()
    assert lines[0] == "rates: 0 trials are finished, 1 are resumed"
    assert re.match(r"trial 0: 0\.\d{4}, the best so far", lines[1])
    assert lines[2] == "trial 1: train.learning_rate=0.003 was tried before and is not run again"
    assert lines[3] == "trial 2: train.learning_rate=1e-09"
    assert re.match(r"trial 2: pruned at epoch \d+, worse than the median of the other trials", lines[4])
    assert re.match(r"sweep: 1 of 2 trials completed, 1 were pruned; test data were not used", lines[5])
    assert len(lines) == 7
    assert "resuming the unfinished training" in logs(project)
    (log,) = (project.folder / ".cache/sweeps/rates").glob("rates-000-*")
    assert "epoch   2/24" not in log.read_text()
    assert "epoch  24/24" in log.read_text()
    assert not processes_in(project.folder)
    assert not list((project.folder / ".dvc/tmp/exps/standalone").glob("tmp*"))
    assert project.run("git", "stash", "list") == ""


def test_trials_are_child_runs_of_the_sweep(runs, swept):
    by_name = {name.rpartition("-")[0] or name: run for name, run in runs.items()}
    assert {*by_name} == {"rates", "rates-000", "rates-002"}
    sweep, *trials = [by_name[name] for name in sorted(by_name)]
    for trial in trials:
        assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert [trial.data.tags["fadeformer.trial"] for trial in trials] == ["0", "2"]
    assert [trial.info.status for trial in trials] == ["FINISHED", "KILLED"]
    value = float(re.search(r"trial 0: (\S+),", swept)[1])
    assert sweep.data.metrics["best.val_auc"] == pytest.approx(value, abs=1e-4)
    assert sweep.data.tags["best.train.learning_rate"] == "0.003"
    assert sweep.info.status == "FINISHED"


def test_sweep_run_has_a_table_of_trials(project, runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.folder}/mlruns/mlflow.db")
        table = mlflow.artifacts.load_text(f"{runs['rates'].info.artifact_uri}/trials.csv").splitlines()
    assert len(table) == 4
    assert "params_train.learning_rate" in table[0]


def test_best_trial_is_evaluated_without_training(project, swept, shared_server):
    command = swept.splitlines()[-1]
    assert command.startswith("dvc exp run --set-param=")
    assert stages_run(project.run(*shlex.split(command))) == ["evaluate", "promote"]
    params, small = (schema.load_params(project.folder / file).as_flat_dict() for file in ("params.yaml", "small.yaml"))
    changed = {key: value for key, value in params.items() if small[key] != value}
    assert changed == {
        "train.epochs": 24,
        "train.early_stopping_patience": 24,
        "train.monitor": "auc",
        "train.learning_rate": 0.003,
    }
    assert len((project.folder / "models/history.csv").read_text().splitlines()) == 25
    assert json.loads((project.folder / "reports/promotion.json").read_text())["version"] == "2"


def test_changed_space_is_rejected(project, swept, prefect_server, monkeypatch, capfd):
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)  # otherwise the command starts a server
    shutil.copy(project.folder / "small.yaml", project.folder / "params.yaml")
    (project.folder / "rates.yaml").write_text(RATES.replace("1.0e-9", "1.0e-8"))
    with pytest.raises(SystemExit) as error:
        main.main(["sweep", "rates.yaml"])
    assert error.value.code == 1
    output = capfd.readouterr().err
    assert "the sweep rates was started with another space; give this one another name:" in output
    assert "Traceback" not in output
