"""A sweep's run in MLflow, and those of its trials below it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME

from pipelines.store import connect, told
from pipelines.tracking import SOURCE, TRIAL, log_points, open_run, with_own

SWEEP, SAME_AS = "fadeformer.sweep", "fadeformer.same_as"  # tags: the sweep's name; the run that a trial's is a copy of


@told()
def begin(name: str, identity: str, described: Mapping[str, str]) -> str:
    """The id of the one run of a sweep, which is made where there is none; raises Unreachable.

    Args:
        name: of the sweep.
        identity: of its study, which may have been removed and begun anew under the same name.
        described: the run's parameters.
    """
    tags = with_own({MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "fadeformer sweep"})
    run_id = open_run(connect(), identity, time.time_ns() // 10**6, tags)
    client = MlflowClient()
    client.log_batch(run_id, params=[Param(*item) for item in described.items()], tags=[RunTag(SWEEP, name)])
    client.update_run(run_id, "RUNNING")
    return run_id


@told()
def end(run_id: str, metric: str, best: float, params: Mapping[str, Any], trials: pd.DataFrame) -> None:
    """Leaves in a sweep's run its best trial and the table of all, and marks it as finished; raises Unreachable."""
    client = MlflowClient()
    client.log_metric(run_id, f"best.{metric}", best, step=len(trials))
    for key, value in params.items():
        client.set_tag(run_id, f"best.{key}", str(value))
    client.log_text(run_id, trials.to_csv(index=False), "trials.csv")
    client.set_terminated(run_id)


@told()
def values(parent: str, number: int, metric: str) -> dict[int, float]:
    """A metric of a trial by epoch, none while it has no run; raises Unreachable."""
    run = _trial_run(parent, number)
    points = MlflowClient().get_metric_history(run, metric) if run else []
    return {point.step: point.value for point in points}


@told()
def nest(parent: str, number: int, name: str, run_id: str) -> None:
    """Gives a trial an MLflow run if it has none: a copy of the run in which its model was trained before.

    DVC takes such a training from its cache, and its run may belong to another sweep or to none. Raises Unreachable.

    Args:
        parent: the sweep's run.
        number: of the trial.
        name: of its run.
        run_id: the run that its model names.
    """
    connect()
    if _trial_run(parent, number):
        return
    client = MlflowClient()
    same = client.get_run(run_id)
    tags = {
        SAME_AS: run_id, MLFLOW_RUN_NAME: name, MLFLOW_PARENT_RUN_ID: parent, TRIAL: str(number),
        MLFLOW_SOURCE_NAME: SOURCE,
    }  # fmt: skip
    copy = client.create_run(same.info.experiment_id, tags=with_own(tags)).info.run_id
    client.log_batch(copy, params=[Param(key, value) for key, value in same.data.params.items()])
    points = [point for metric in same.data.metrics for point in client.get_metric_history(run_id, metric)]
    log_points(copy, [(point.key, point.value, point.timestamp, point.step) for point in points])
    client.set_terminated(copy)


def _trial_run(parent: str, number: int) -> str | None:
    """The run of a trial, if it has one yet."""
    experiment = MlflowClient().get_run(parent).info.experiment_id
    wanted = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{TRIAL}` = '{number}'"
    found = MlflowClient().search_runs([experiment], wanted, order_by=["start_time"], max_results=1)
    return found[0].info.run_id if found else None
