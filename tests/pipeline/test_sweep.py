"""`fadeformer sweep` on a machine with nothing but this project: killed, gone on with, and its best judged."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import Project, ran
from tests.pipeline.test_deployment import commit_of, soon

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1200)]
RATES = """\
trials: 2
sampler: random
startup_trials: 1
warmup_epochs: 1
seed: 2
fixed: {train.epochs: 40, train.early_stopping_patience: 40, train.monitor: auc}
space:
  train.learning_rate: [0.003, 1.0e-9]
"""


@pytest.fixture(scope="module")
def swept(project: Project) -> str:
    """What a sweep has printed that was killed in its first trial and begun again."""
    (project.folder / "rates.yaml").write_text(RATES)
    command, log = ["fadeformer", "sweep", "rates.yaml"], project.folder / ".prefect" / "worker.log"
    with subprocess.Popen(command, cwd=project.folder, env=project.environment, stdout=subprocess.PIPE) as process:
        soon(lambda: log.is_file() and "epoch   3/40" in log.read_text(), 300)
        os.kill(process.pid, signal.SIGKILL)
    soon(lambda: not below(project.folder))  # the worker, its run, DVC and the stage
    return project.run(*command)


def below(folder: Path) -> list[str]:
    """What runs in a folder or in one below it, but for this process."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture(scope="module")
def runs(project: Project, swept: str) -> dict[str, Run]:
    """MLflow's runs by name."""
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("fadeformer").experiment_id])
    return {run.info.run_name: run for run in found}


def test_it_goes_on_where_it_was_killed_and_stops_what_is_worse(project, swept):
    lines = swept.splitlines()
    assert lines[0] == "rates: 0 trials have ended, 1 go on"
    assert re.match(r"trial 0: 0\.\d{4}, the best so far", lines[1])
    assert lines[2] == "trial 1: train.learning_rate=0.003 as trial 0, which is not run again"
    assert lines[3] == "trial 2: train.learning_rate=1e-09"
    assert re.match(r"trial 2: stopped at epoch \d+, worse than the median of the others", lines[4])
    assert re.match(r"sweep: 1 of 2 trials ran to their end, 1 were stopped early; no image of test", lines[5])
    assert len(lines) == 6
    printed = (project.folder / ".prefect" / "worker.log").read_text()
    assert "going on with the training that was begun" in printed
    assert printed.count("epoch   2/40") == 2  # once of each trial that was trained
    assert not below(project.folder)


def test_trials_are_runs_below_that_of_the_sweep(runs, swept):
    assert {*runs} == {"rates", "rates-000", "rates-002"}
    sweep, *trials = [runs[name] for name in sorted(runs)]
    for trial in trials:
        assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert [trial.data.tags["fadeformer.trial"] for trial in trials] == ["0", "2"]
    assert [trial.info.status for trial in trials] == ["FINISHED", "KILLED"]
    value = float(re.search(r"trial 0: (\S+),", swept)[1])
    assert sweep.data.metrics["best.val_auc"] == pytest.approx(value, abs=1e-4)
    assert sweep.data.tags["best.train.learning_rate"] == "0.003"
    assert sweep.info.status == "FINISHED"


def test_the_table_of_all_trials_lies_in_the_run_of_the_sweep(project, runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project.folder}/mlruns/mlflow.db")
        table = mlflow.artifacts.load_text(f"{runs['rates'].info.artifact_uri}/trials.csv").splitlines()
    assert len(table) == 4
    assert "params_train.learning_rate" in table[0]


def test_each_trial_that_ran_to_its_end_is_an_experiment(project, swept):
    (name,) = project.run("dvc", "exp", "list", "--name-only").split()
    assert name.startswith("rates-000-")
    changed = project.run("git", "diff", "--unified=0", f"main..{commit_of(project, name)}", "--", "params.yaml")
    keys = re.findall(r"^\+ +(\w+):", changed, flags=re.MULTILINE)
    assert keys == ["epochs", "learning_rate", "monitor", "early_stopping_patience"]
    assert len(project.run("git", "show", f"{commit_of(project, name)}:models/history.csv").splitlines()) == 41


def test_the_best_is_judged_without_another_training(project, swept):
    assert "`fadeformer sweep rates.yaml --apply` writes it into params.yaml" in swept
    project.run("fadeformer", "sweep", "rates.yaml", "--apply")
    output = project.run("dvc", "repro")
    assert ran(output) == ["validate", "evaluate", "promote"]  # DVC keeps no run of a stage whose outs persist
    assert json.loads((project.folder / "reports/promotion.json").read_text())["version"] == "1"


def test_the_same_file_with_other_values_is_refused(project, swept):
    (project.folder / "rates.yaml").write_text(RATES.replace("1.0e-9", "1.0e-8"))
    output = project.run("fadeformer", "sweep", "rates.yaml", check=False)
    assert project.code == 1
    assert "the sweep rates was begun with another space; give this one another name:" in output
    assert "Traceback" not in output
