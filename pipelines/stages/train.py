"""Stage train: read data/processed, train, and write models/ (weights, model.json, history, run id); a Prefect flow."""

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
from fadeformer.data import arrays, training_images
from fadeformer.errors import StageInterrupted, TransientError, UserError
from fadeformer.inference import calibration, ood
from fadeformer.inference.calibration import Calibration
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.ood import OODDetector
from fadeformer.io.atomic import atomic_folder, read_json, write_json
from fadeformer.monitoring import reference
from fadeformer.training import sampling
from fadeformer.training.checkpoints import CheckpointManager
from pipelines import paths
from pipelines.server import temporary_server
from pipelines.stages import train_worker
from pipelines.tracking import resume, runs
from pipelines.tracking.journal import Journal


@task(name="fit the network", persist_result=False)
def fit(folder: Path) -> None:
    """Train to the last epoch, from the last checkpoint if there is one; torchrun starts several processes."""
    count = train_worker.device_count(schema.load_params(paths.PARAMS))
    if count * train_worker.node_count() == 1:
        train_worker.run(folder)
    else:
        _fit_with_torchrun(folder, count)


def _fit_with_torchrun(folder: Path, devices: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for report in folder.glob("stopped-*.json"):  # of an earlier attempt
        report.unlink()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the message is printed without its tracebacks
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))  # otherwise torchrun sets 1
    standalone = ["--standalone"] if train_worker.node_count() == 1 else []
    try:
        run(
            parse_args(
                [*standalone, "--nproc-per-node", str(devices), "-m", "pipelines.stages.train_worker", str(folder)]
            )
        )
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise StageInterrupted(
            f"stopped by {name}; run again to resume from the last checkpoint", error.sigval
        ) from error
    except ChildFailedError as error:
        reports = [read_json(path) for path in sorted(folder.glob("stopped-*.json"))]
        if not reports:
            raise TransientError(f"a training process died: {error.get_first_failure()[1].message}") from error
        if reports[0]["signal"]:
            raise StageInterrupted(reports[0]["message"], reports[0]["signal"]) from error
        raise UserError(reports[0]["message"]) from error


@task(name="write the model", persist_result=False)
def write_model(training_folder: Path, folder: Path) -> dict[str, Any]:
    """Write the weights of the best epoch, model.json, history and post-training statistics; return a summary."""
    state = CheckpointManager(training_folder, 1).load_latest()
    if state is None:
        raise UserError(
            f"{training_folder}: the checkpoint of the training is missing; run again to train from the start"
        )
    buffer = io.BytesIO()  # torch.save to a path writes the file name into the archive: the bytes would differ
    torch.save(state["best_weights"], buffer)
    (folder / paths.WEIGHTS.name).write_bytes(buffer.getvalue())
    history = train_worker.history_table(state["history"])
    history.to_csv(folder / paths.HISTORY.name, index=False)
    metadata = {**read_json(training_folder / paths.ARCHITECTURE.name), "best_epoch": state["best_epoch"]}
    fitted, detector, reference_table = fit_calibration_and_ood(metadata, folder / paths.WEIGHTS.name)
    metadata["calibration"], metadata["ood"] = fitted.to_dict(), {"threshold": ood.threshold_to_json(detector)}
    ood.write(detector, folder / paths.OOD_STATISTICS.name)
    reference_table.to_parquet(folder / paths.REFERENCE.name, index=False)
    write_json(folder / paths.ARCHITECTURE.name, metadata)
    write_training_images(Path(metadata["params"]["model"]["weights"]), folder / paths.TRAINING_IMAGES.name)
    best = history[history["epoch"] == state["best_epoch"]].iloc[0]
    seconds = pd.DataFrame(state["history"])[["train_seconds", "val_seconds"]].to_numpy().sum()
    return {
        "epochs": state["epoch"], "best_epoch": state["best_epoch"], "val_loss": float(best["val_loss"]),
        "seconds": float(seconds),
    }  # fmt: skip


def fit_calibration_and_ood(metadata: dict[str, Any], weights: Path) -> tuple[Calibration, OODDetector, pd.DataFrame]:
    """Fit everything that uses the scores and features of the best epoch.

    Returns:
        The calibration, fitted on val (the identity if train.calibrate is false); the out-of-distribution detector,
        fitted on train with its threshold from val; and the reference table for drift detection.
    """
    settings, meta = metadata["params"]["train"], arrays.read_metadata(paths.PROCESSED)
    train, val = (arrays.load_split(paths.PROCESSED, split) for split in ("train", "val"))
    classifier = Classifier({**metadata, "calibration": calibration.IDENTITY.to_dict()}, weights)
    val_outputs, train_outputs = (classifier.predict(split.images, settings["batch_size"]) for split in (val, train))
    task = classifier.task
    detector = ood.fit_detector(train_outputs.features, train.labels, task, val_outputs.features)
    fitted, training_weights = calibration.IDENTITY, None
    if settings["calibrate"]:
        if not task.multi_label:
            class_weights = train_worker.resolve_class_weights(settings["class_weights"], meta, task, train.labels)
            training_weights = sampling.training_weights(train.labels, task, settings["sampling"], class_weights)
        groups = pd.factorize(val.index["group"])[0]  # -1 without a group
        fitted = calibration.fit_calibration(
            val.labels, val_outputs.raw_scores, task, groups=groups, training_weights=training_weights
        )
    distances = detector.distance(val_outputs.features)
    reference_table = reference.build_reference(
        val.images, fitted(val_outputs.raw_scores, task), distances, val_outputs.features, classifier.classes,
        train.images, (val.index["group"], train.index["group"]),
    )  # fmt: skip
    return fitted, detector, reference_table


def write_training_images(initial_weights: Path, path: Path) -> None:
    """Write the content hashes of the images that the model has seen."""
    index = pd.concat([arrays.load_split(paths.PROCESSED, split).index for split in ("train", "val")])
    weights = None if initial_weights == paths.NO_WEIGHTS else initial_weights
    training_images.collect(index, weights).to_parquet(path, index=False)


@flow(name="train", persist_result=False, log_prints=True)
def train() -> str:
    """Train on data/processed and write models/; resume an unfinished training of the same fingerprint."""
    with resume.open_training_folder() as training_folder:
        for partial in paths.MODELS.parent.glob(f".{paths.MODELS.name}.*"):  # of a stage that was killed
            shutil.rmtree(partial)
        try:
            fit(training_folder)
        except BaseException as error:  # also those of Prefect that are not an Exception
            failed = isinstance(error, Exception) and not isinstance(error, StageInterrupted)
            Journal(training_folder).close("FAILED" if failed else "KILLED")
            raise
        run_id = Journal(training_folder).finalize()
        with atomic_folder(paths.MODELS) as folder:
            result = write_model(training_folder, folder)
            with runs.start_run(run_id):
                runs.log_metrics({"seconds": {"fit": result["seconds"]}})
                runs.log_artifacts(folder / paths.HISTORY.name)
                run_ids = {"mlflow_run_id": run_id, "mlflow_experiment_id": runs.get_experiment_id(run_id)}
            write_json(folder / paths.RUN.name, run_ids)
        resume.mark_finished(training_folder, run_id)
    best = f"epoch {result['best_epoch']} of {result['epochs']} is the best, val loss {result['val_loss']:.4f}"
    return f"{best}; MLflow run {run_id}"


def main() -> str:
    """Run the flow."""
    with temporary_server():
        return train()
