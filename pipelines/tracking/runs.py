"""MLflow runs: start, find and tag them, and log metrics, parameters and artifacts.

Functions raise `store.MLflowUnreachable` if MLflow cannot be reached, and a UserError if the run does not exist.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
)
from ruamel.yaml import YAML

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.errors import UserError
from fadeformer.io.atomic import checksum
from pipelines.tracking import locations
from pipelines.tracking.store import REFUSAL_CODES, connect, translate_mlflow_errors

SOURCE_NAME = "python -m pipelines train"
LOGGED_MODEL_NAME = "model"  # name of the logged model in its run
IDENTITY_TAG = "fadeformer.training"  # tag with the id of a training or sweep, which it has before its run is created
TRIAL_TAG = "fadeformer.trial"  # tag with the number of a trial of a sweep
TRIAL_VARIABLE = "FADEFORMER_TRIAL"  # environment variable of a trial: SWEEP_RUN_ID/TRIAL_NUMBER


@contextmanager
def start_run(run_id: str | None = None) -> Iterator[str]:
    """Start a new MLflow run or continue one, and yield its id; it ends as FINISHED, or FAILED on an error."""
    connect()
    if run_id is not None:
        check_run_exists(run_id, "`dvc repro -f train` creates one for this model")
    with translate_mlflow_errors(), mlflow.start_run(run_id=run_id) as active:
        yield active.info.run_id


@translate_mlflow_errors()
def check_run_exists(run_id: str, remedy: str) -> None:
    """Raise a UserError with `remedy` if the run does not exist or was deleted."""
    try:
        is_missing = MlflowClient().get_run(run_id).info.lifecycle_stage != "active"
    except MlflowException as error:
        if error.error_code not in REFUSAL_CODES:
            raise
        is_missing = True
    if is_missing:
        raise UserError(f"MLflow at {locations.display_address()} has no run {run_id}, or it was deleted; {remedy}")


@translate_mlflow_errors()
def get_experiment_id(run_id: str) -> str:
    """Return the id of a run's experiment."""
    return str(MlflowClient().get_run(run_id).info.experiment_id)


@translate_mlflow_errors()
def find_or_create_run(experiment: str, identity: str, start_time: int, tags: Mapping[str, str]) -> str:
    """Return the id of the run of a training or a sweep; the run is created if it does not exist.

    Args:
        experiment: Id of the experiment.
        identity: Id of the training or sweep, the value of `IDENTITY_TAG`.
        start_time: Milliseconds since 1970.
        tags: Tags of the run. Only MLflow's own (`mlflow.*`) are set here.
    """
    client = MlflowClient()
    existing = client.search_runs(
        [experiment], f"tags.`{IDENTITY_TAG}` = '{identity}'", order_by=["start_time", "run_id"]
    )
    if existing:
        return str(existing[0].info.run_id)
    mlflow_tags = {name: value for name, value in tags.items() if name.startswith("mlflow.")}
    return str(
        client.create_run(experiment, start_time=start_time, tags={IDENTITY_TAG: identity, **mlflow_tags}).info.run_id
    )


@translate_mlflow_errors()
def set_status(run_id: str, status: str) -> None:
    """Set a run's status: RUNNING, or FINISHED, FAILED or KILLED together with its end time."""
    if status == "RUNNING":
        MlflowClient().update_run(run_id, status)
    else:
        MlflowClient().set_terminated(run_id, status)


def training_tags(meta: ArrayMetadata) -> dict[str, str]:
    """Return the tags of a training run: data, code, and MLflow's own (user, source)."""
    card = meta.dataset
    return add_mlflow_tags(
        {
            "dataset.name": card["name"],
            "dataset.size": str(card["size"]),
            "dataset.sha256": card["sha256"],
            "dataset.note": card["note"],
            "dataset.split": meta.split,
            MLFLOW_SOURCE_NAME: SOURCE_NAME,  # otherwise MLflow stores a local path
            **launch_tags(),
            **_git_tags(),
            **_dvc_tags(),
        }
    )


@translate_mlflow_errors()
def log_provenance(run_id: str, params: Mapping[str, Any], tags: Mapping[str, str], card: Mapping[str, Any]) -> None:
    """Log parameters, tags and the data set to a run. Idempotent."""
    client = MlflowClient()
    client.log_batch(
        run_id,
        params=[Param(escape_name(name), str(value)) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    source = json.dumps({"tags": {"stage": "download", "file": card["file"], "sha256": card["sha256"]}})
    dataset = Dataset(card["name"], card["sha256"][:32], source_type="code", source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])])


@translate_mlflow_errors()
def log_metric_points(run_id: str, points: Iterable[tuple[str, float, int, int]]) -> None:
    """Log points (metric, value, milliseconds since 1970, step), in order."""
    MlflowClient().log_batch(run_id, metrics=[Metric(*point) for point in points])


def log_epochs(run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log rows of a history: `epoch`, `time` in milliseconds since 1970, and metrics; missing values are skipped."""
    for row in rows:  # one call per epoch, which MLflow stores atomically
        points = [
            (escape_name(name), float(value), row["time"], row["epoch"])
            for name, value in row.items()
            if name not in ("epoch", "time") and pd.notna(value)
        ]
        log_metric_points(run_id, points)


@translate_mlflow_errors()
def logged_epochs(run_id: str) -> set[int]:
    """Return the epochs that a run has metrics of."""
    return {point.step for point in MlflowClient().get_metric_history(run_id, "learning_rate")}


def log_params_as_tags(section: str, settings: Mapping[str, Any]) -> None:
    """Set a section of params.yaml as tags: unlike parameters, they may change after the training."""
    mlflow.set_tags({f"{section}.{name}": str(value) for name, value in settings.items()})


def log_metrics(metrics: Mapping[str, Any]) -> None:
    """Log the numbers of a nested dictionary under dotted names; other and already logged values are skipped."""
    run = mlflow.active_run()
    logged = MlflowClient().get_run(run.info.run_id).data.metrics if run else {}  # by a stage that was killed
    mlflow.log_metrics({name: value for name, value in flatten_metrics(metrics).items() if logged.get(name) != value})


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a nested dictionary by dotted names that MLflow allows."""
    values = pd.json_normalize(dict(metrics)).iloc[0].to_dict() if metrics else {}
    return {
        escape_name(str(name)): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    }


@translate_mlflow_errors()
def log_artifacts(*paths: Path, artifact_path: str | None = None) -> None:
    """Log files and folders as artifacts."""
    for path in paths:
        if path.is_dir():
            mlflow.log_artifacts(str(path), artifact_path)
        else:
            mlflow.log_artifact(str(path), artifact_path)


def add_mlflow_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Add MLflow's own tags, except the git repository: a local path, or a URL that may include a token."""
    result: dict[str, str] = resolve_tags(tags)
    result.pop(MLFLOW_GIT_REPO_URL, None)
    return result


def launch_tags() -> dict[str, str]:
    """Return the run name that a deployment run or a DVC experiment has set, and the sweep that the run is a trial of.

    Without a name MLflow generates one.
    """
    name = os.environ.get("MLFLOW_RUN_NAME") or os.environ.get("DVC_EXP_NAME")
    sweep, _, number = os.environ.get(TRIAL_VARIABLE, "").partition("/")
    return {
        **({MLFLOW_RUN_NAME: name} if name else {}),
        **({MLFLOW_PARENT_RUN_ID: sweep, TRIAL_TAG: number} if sweep else {}),
    }


def _git_tags() -> dict[str, str]:
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":!dvc.lock"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"git.revision": "not a git repository"}
    return {"git.revision": revision.stdout.strip(), "git.changed": str(bool(changes.stdout.strip())).lower()}


def _dvc_tags() -> dict[str, str]:
    lock = Path("dvc.lock")
    if not lock.is_file():
        return {"dvc.lock": "not run by DVC"}
    stages = YAML(typ="safe").load(lock)["stages"]
    outs = {out["path"]: out.get("md5", "") for stage in stages.values() for out in stage.get("outs", [])}
    return {"dvc.lock": checksum(lock, "md5"), "dvc.data": outs.get("data/processed", "")}


def escape_name(name: str) -> str:
    """Escape the characters of a metric's or parameter's name that MLflow does not allow, such as `<` to `_x003C_`.

    The escapes are those of Office Open XML (ECMA-376 part 1, 22.9.2.19, ST_Xstring). No two names become equal: an
    underscore that would start an escape is escaped, too.
    """
    is_path = posixpath.normpath(name) == name and not name.startswith(("/", ".."))  # MLflow refuses other paths
    refused = r"_(?=x[0-9A-F]{4,6}_)|[^\w./ -]" + ("" if is_path else "|/")
    return re.sub(refused, lambda match: f"_x{ord(match[0]):04X}_", name)
