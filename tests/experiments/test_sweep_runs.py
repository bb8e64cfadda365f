"""MLflow runs of a sweep: one parent run, and one child run per trial."""

import pandas as pd
import pytest
from mlflow import MlflowClient

from pipelines.experiments import sweep_runs
from pipelines.tracking import runs, store

pytestmark = pytest.mark.usefixtures("own_store")
SPACE = {"space.train.learning_rate": "low=0.001 high=0.1"}


def test_sweep_has_one_run_per_study():
    first = sweep_runs.start_sweep_run("rates", "one", SPACE)
    assert sweep_runs.start_sweep_run("rates", "one", SPACE) == first
    assert sweep_runs.start_sweep_run("rates", "two", SPACE) != first
    assert MlflowClient().get_run(first).info.status == "RUNNING"
    sweep_runs.finish_sweep_run(first, "val_auc", 0.75, {"train.learning_rate": 0.01}, pd.DataFrame({"number": [0, 1]}))
    run = MlflowClient().get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params == SPACE
    assert run.data.metrics == {"best.val_auc": 0.75}
    assert run.data.tags["best.train.learning_rate"] == "0.01"
    assert [file.path for file in MlflowClient().list_artifacts(first)] == ["trials.csv"]


def test_trial_history_comes_from_its_child_run():
    sweep, client = sweep_runs.start_sweep_run("fresh", "four", SPACE), MlflowClient()
    assert sweep_runs.trial_metric_history(sweep, 0, "val_auc") == {}
    tags = {"mlflow.parentRunId": sweep, runs.TRIAL_TAG: "0"}
    run_id = client.create_run(store.connect(), tags=tags).info.run_id
    for epoch, value in ((1, 0.5), (2, 0.75)):
        client.log_metric(run_id, "val_auc", value, step=epoch)
    assert sweep_runs.trial_metric_history(sweep, 0, "val_auc") == {1: 0.5, 2: 0.75}
    assert sweep_runs.trial_metric_history(sweep, 1, "val_auc") == {}


def test_no_tag_contains_the_repository_url(monkeypatch, tmp_path):
    repository = {"mlflow.source.git.repoURL": str(tmp_path)}
    monkeypatch.setattr(runs, "resolve_tags", lambda tags: {**tags, **repository})
    assert runs.add_mlflow_tags({"a": "b"}) == {"a": "b"}
