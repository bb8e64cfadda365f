"""MLflow's runs of a sweep: one for it, one below for each trial, also where DVC had the training already."""

import pandas as pd
import pytest
from mlflow import MlflowClient

from pipelines import store, tracking
from pipelines.experiments import sweep_runs

pytestmark = pytest.mark.usefixtures("own_store")
SPACE = {"space.train.learning_rate": "low=0.001 high=0.1"}


def trained(**tags: str) -> str:
    """A run with two epochs, as a training leaves it."""
    client, experiment = MlflowClient(), store.connect()
    run_id = client.create_run(experiment, tags=tags).info.run_id
    client.log_param(run_id, "train.epochs", "2")
    for epoch, value in ((1, 0.5), (2, 0.75)):
        client.log_metric(run_id, "val_auc", value, step=epoch)
    client.set_terminated(run_id)
    return run_id


def below(parent: str) -> list[str]:
    query = f"tags.mlflow.parentRunId = '{parent}'"
    return [run.info.run_id for run in MlflowClient().search_runs([store.connect()], query)]


def test_a_sweep_has_one_run_and_another_where_its_study_was_begun_anew():
    first = sweep_runs.begin("rates", "one", SPACE)
    assert sweep_runs.begin("rates", "one", SPACE) == first
    assert sweep_runs.begin("rates", "two", SPACE) != first
    assert MlflowClient().get_run(first).info.status == "RUNNING"
    sweep_runs.end(first, "val_auc", 0.75, {"train.learning_rate": 0.01}, pd.DataFrame({"number": [0, 1]}))
    run = MlflowClient().get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params == SPACE
    assert run.data.metrics == {"best.val_auc": 0.75}
    assert run.data.tags["best.train.learning_rate"] == "0.01"
    assert [file.path for file in MlflowClient().list_artifacts(first)] == ["trials.csv"]


def test_a_training_that_was_made_before_is_copied_once():
    sweep, before = sweep_runs.begin("cached", "three", SPACE), trained()
    assert sweep_runs.values(sweep, 4, "val_auc") == {}
    for _ in range(2):
        sweep_runs.nest(sweep, 4, "cached-004", before)
    (copy,) = below(sweep)
    assert copy != before
    run = MlflowClient().get_run(copy)
    assert run.data.tags[sweep_runs.SAME_AS] == before
    assert run.info.run_name == "cached-004"
    assert run.data.params == {"train.epochs": "2"}
    assert sweep_runs.values(sweep, 4, "val_auc") == {1: 0.5, 2: 0.75}


def test_a_training_of_the_trial_is_not_copied():
    sweep = sweep_runs.begin("fresh", "four", SPACE)
    own = trained(**{"mlflow.parentRunId": sweep, tracking.TRIAL: "0"})
    sweep_runs.nest(sweep, 0, "fresh-000", own)
    assert below(sweep) == [own]
    assert sweep_runs.values(sweep, 0, "val_auc") == {1: 0.5, 2: 0.75}


def test_no_tag_tells_where_the_repository_lies(monkeypatch, tmp_path):
    where = {"mlflow.source.git.repoURL": str(tmp_path)}
    monkeypatch.setattr(tracking, "resolve_tags", lambda tags: {**tags, **where})
    assert tracking.with_own({"a": "b"}) == {"a": "b"}
