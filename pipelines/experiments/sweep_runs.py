"""A sweep's run in MLflow, and the metrics of its trials below it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME

from pipelines.tracking.runs import TRIAL_TAG, add_mlflow_tags, find_or_create_run
from pipelines.tracking.store import connect, translate_mlflow_errors

SWEEP_TAG = "fadeformer.sweep"  # tag: the sweep's name


@translate_mlflow_errors()
def start_sweep_run(name: str, identity: str, described: Mapping[str, str]) -> str:
    """Return the id of the one run of a sweep, which is created if there is none.

    Args:
        name: of the sweep.
        identity: of its study, which may have been removed and started again under the same name.
        described: the run's parameters.

    Raises:
        Unreachable: MLflow cannot be reached.
    """
    tags = add_mlflow_tags({MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "fadeformer sweep"})
    run_id = find_or_create_run(connect(), identity, time.time_ns() // 10**6, tags)
    client = MlflowClient()
    client.log_batch(run_id, params=[Param(*item) for item in described.items()], tags=[RunTag(SWEEP_TAG, name)])
    client.update_run(run_id, "RUNNING")
    return run_id


@translate_mlflow_errors()
def finish_sweep_run(run_id: str, metric: str, best: float, params: Mapping[str, Any], trials: pd.DataFrame) -> None:
    """Log a sweep's best trial and the table of all, and mark its run as finished; raises Unreachable."""
    client = MlflowClient()
    client.log_metric(run_id, f"best.{metric}", best, step=len(trials))
    for key, value in params.items():
        client.set_tag(run_id, f"best.{key}", str(value))
    client.log_text(run_id, trials.to_csv(index=False), "trials.csv")
    client.set_terminated(run_id)


@translate_mlflow_errors()
def trial_metric_history(parent: str, number: int, metric: str) -> dict[int, float]:
    """A metric of a trial by epoch, none while it has no run; raises Unreachable."""
    client = MlflowClient()
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{TRIAL_TAG}` = '{number}'"
    found = client.search_runs([client.get_run(parent).info.experiment_id], query, max_results=1)
    points = client.get_metric_history(found[0].info.run_id, metric) if found else []
    return {point.step: point.value for point in points}
