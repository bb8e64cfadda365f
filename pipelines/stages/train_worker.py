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

import pandas as pd
import timm
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils import deterministic

from fadeformer.config import schema
from fadeformer.config.schema import ModelParams, Params
from fadeformer.data import arrays
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.normalization import IMAGENET, Normalization
from fadeformer.errors import StageInterrupted, UserError
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

FLIP_PROBABILITY = 0.5  # of images that mean the same when mirrored
# Keys of train: that are no part of the recipe.
NOT_IN_RECIPE = ("precision", "device", "devices", "class_weights", "calibrate", "checkpoint_minutes")
# What a model is made of; the other sections may change without training it again.
RECORDED_SECTIONS = ("seed", "dataset", "split", "preprocess", "model", "augment", "train")


def node_count() -> int:
    """Machines that train together: as torchrun's own environment says."""
    return int(os.environ.get("PET_NNODES", "1").split(":")[0])


def device_count(wanted: Params) -> int:
    """Processes on this machine.

    Raises:
        UserError: more GPUs are asked for than there are.
    """
    device = choose_device(wanted.train.device)
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted.train.devices == "auto":
        return found
    if device.type == "cuda" and wanted.train.devices > found:
        raise UserError(
            f"params.yaml: train.devices is {wanted.train.devices}, but this machine has {found} GPU(s); set it to auto"
        )
    return wanted.train.devices


def run(folder: Path | None) -> None:
    """Trains to the end.

    Args:
        folder: of the training, which `begun.taken_up` gave; other machines than the first need none.

    Raises:
        UserError: params.yaml asks for what cannot be, or training fails in a way that a person can mend.
        Interrupted: a signal asked to stop; the state is in a checkpoint.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each process
    wanted = schema.load_params(paths.PARAMS)
    meta = arrays.read_metadata(paths.PROCESSED)
    device = choose_device(wanted.train.device)
    precision = choose_precision(wanted.train.precision, device)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # filling takes time
    freezes = wanted.train.probe_epochs > 0
    fabric = create_fabric(
        device, precision, devices=device_count(wanted), nodes=node_count(), find_unused_parameters=freezes
    )
    _check_nodes_agree(fabric, folder)
    torch.manual_seed(wanted.seed)
    task = meta.task.with_head(wanted.model.head)
    described, model, origin = _build_model(wanted.model, meta, task)
    normalisation = resolve_normalization(wanted.model, meta, model)
    recipe = Recipe(**wanted.train.model_dump(exclude=set(NOT_IN_RECIPE)))
    state = create_training_state(model.to(fabric.device), recipe)
    journal, checkpoints = None, None
    if folder is not None and fabric.global_rank == 0:
        journal, checkpoints = Journal(folder), CheckpointManager(folder, wanted.train.checkpoint_minutes)
        made_with = {name: value for name, value in wanted.as_nested_dict().items() if name in RECORDED_SECTIONS}
        write_json(
            folder / paths.ARCHITECTURE.name,
            {
                "model": described, "task": meta.task.name, "head": wanted.model.head, "classes": list(meta.classes),
                "normalize": asdict(normalisation), "precision": precision, "weights": origin,
                "params": made_with,
                "input": {"image_size": meta.image_size, "channels": meta.channels, "aspect": meta.aspect},
                "dataset": meta.dataset["name"],
            },
        )  # fmt: skip
        journal.start(wanted.as_flat_dict(), meta)
    _load_last_checkpoint(state, checkpoints, fabric)
    train, val = (arrays.load_split(paths.PROCESSED, split) for split in ("train", "val"))
    if journal is not None:
        for result in state.history:  # the last may not be there
            journal.add_epoch(asdict(result))
        journal.flush()
    class_weights = resolve_class_weights(wanted, meta, task, train.labels)
    with catch_stop_signals() as asked:
        for result in loop.fit(
            state, train, val, task=task, recipe=recipe, class_weights=class_weights,
            augmentation=build_augmentation(wanted, meta), normalization=normalisation, seed=wanted.seed, fabric=fabric,
            checkpoints=checkpoints, pending_signal=asked,
        ):  # fmt: skip
            if journal is not None:
                _report_epoch(result, recipe, journal)


def _check_nodes_agree(fabric: Fabric, folder: Path | None) -> None:
    """Makes sure that all machines train the same, and that the first one keeps it."""
    name = fabric.broadcast(None if folder is None else folder.name)
    if name is None:
        raise UserError(
            "the first process is not on the machine that runs the stage; set PET_NODE_RANK to 0 there, and to 1 and so"
            " on elsewhere"
        )
    if folder is None and fabric.local_rank == 0 and resume.hash_fingerprint(resume.compute_fingerprint()) != name:
        raise UserError("params.yaml, data, code or libraries are others here than on the first machine")


def _build_model(
    wanted: ModelParams, meta: ArrayMetadata, task: Task
) -> tuple[dict[str, Any], nn.Module, dict[str, str] | None]:
    """What `create_model` is called with, the network, and which weights it starts from."""
    described: dict[str, Any] = {
        "backbone": wanted.backbone,
        "num_classes": len(meta.classes) - task.num_omitted_outputs,
        "image_size": meta.image_size,
        "in_chans": meta.channels,
        "pretrained": wanted.pretrained,
        "dropout": wanted.dropout,
        "drop_path": wanted.drop_path,
        "fade": wanted.fade.model_dump() if wanted.fade else None,
    }
    try:
        first = Path(wanted.weights) if Path(wanted.weights) != paths.NO_WEIGHTS else None
        model = create_model(**{**described, "pretrained": wanted.pretrained and first is None})
    except (ValueError, RuntimeError) as error:
        raise UserError(f"params.yaml: model: {error}") from error
    except OSError as error:
        if not wanted.pretrained:
            raise
        raise UserError(
            f"the pretrained weights of {wanted.backbone} cannot be had ({type(error).__name__}); check the network, or"
            " set model.pretrained to false"
        ) from error
    if first is None:
        return described, model, None
    try:
        load_weights(model, first)
    except ValueError as error:
        raise UserError(f"params.yaml: model.weights: {error}") from error
    return described, model, {"file": first.name, "sha256": checksum(first, "sha256")}


def resolve_normalization(wanted: ModelParams, meta: ArrayMetadata, model: nn.Module) -> Normalization:
    """Mean and deviation that the network's input is normalised with."""
    if wanted.normalise == "data":
        return Normalization(tuple(meta.channel_mean), tuple(max(std, 1e-6) for std in meta.channel_std))
    if wanted.normalise == "imagenet":
        return IMAGENET.for_channels(meta.channels)
    config = timm.data.resolve_model_data_config(model)
    return Normalization(tuple(config["mean"]), tuple(config["std"])).for_channels(meta.channels)


def build_augmentation(wanted: Params, meta: ArrayMetadata) -> Augmentation:
    """Random changes; none of left and right where these are labels."""
    chosen = wanted.augment.model_dump() | {"erasing_scale": tuple(wanted.augment.erasing_scale)}
    if wanted.augment.horizontal_flip == "auto":
        chosen["horizontal_flip"] = FLIP_PROBABILITY if meta.dataset["mirrors"] else 0.0
    return Augmentation(**chosen)


def resolve_class_weights(wanted: Params, meta: ArrayMetadata, task: Task, labels: Any) -> Any:
    """Weights of the classes in the loss, (classes,).

    Raises:
        UserError: a name is of no class.
    """
    chosen = wanted.train.class_weights
    if chosen == "auto":
        return task.balanced_weights(labels, len(meta.classes))
    given: Mapping[str, float] = {} if chosen == "none" else chosen
    for name in given:
        if name not in meta.classes:
            raise UserError(
                f"params.yaml: train.class_weights names {name}, but the classes are {', '.join(meta.classes)}"
            )
    return pd.Series(given, dtype=float).reindex(list(meta.classes)).fillna(1.0).to_numpy()


def _load_last_checkpoint(state: TrainingState, checkpoints: CheckpointManager | None, fabric: Fabric) -> None:
    """Brings the state to where the last checkpoint was; the first process reads it for all."""
    found = checkpoints.load_latest() if checkpoints is not None else None
    if fabric.world_size > 1:
        found = fabric.broadcast(found)
    if found is not None:
        state.load_state_dict(found)
        if checkpoints is not None:
            print(f"taken up after epoch {state.epoch}, batch {state.batch} of the next, step {state.step}")


def _report_epoch(result: EpochResult, recipe: Recipe, journal: Journal) -> None:
    """Log an epoch's result and print it."""
    journal.add_epoch(asdict(result))
    journal.flush()
    auc = "undefined" if result.val_auc is None else f"{result.val_auc:.4f}"
    print(
        f"epoch {result.epoch:3d}/{recipe.epochs}: train loss {result.train_loss:.4f} accuracy"
        f" {result.train_accuracy:.4f} | val loss {result.val_loss:.4f} accuracy {result.val_accuracy:.4f} AUC {auc} |"
        f" {result.train_seconds + result.val_seconds:.1f} s"
    )


def history_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per epoch, without what it cost: the same for the same training."""
    return pd.DataFrame(list(results)).drop(columns=list(COST_FIELDS))


def main() -> None:
    """Runs as one of torchrun's processes; a message for people is left in a file for the stage to show."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    try:
        run(folder)
    except (UserError, StageInterrupted) as error:
        if folder is not None:
            told = {"message": str(error), "signal": getattr(error, "signal_number", 0)}
            write_json(folder / f"stopped-{os.environ.get('RANK', 0)}.json", told)
        sys.exit(f"fitting: {error}" if folder is None else 1)


if __name__ == "__main__":
    main()
