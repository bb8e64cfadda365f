"""Stage train: reads data/processed, writes models/ (weights, architecture, history, MLflow run id); a Prefect flow."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from prefect import flow, task

from fadeformer.config import schema
from fadeformer.data import arrays
from fadeformer.errors import StageInterrupted, TransientError, UserError
from fadeformer.inference import calibration, ood
from fadeformer.inference.calibration import Calibration
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.ood import OODDetector
from fadeformer.io.atomic import atomic_folder, read_json, write_json
from fadeformer.monitoring import reference
from fadeformer.training.checkpoints import CheckpointManager
from pipelines import paths
from pipelines.server import temporary_server
from pipelines.stages import train_worker
from pipelines.tracking import resume, runs
from pipelines.tracking.journal import Journal


@task(name="fit the network", persist_result=False)
def fit(folder: Path) -> None:
    """Trains to the end, from the last checkpoint in `folder` if there is one; in several processes by torchrun."""
    count = train_worker.device_count(schema.load_params(paths.PARAMS))
    if count * train_worker.node_count() == 1:
        train_worker.run(folder)
    else:
        _fit_with_torchrun(folder, count)


def _fit_with_torchrun(folder: Path, devices: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for left in folder.glob("stopped-*.json"):
        left.unlink()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its tracebacks are not the message
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))  # else torchrun sets 1
    alone = ["--standalone"] if train_worker.node_count() == 1 else []
    try:
        run(parse_args([*alone, "--nproc-per-node", str(devices), "-m", "pipelines.stages.train_worker", str(folder)]))
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise StageInterrupted(
            f"stopped by {name}; run again to go on from the last checkpoint", error.sigval
        ) from error
    except ChildFailedError as error:
        told = [read_json(path) for path in sorted(folder.glob("stopped-*.json"))]
        if not told:
            raise TransientError(f"a process of the training died: {error.get_first_failure()[1].message}") from error
        if told[0]["signal"]:
            raise StageInterrupted(told[0]["message"], told[0]["signal"]) from error
        raise UserError(told[0]["message"]) from error


@task(name="write the model", persist_result=False)
def write_model(begun_in: Path, folder: Path) -> dict[str, Any]:
    """Weights of the best epoch, architecture and history, from the last checkpoint."""
    state = CheckpointManager(begun_in, 1).load_latest()
    if state is None:
        raise UserError(f"{begun_in}: the checkpoint of the training is gone; run again to train afresh")
    buffer = io.BytesIO()  # a file's own name would stand in the archive, and the bytes would differ
    torch.save(state["best_weights"], buffer)
    (folder / paths.WEIGHTS.name).write_bytes(buffer.getvalue())
    history = train_worker.history_table(state["history"])
    history.to_csv(folder / paths.HISTORY.name, index=False)
    described = {**read_json(begun_in / paths.ARCHITECTURE.name), "best_epoch": state["best_epoch"]}
    fitted, known, seen = fit_calibration_and_ood(described, folder / paths.WEIGHTS.name)
    described["calibration"], described["ood"] = fitted.to_dict(), {"threshold": known.threshold}
    ood.write(known, folder / paths.OOD_STATISTICS.name)
    seen.to_parquet(folder / paths.REFERENCE.name, index=False)
    write_json(folder / paths.ARCHITECTURE.name, described)
    best = history[history["epoch"] == state["best_epoch"]].iloc[0]
    seconds = pd.DataFrame(state["history"])[["train_seconds", "val_seconds"]].to_numpy().sum()
    return {
        "epochs": state["epoch"], "best_epoch": state["best_epoch"], "val_loss": float(best["val_loss"]),
        "seconds": float(seconds),
    }  # fmt: skip


def fit_calibration_and_ood(described: dict[str, Any], weights: Path) -> tuple[Calibration, OODDetector, pd.DataFrame]:
    """What is fitted to the scores and features of the best epoch.

    Returns:
        What makes the scores mean what they say, by val (nothing if train.calibrate is false), what images the network
        knows, by train and val, and what new images are compared with, of val.
    """
    settings = described["params"]["train"]
    train, val = (arrays.load_split(paths.PROCESSED, split) for split in ("train", "val"))
    classifier = Classifier({**described, "calibration": calibration.IDENTITY.to_dict()}, weights)
    of_val, of_train = (classifier.predict(of.images, settings["batch_size"]) for of in (val, train))
    task = classifier.task
    known = ood.fit_detector(of_train.features, train.labels, task, of_val.features)
    fitted = (
        calibration.fit_calibration(val.labels, of_val.raw_scores, task)
        if settings["calibrate"]
        else calibration.IDENTITY
    )
    distances = known.distance(of_val.features)
    seen = reference.build_reference(
        val.images, fitted(of_val.raw_scores, task), distances, of_val.features, classifier.classes
    )
    return fitted, known, seen


@flow(name="train", persist_result=False, log_prints=True)
def train() -> str:
    """Trains on data/processed and leaves models/; what was begun and not ended is gone on with."""
    with resume.open_training_folder() as begun_in:
        for half in paths.MODELS.parent.glob(f".{paths.MODELS.name}.*"):  # of a stage that was killed
            shutil.rmtree(half)
        try:
            fit(begun_in)
        except BaseException as error:  # Prefect's own signals too
            failed = isinstance(error, Exception) and not isinstance(error, StageInterrupted)
            Journal(begun_in).close("FAILED" if failed else "KILLED")
            raise
        run_id = Journal(begun_in).finalize()
        with atomic_folder(paths.MODELS) as folder:
            result = write_model(begun_in, folder)
            with runs.start_run(run_id):
                runs.log_metrics({"seconds": {"fit": result["seconds"]}})
                runs.log_artifacts(folder / paths.HISTORY.name)
                of_run = {"mlflow_run_id": run_id, "mlflow_experiment_id": runs.get_experiment_id(run_id)}
            write_json(folder / paths.RUN.name, of_run)
        resume.mark_finished(begun_in, run_id)
    best = f"epoch {result['best_epoch']} of {result['epochs']} is the best, val loss {result['val_loss']:.4f}"
    return f"{best}; MLflow run {run_id}"


def main() -> str:
    """Runs the flow."""
    with temporary_server():
        return train()
