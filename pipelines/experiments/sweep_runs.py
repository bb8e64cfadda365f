"""The MLflow run of a sweep, and the metrics of the trials, which are its child runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME

from pipelines.tracking.runs import TRIAL_TAG, add_mlflow_tags, escape_name, find_or_create_run
from pipelines.tracking.store import connect, translate_mlflow_errors

SWEEP_TAG = "fadeformer.sweep"  # MLflow tag with the name of the sweep


@translate_mlflow_errors()
def start_sweep_run(name: str, identity: str, params: Mapping[str, str]) -> str:
    """Return the ID of the sweep's run; create the run if it does not exist.

    Args:
        name: Name of the sweep.
        identity: Identity of its study; a study that was deleted and created again under this name has another one.
        params: Parameters of the run.

    Raises:
        MLflowUnreachable: MLflow cannot be reached.
    """
    tags = add_mlflow_tags({MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "fadeformer sweep"})
    run_id = find_or_create_run(connect(), identity, time.time_ns() // 10**6, tags)
    client = MlflowClient()
    client.log_batch(
        run_id, params=[Param(escape_name(key), value) for key, value in params.items()], tags=[RunTag(SWEEP_TAG, name)]
    )
    client.update_run(run_id, "RUNNING")
    return run_id


@translate_mlflow_errors()
def finish_sweep_run(run_id: str, metric: str, best: float, params: Mapping[str, Any], trials: pd.DataFrame) -> None:
    """Log the best trial and the table of all trials, and mark the run as finished; raises MLflowUnreachable."""
    client = MlflowClient()
    client.log_metric(run_id, f"best.{metric}", best, step=len(trials))
    for key, value in params.items():
        client.set_tag(run_id, f"best.{key}", str(value))
    client.log_text(run_id, trials.to_csv(index=False), "trials.csv")
    client.set_terminated(run_id)


@translate_mlflow_errors()
def trial_metric_history(parent: str, number: int, metric: str) -> dict[int, float]:
    """Return a metric of a trial by epoch, empty until the trial has a run; raises MLflowUnreachable."""
    client = MlflowClient()
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{TRIAL_TAG}` = '{number}'"
    runs = client.search_runs([client.get_run(parent).info.experiment_id], query, max_results=1)
    points = client.get_metric_history(runs[0].info.run_id, metric) if runs else []
    return {point.step: point.value for point in points}
