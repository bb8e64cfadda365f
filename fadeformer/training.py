"""The training loop: one function, in the order in which things happen.

`fit` yields one result per epoch and knows no logger. A batch is drawn from the seed, the epoch and its number alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import lr_scheduler
from tqdm import tqdm

from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.errors import UserError
from fadeformer.inference import autocast, logits_of
from fadeformer.metrics import accuracy, auc, log_loss
from fadeformer.tasks import Task


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the fields are keys of `train:` in params.yaml.

    Attributes:
        epochs: at most.
        batch_size: images.
        optimizer: by timm's name.
        learning_rate: at the start.
        weight_decay: as the optimiser means it.
        schedule: of the learning rate.
        plateau_factor: by which a plateau multiplies it.
        plateau_patience: epochs without improvement before that.
        early_stopping_patience: epochs without improvement before training ends.
        sampling: weighted draws every class equally often, uniform every image once an epoch.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    schedule: Literal["cosine", "plateau", "constant"]
    plateau_factor: float
    plateau_patience: int
    early_stopping_patience: int
    sampling: Literal["weighted", "uniform"]


@dataclass
class State:
    """All that changes while a network is trained.

    Attributes:
        model: the network.
        optimizer: of its weights.
        scheduler: of the learning rate; None for a constant one.
        epoch: epochs finished.
        best_loss: lowest validation loss so far.
        best_epoch: the epoch that had it.
        best_weights: a copy of the weights it left.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler | None
    epoch: int
    best_loss: float
    best_epoch: int
    best_weights: dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch: losses, accuracies and AUC in [0, 1], and the learning rate it was trained with."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_auc: float | None
    learning_rate: float


def start(model: nn.Module, recipe: Recipe) -> State:
    """A network, not yet trained, with its optimiser and schedule.

    Raises:
        UserError: timm knows no optimiser of that name.
    """
    try:
        optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay,
            filter_bias_and_bn=recipe.optimizer != "adam",
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise UserError(f"params.yaml: train.optimizer is {recipe.optimizer!r}, which timm does not know") from error
    scheduler: lr_scheduler.LRScheduler | None = None
    if recipe.schedule == "cosine":
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    elif recipe.schedule == "plateau":
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=recipe.plateau_factor, patience=recipe.plateau_patience
        )
    return State(model, optimizer, scheduler, 0, math.inf, 0, {})


def fit(
    state: State,
    train: Images,
    val: Images,
    *,
    task: Task,
    recipe: Recipe,
    augmentation: Augmentation,
    seed: int,
    device: torch.device,
    precision: torch.dtype,
) -> Iterator[Epoch]:
    """Trains, and yields the result of each epoch; `state` then holds the best weights.

    Args:
        state: from `start`, its model on `device`.
        train: images to learn from.
        val: images that choose the epoch.
        task: what kind of classification it is.
        recipe: how to train.
        augmentation: random changes to each training image.
        seed: of every random draw.
        device: where the model is.
        precision: float32, or bfloat16 for automatic mixed precision.

    Raises:
        UserError: the loss or an output is not finite.
    """
    weights = sampling_weights(train.labels, task)
    while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.early_stopping_patience:
        epoch = state.epoch + 1
        torch.manual_seed(_mix(seed, epoch, 0))
        learning_rate = state.optimizer.param_groups[0]["lr"]
        order = _order(weights if recipe.sampling == "weighted" else None, len(weights), _mix(seed, epoch, 1))
        batches = [order[i : i + recipe.batch_size] for i in range(0, len(order), recipe.batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()  # batch normalisation needs more than one image

        state.model.train()
        total, right, seen = 0.0, 0.0, 0
        progress = tqdm(batches, desc=f"epoch {epoch}/{recipe.epochs}", unit="batch", leave=False, disable=None)
        for number, chosen in enumerate(progress):
            generator = torch.Generator(device).manual_seed(_mix(seed, epoch, 2 + number))
            images = torch.from_numpy(train.pixels[chosen]).to(device, non_blocking=True)
            labels = torch.from_numpy(train.labels[chosen]).to(device, non_blocking=True)

            with autocast(device, precision):
                logits = state.model(augmentation(images, generator))
            loss = task.loss(logits.float(), labels)
            if not torch.isfinite(loss):
                raise _diverged(f"the loss is {loss.item()} at epoch {epoch}, batch {number + 1}", learning_rate)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()

            scores = task.probabilities(logits.detach().double().cpu().numpy())
            total += loss.item() * len(chosen)
            right += accuracy(train.labels[chosen], scores, task) * len(chosen)
            seen += len(chosen)
            progress.set_postfix(loss=f"{total / seen:.3f}", accuracy=f"{right / seen:.3f}")

        val_logits = logits_of(state.model, val.pixels, recipe.batch_size, device, precision)
        if not np.isfinite(val_logits).all():
            raise _diverged(f"the outputs are not finite after epoch {epoch}", learning_rate)
        scores = task.probabilities(val_logits)
        val_loss = log_loss(val.labels, scores, task)
        state.epoch = epoch
        if val_loss < state.best_loss:
            state.best_loss, state.best_epoch = val_loss, epoch
            state.best_weights = {
                name: value.detach().cpu().clone() for name, value in state.model.state_dict().items()
            }
        if isinstance(state.scheduler, lr_scheduler.ReduceLROnPlateau):
            state.scheduler.step(val_loss)
        elif state.scheduler is not None:
            state.scheduler.step()
        yield Epoch(
            epoch, total / seen, right / seen, val_loss, accuracy(val.labels, scores, task),
            auc(val.labels, scores, task), learning_rate,
        )  # fmt: skip


def sampling_weights(labels: NDArray[np.int64], task: Task) -> NDArray[np.float64]:
    """How often each image is drawn, relative to the others: the inverse of how common its class is.

    An image with several findings counts by its rarest, one with none by how many have none.

    Args:
        labels: (images, labels).
        task: what kind of classification it is.

    Returns:
        (images,), not normalised.
    """
    if not task.multi_label:
        return 1.0 / np.bincount(labels[:, 0])[labels[:, 0]]
    present = labels.astype(bool)
    rarity = np.where(present, 1.0 / np.maximum(present.sum(axis=0), 1), 0.0).max(axis=1)
    return np.where(present.any(axis=1), rarity, 1.0 / max(1, int((~present.any(axis=1)).sum())))


def _diverged(what: str, learning_rate: float) -> UserError:
    remedy = f"lower train.learning_rate (now {learning_rate:g}) or set train.precision to fp32"
    return UserError(f"training has diverged: {what}; {remedy}")


def _order(weights: NDArray[np.float64] | None, count: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    if weights is None:
        return generator.permutation(count)
    return generator.choice(count, size=count, replace=True, p=weights / weights.sum())


def _mix(seed: int, epoch: int, number: int) -> int:
    """A seed for each use of randomness, unlike all others."""
    return int(np.random.SeedSequence([seed, epoch, number]).generate_state(1, np.uint64)[0] >> 1)
