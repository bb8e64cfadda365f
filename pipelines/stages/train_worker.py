"""One training process: builds model and data, resumes from the last checkpoint, trains, and saves checkpoints.

With one device it runs in the process of the stage; with several, torchrun starts
`python -m pipelines.stages.train_worker FOLDER`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.environment import configure_environment

if __name__ == "__main__":  # on other machines torchrun starts this module, and timm reads HF_HOME at import
    configure_environment()

import numpy as np
import pandas as pd
import timm
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn
from torch.utils import deterministic

from fadeformer.config import schema
from fadeformer.config.schema import ModelParams, Params
from fadeformer.data import arrays
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.normalization import IMAGENET, Normalization
from fadeformer.errors import StageInterrupted, UserError
from fadeformer.evaluation import metrics
from fadeformer.inference.forward import choose_device, choose_precision
from fadeformer.io.atomic import checksum, write_json
from fadeformer.models.factory import create_model, load_weights
from fadeformer.tasks import Task
from fadeformer.training import loop
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.checkpoints import CheckpointManager
from fadeformer.training.distributed import create_fabric
from fadeformer.training.state import COST_FIELDS, EpochResult, Recipe, TrainingState, create_training_state
from pipelines import paths
from pipelines.stages.signals import catch_stop_signals
from pipelines.tracking import resume
from pipelines.tracking.journal import Journal

FLIP_PROBABILITY = 0.5  # where a mirrored image keeps its label
# Keys of `train:` that are not fields of Recipe.
NOT_IN_RECIPE = ("precision", "device", "devices", "class_weights", "calibrate", "checkpoint_minutes")
# Sections of params.yaml that are recorded in model.json: they determine the model.
RECORDED_SECTIONS = ("seed", "dataset", "split", "preprocess", "model", "augment", "train")


def node_count() -> int:
    """Return the number of machines, from torchrun's environment variable PET_NNODES."""
    return int(os.environ.get("PET_NNODES", "1").split(":")[0])


def device_count(config: Params) -> int:
    """Return the number of processes on this machine: one per GPU, or on the CPU.

    Raises:
        UserError: train.devices is larger than the number of GPUs.
    """
    device = choose_device(config.train.device)
    available = torch.cuda.device_count() if device.type == "cuda" else 1
    if config.train.devices == "auto":
        return available
    if device.type == "cuda" and config.train.devices > available:
        raise UserError(
            f"params.yaml: train.devices is {config.train.devices}, but this machine has {available} GPU(s); set it to"
            " auto"
        )
    return config.train.devices


def run(folder: Path | None) -> None:
    """Train to the last epoch, from the last checkpoint if there is one.

    Args:
        folder: the folder of `resume.open_training_folder`; None on all machines but the first.

    Raises:
        UserError: params.yaml has an invalid combination of values, or training fails in a way that a user can fix.
        StageInterrupted: a signal was received; the state is saved in a checkpoint.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it logs a line for each process
    config = schema.load_params(paths.PARAMS)
    meta = arrays.read_metadata(paths.PROCESSED)
    device = choose_device(config.train.device)
    precision = choose_precision(config.train.precision, device)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # filling is slow
    has_frozen = config.train.probe_epochs > 0
    fabric = create_fabric(
        device, precision, devices=device_count(config), nodes=node_count(), find_unused_parameters=has_frozen
    )
    _check_nodes_agree(fabric, folder)
    torch.manual_seed(config.seed)
    task = meta.task.with_head(config.model.head)
    model_args, model, weights_info = _build_model(config.model, meta, task)
    normalization = resolve_normalization(config.model, meta, model)
    recipe = Recipe(**config.train.model_dump(exclude=set(NOT_IN_RECIPE)))
    state = create_training_state(model.to(fabric.device), recipe)
    journal, checkpoints = None, None
    if folder is not None and fabric.global_rank == 0:
        journal, checkpoints = Journal(folder), CheckpointManager(folder, config.train.checkpoint_minutes)
        recorded = {name: value for name, value in config.as_nested_dict().items() if name in RECORDED_SECTIONS}
        write_json(
            folder / paths.ARCHITECTURE.name,
            {
                "model": model_args, "task": meta.task.name, "head": config.model.head, "classes": list(meta.classes),
                "normalize": asdict(normalization), "precision": precision, "weights": weights_info,
                "params": recorded,
                "input": meta.input_config,
                "dataset": meta.dataset["name"],
            },
        )  # fmt: skip
        journal.start(config.as_flat_dict(), meta)
    _load_last_checkpoint(state, checkpoints, fabric)
    train, val = (arrays.load_split(paths.PROCESSED, split) for split in ("train", "val"))
    if journal is not None:
        for result in state.history:  # a kill may have come between the checkpoint and the journal's last row
            journal.add_epoch(asdict(result))
        journal.flush()
    class_weights = resolve_class_weights(config.train.class_weights, meta, task, train.labels)
    if journal is not None:
        print(_describe_selection(val.labels, meta, task), end="")
    with catch_stop_signals() as pending_signal:
        for result in loop.fit(
            state, train, val, task=task, recipe=recipe, class_weights=class_weights,
            augmentation=build_augmentation(config, meta), normalization=normalization, seed=config.seed, fabric=fabric,
            checkpoints=checkpoints, pending_signal=pending_signal,
        ):  # fmt: skip
            if journal is not None:
                _report_epoch(result, recipe, journal)


def _check_nodes_agree(fabric: Fabric, folder: Path | None) -> None:
    """Check that all machines have the same fingerprint, and that rank 0 is on the machine that runs the stage."""
    name = fabric.broadcast(None if folder is None else folder.name)
    if name is None:
        raise UserError(
            "the first process is not on the machine that runs the stage; set PET_NODE_RANK to 0 there, and to 1 and so"
            " on elsewhere"
        )
    if folder is None and fabric.local_rank == 0 and resume.hash_fingerprint(resume.compute_fingerprint()) != name:
        raise UserError("params.yaml, data, code or library versions differ from those of the first machine")


def _build_model(
    config: ModelParams, meta: ArrayMetadata, task: Task
) -> tuple[dict[str, Any], nn.Module, dict[str, str] | None]:
    """Return the arguments of `create_model`, the model, and name and SHA-256 of the weights it is initialized with."""
    model_args: dict[str, Any] = {
        "backbone": config.backbone,
        "num_classes": len(meta.classes) - task.num_omitted_outputs,
        "image_size": meta.image_size,
        "in_chans": meta.channels,
        "pretrained": config.pretrained,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
        "fade": config.fade.model_dump() if config.fade else None,
    }
    try:
        weights = Path(config.weights) if Path(config.weights) != paths.NO_WEIGHTS else None
        model = create_model(**{**model_args, "pretrained": config.pretrained and weights is None})
    except (ValueError, RuntimeError) as error:
        raise UserError(f"params.yaml: model: {error}") from error
    except OSError as error:
        if not config.pretrained:
            raise
        raise UserError(
            f"cannot download the pretrained weights of {config.backbone} ({type(error).__name__}); check the network"
            " connection, or set model.pretrained to false"
        ) from error
    if weights is None:
        return model_args, model, None
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise UserError(f"params.yaml: model.weights: {error}") from error
    return model_args, model, {"file": weights.name, "sha256": checksum(weights, "sha256")}


def resolve_normalization(config: ModelParams, meta: ArrayMetadata, model: nn.Module) -> Normalization:
    """Return mean and standard deviation per channel: of the training data, of ImageNet, or the backbone's own."""
    if config.normalize == "data":
        return Normalization(tuple(meta.channel_mean), tuple(max(std, 1e-6) for std in meta.channel_std))
    if config.normalize == "imagenet":
        return IMAGENET.for_channels(meta.channels)
    defaults = timm.data.resolve_model_data_config(model)
    return Normalization(tuple(defaults["mean"]), tuple(defaults["std"])).for_channels(meta.channels)


def build_augmentation(config: Params, meta: ArrayMetadata) -> Augmentation:
    """Create the augmentation; `horizontal_flip: auto` means no flips where left and right are classes."""
    values = config.augment.model_dump() | {"erasing_scale": tuple(config.augment.erasing_scale)}
    if config.augment.horizontal_flip == "auto":
        values["horizontal_flip"] = FLIP_PROBABILITY if meta.dataset["mirrors"] else 0.0
    return Augmentation(**values)


def resolve_class_weights(setting: str | Mapping[str, float], meta: ArrayMetadata, task: Task, labels: Any) -> Any:
    """Return the class weights of the loss, shape (classes,).

    Args:
        setting: train.class_weights of params.yaml.
        meta: metadata of the data set.
        task: classification task.
        labels: of train, (images, labels).

    Raises:
        UserError: train.class_weights has a name that is not a class.
    """
    if setting == "auto":
        return task.balanced_weights(labels, len(meta.classes))
    weights = {} if isinstance(setting, str) else setting
    for name in weights:
        if name not in meta.classes:
            raise UserError(
                f"params.yaml: train.class_weights names {name}, but the classes are {', '.join(meta.classes)}"
            )
    return pd.Series(weights, dtype=float).reindex(list(meta.classes)).fillna(1.0).to_numpy()


def _load_last_checkpoint(state: TrainingState, checkpoints: CheckpointManager | None, fabric: Fabric) -> None:
    """Load the last checkpoint into `state`; rank 0 reads the file and broadcasts it."""
    checkpoint = checkpoints.load_latest() if checkpoints is not None else None
    if fabric.world_size > 1:
        checkpoint = fabric.broadcast(checkpoint)
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        if checkpoints is not None:
            print(f"resumed after epoch {state.epoch}, batch {state.batch} of the next epoch, step {state.step}")


def _describe_selection(labels: NDArray[np.int64], meta: ArrayMetadata, task: Task) -> str:
    """Name the classes with too few images in val to select the epoch; empty if there are none."""
    counts = metrics.selecting_classes(labels, len(meta.classes), task)
    names = [name for name, is_counted in zip(meta.classes, counts, strict=True) if not is_counted]
    if not names:
        return ""
    left_out_of = "the metrics on val" if task.multi_label else "the AUC on val"
    return (
        f"left out of {left_out_of} that select the epoch, fewer than {metrics.MIN_SELECTING_IMAGES} images with or"
        f" without it: {', '.join(names)}\n"
    )


def _report_epoch(result: EpochResult, recipe: Recipe, journal: Journal) -> None:
    """Log and print the metrics of an epoch."""
    journal.add_epoch(asdict(result))
    journal.flush()
    auc = "undefined" if result.val_auc is None else f"{result.val_auc:.4f}"
    print(
        f"epoch {result.epoch:3d}/{recipe.epochs}: train loss {result.train_loss:.4f} accuracy"
        f" {result.train_accuracy:.4f} | val loss {result.val_loss:.4f} accuracy {result.val_accuracy:.4f} AUC {auc} |"
        f" {result.train_seconds + result.val_seconds:.1f} s"
    )


def history_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per epoch, without the timings, so that the same training gives the same table."""
    return pd.DataFrame(list(results)).drop(columns=list(COST_FIELDS))


def main() -> None:
    """Run as one of torchrun's processes; an error message is written to a file, which the stage reads and prints."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        run(folder)
    except (UserError, StageInterrupted) as error:
        if folder is not None:
            report = {"message": str(error), "signal": getattr(error, "signal_number", 0)}
            write_json(folder / f"stopped-{os.environ.get('RANK', 0)}.json", report)
        sys.exit(f"train_worker: {error}" if folder is None else 1)


if __name__ == "__main__":
    main()
