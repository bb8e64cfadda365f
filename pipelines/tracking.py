"""MLflow runs: where they are kept, and what a run of the pipeline leaves in its one run."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from filelock import FileLock
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from ruamel.yaml import YAML

import fadeformer
from fadeformer.arrays import Meta
from fadeformer.errors import UserError
from fadeformer.files import checksum

EXPERIMENT = "fadeformer"
MODEL = "model"  # name of the logged model in its run


def project() -> Path:
    """The project's folder; an experiment that DVC runs in a temporary copy belongs to the real one."""
    here = Path.cwd()
    copies = [parent for parent in here.parents if parent.name == ".dvc"]
    return copies[-1].parent if copies else here


def connect() -> None:
    """Points MLflow at `MLFLOW_TRACKING_URI`, or else at the project's own store, which is made if it is not there.

    Raises:
        UserError: the store cannot be reached.
    """
    store = project() / "mlruns"
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    own = f"sqlite:///{store / 'mlflow.db'}?timeout=60"
    server = os.environ.get("MLFLOW_TRACKING_URI", own)
    server = None if server == own else server  # MLflow itself sets the variable to what was connected before
    mlflow.set_tracking_uri(server or own)
    store.mkdir(exist_ok=True)
    try:
        with FileLock(store / ".lock"):  # two processes that create the database at once break its migration
            location = None if server else (store / "artifacts").as_uri()
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=location)
            elif location and experiment.artifact_location.startswith("file:"):
                _follow(store / "mlflow.db", experiment.artifact_location, location)
    except MlflowException as error:
        remedy = "start it, or unset MLFLOW_TRACKING_URI to use this project's mlruns/" if server else "restore mlruns/"
        raise UserError(f"MLflow at {server or store} cannot be used; {remedy} ({str(error)[:200]})") from error
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow's experiment {EXPERIMENT} was deleted; restore it with `mlflow experiments restore"
            f" --experiment-id {experiment.experiment_id}`, or remove mlruns/mlflow.db to begin anew"
        )
    mlflow.set_experiment(EXPERIMENT)


def _follow(database: Path, before: str, now: str) -> None:
    """Lets a store that was moved or copied with its project find its artifacts: MLflow keeps absolute addresses."""
    if before == now:
        return
    places = {
        "experiments": ["artifact_location"], "runs": ["artifact_uri"], "logged_models": ["artifact_location"],
        "model_versions": ["source", "storage_location"],
    }  # fmt: skip
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, columns in places.items():
            for column in columns:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",  # noqa: S608  names of ours
                    (now, len(before) + 1, len(before), before),
                )


@contextmanager
def run(run_id: str | None = None) -> Iterator[str]:
    """A new MLflow run, or more of an old one; gives its id. It ends as finished, or as failed by an error.

    Raises:
        UserError: no run of that id is in the store.
    """
    connect()
    if run_id is not None:
        try:
            known = mlflow.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:
            known = False
        if not known:
            raise UserError(
                f"MLflow has no run {run_id}, in which this model was trained, or it was deleted; `dvc repro -f train`"
                " makes one"
            )
    with mlflow.start_run(run_id=run_id) as active:
        yield active.info.run_id


def log_start(params: Mapping[str, Any], meta: Meta) -> None:
    """Leaves the parameters and the identity of data and code in the active run."""
    mlflow.log_params(dict(params))
    card = meta.dataset
    source = CodeDatasetSource(tags={"stage": "download", "file": card["file"], "sha256": card["sha256"]})
    mlflow.log_input(MetaDataset(source, name=card["name"], digest=card["sha256"][:32]), context="training")
    mlflow.set_tags(
        {
            "dataset.name": card["name"],
            "dataset.size": str(card["size"]),
            "dataset.sha256": card["sha256"],
            "dataset.note": card["note"],
            "dataset.split": meta.split,
            **_code_identity(),
            **_lock_identity(),
        }
    )


def log_settings(section: str, settings: Mapping[str, Any]) -> None:
    """Tags the run with a section of params.yaml as it is now, which may differ from when the model was trained."""
    mlflow.set_tags({f"{section}.{name}": str(value) for name, value in settings.items()})


def log_epoch(measured: Mapping[str, Any]) -> None:
    """Logs what an epoch measured, at its number `epoch`."""
    values = {name: value for name, value in measured.items() if name != "epoch" and value is not None}
    mlflow.log_metrics(values, step=measured["epoch"])


def log_metrics(metrics: Mapping[str, Any]) -> None:
    """Logs numbers of a nested dictionary under dotted names; what is not a number is left out."""
    flat = pd.json_normalize(dict(metrics)).iloc[0].to_dict()
    numbers = {
        _plain(name): float(value)
        for name, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    }
    mlflow.log_metrics(numbers)


def log_files(*paths: Path, under: str | None = None) -> None:
    """Logs files, and the files of folders, as artifacts."""
    for path in paths:
        if path.is_dir():
            mlflow.log_artifacts(str(path), under)
        else:
            mlflow.log_artifact(str(path), under)


def log_model(served: Path, weights: Path, architecture: Path, meta: Meta) -> None:
    """Logs the model with code, signature and example, so that it loads without this project.

    Args:
        served: the file that MLflow runs to load it.
        weights: safetensors.
        architecture: model.json.
        meta: of the arrays it was trained on.
    """
    shape = (-1, meta.image_size, meta.image_size, meta.channels)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        outputs=Schema([TensorSpec(np.dtype(np.float64), (-1, len(meta.classes)))]),
    )
    mlflow.pyfunc.log_model(
        name=MODEL,
        python_model=str(served),
        artifacts={"weights": str(weights), "architecture": str(architecture)},
        code_paths=[str(Path(fadeformer.__file__).parent)],
        signature=signature,
        input_example=np.zeros((1, *shape[1:]), np.uint8),
        pip_requirements=[
            f"{name}=={version(name)}"
            for name in ("mlflow", "numpy", "pandas", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm")
        ],
    )


def _code_identity() -> dict[str, str]:
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", ".", ":!dvc.lock"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"git.revision": "not a git repository"}
    return {"git.revision": revision.stdout.strip(), "git.changed": str(bool(changes.stdout.strip())).lower()}


def _lock_identity() -> dict[str, str]:
    lock = Path("dvc.lock")
    if not lock.is_file():
        return {"dvc.lock": "not run by DVC"}
    stages = YAML(typ="safe").load(lock)["stages"]
    outs = {out["path"]: out.get("md5", "") for stage in stages.values() for out in stage.get("outs", [])}
    return {"dvc.lock": checksum(lock, "md5"), "dvc.data": json.dumps(outs.get("data/processed", ""))[1:-1]}


def _plain(name: str) -> str:
    """A metric's name in the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-./ " else " " for c in name)
