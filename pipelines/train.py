"""Stage train: reads data/processed, writes models/ (weights, architecture, history, MLflow run id); a Prefect flow."""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from prefect import flow, task
from safetensors.torch import save_file

from fadeformer import arrays, params, training
from fadeformer.augment import Augmentation
from fadeformer.errors import UserError
from fadeformer.files import checksum, whole_folder, write_json
from fadeformer.inference import choose_device, choose_precision
from fadeformer.models import create_model, load_weights
from pipelines import paths, stage, tracking
from pipelines.orchestrator import orchestrated

# What a model is made of; the other sections may change without training it again.
SECTIONS = ("seed", "dataset", "split", "preprocess", "model", "augment", "train")
FLIPPED = 0.5  # of images that mean the same when mirrored
SERVED = Path(__file__).with_name("served.py")


@task(name="fit the network", persist_result=False)
def fit(folder: Path) -> dict[str, Any]:
    """Trains, each epoch going to MLflow as it ends, and leaves weights, architecture and history in `folder`."""
    wanted = params.load(paths.PARAMS)
    meta = arrays.read_meta(paths.PROCESSED)
    device = choose_device(wanted.train.device)
    precision = choose_precision(wanted.train.precision, device)
    torch.manual_seed(wanted.seed)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    described = {
        "backbone": wanted.model.backbone,
        "num_classes": len(meta.classes),
        "image_size": meta.image_size,
        "in_chans": meta.channels,
        "pretrained": wanted.model.pretrained,
        "dropout": wanted.model.dropout,
        "drop_path": wanted.model.drop_path,
        "fade": wanted.model.fade.model_dump() if wanted.model.fade else None,
    }
    try:
        start = Path(wanted.model.weights) if Path(wanted.model.weights) != paths.NO_WEIGHTS else None
        model = create_model(**{**described, "pretrained": wanted.model.pretrained and start is None}).to(device)
        origin = None if start is None else load_start(model, start)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"params.yaml: model: {error}") from error
    except OSError as error:
        if not wanted.model.pretrained:
            raise
        raise UserError(
            f"the pretrained weights of {wanted.model.backbone} cannot be had ({type(error).__name__}); check the"
            " network, or set model.pretrained to false"
        ) from error
    recipe = training.Recipe(**wanted.train.model_dump(exclude={"precision", "device"}))
    chosen = wanted.augment.model_dump() | {"erasing_scale": tuple(wanted.augment.erasing_scale)}
    if wanted.augment.horizontal_flip == "auto":
        chosen["horizontal_flip"] = FLIPPED if meta.dataset["mirrors"] else 0.0
    augmentation = Augmentation(**chosen)
    state = training.start(model, recipe)
    epochs, began = [], time.perf_counter()
    for epoch in training.fit(
        state, arrays.read(paths.PROCESSED, "train"), arrays.read(paths.PROCESSED, "val"), task=meta.task,
        recipe=recipe, augmentation=augmentation, seed=wanted.seed, device=device, precision=precision,
    ):  # fmt: skip
        tracking.log_epoch(asdict(epoch))
        epochs.append(asdict(epoch))
        auc = "undefined" if epoch.val_auc is None else f"{epoch.val_auc:.4f}"
        print(
            f"epoch {epoch.epoch:3d}/{recipe.epochs}: train loss {epoch.train_loss:.4f} accuracy"
            f" {epoch.train_accuracy:.4f} | val loss {epoch.val_loss:.4f} accuracy {epoch.val_accuracy:.4f} AUC {auc}"
        )
    tracking.log_metrics({"seconds": {"fit": time.perf_counter() - began}})

    buffer = io.BytesIO()  # a file's own name would stand in the archive, and the bytes would differ
    torch.save(state.best_weights, buffer)
    (folder / paths.WEIGHTS.name).write_bytes(buffer.getvalue())
    pd.DataFrame(epochs).to_csv(folder / paths.HISTORY.name, index=False)
    made_with = {name: value for name, value in wanted.nested().items() if name in SECTIONS}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    write_json(
        folder / paths.ARCHITECTURE.name,
        {
            "model": described, "task": meta.task.name, "classes": list(meta.classes), "precision": names[precision],
            "best_epoch": state.best_epoch, "weights": origin, "params": made_with,
        },
    )  # fmt: skip
    return {"epochs": state.epoch, "best_epoch": state.best_epoch, "best_val_loss": state.best_loss}


def load_start(model: torch.nn.Module, weights: Path) -> dict[str, str]:
    """Puts the weights of a file into the model, and tells which they were.

    Raises:
        UserError: the file is not there, or is none of weights for this model.
    """
    try:
        load_weights(model, weights)
    except OSError as error:
        raise UserError(f"params.yaml: model.weights is {weights}, which cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"params.yaml: model.weights: {error}") from error
    return {"file": weights.name, "sha256": checksum(weights, "sha256")}


@task(name="log the model to MLflow", persist_result=False)
def log_model(folder: Path) -> None:
    """Logs the model as it can be loaded anywhere."""
    weights = torch.load(folder / paths.WEIGHTS.name, weights_only=True)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights.safetensors"
        save_file(weights, path)
        tracking.log_model(SERVED, path, folder / paths.ARCHITECTURE.name, arrays.read_meta(paths.PROCESSED))
    tracking.log_files(folder / paths.HISTORY.name)


@flow(name="train", persist_result=False, log_prints=True)
def train() -> str:
    """Trains on data/processed and leaves models/."""
    with whole_folder(paths.MODELS) as folder, tracking.run() as run_id:
        wanted = params.load(paths.PARAMS)
        tracking.log_start(wanted.flat(), arrays.read_meta(paths.PROCESSED))
        result = fit(folder)
        log_model(folder)
        write_json(folder / paths.RUN.name, {"mlflow_run_id": run_id})
    best = f"epoch {result['best_epoch']} of {result['epochs']} is the best, val loss {result['best_val_loss']:.4f}"
    return f"{best}; MLflow run {run_id}"


def main() -> str:
    """Runs the flow."""
    with orchestrated():
        return train()


if __name__ == "__main__":
    stage.run("train", main)
