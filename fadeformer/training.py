"""The training loop: one function, in the order in which things happen.

`fit` yields one result per epoch and knows no logger. All that it changes is a `State`, which a checkpoint holds whole.
Every random number comes from the seed, the epoch and the number of the batch alone, so that a training taken up from a
checkpoint goes on to the bit as if it had not been interrupted, and sees the same batches on any number of devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from signal import SIGTERM, Signals
from typing import NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from tqdm import tqdm

from fadeformer import batches
from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.checkpoints import Checkpoints
from fadeformer.devices import Measured, Meter, peak_memory, predict_together, within_memory
from fadeformer.errors import Interrupted, UserError
from fadeformer.metrics import accuracy, auc, log_loss
from fadeformer.models import new_to_backbone
from fadeformer.normalisation import Normalisation
from fadeformer.optimisation import pace, set_learning_rate, unfreeze
from fadeformer.state import Epoch, Recipe, State
from fadeformer.tasks import Task

SHOWN = 8  # ids of images in a message


def fit(
    state: State,
    train: Images,
    val: Images,
    *,
    task: Task,
    recipe: Recipe,
    class_weights: NDArray[np.float64],
    augmentation: Augmentation,
    normalisation: Normalisation,
    seed: int,
    fabric: Fabric,
    precision: torch.dtype,
    checkpoints: Checkpoints | None = None,
    asked_to_stop: Callable[[], int] = lambda: 0,
) -> Iterator[Epoch]:
    """Trains from where the state is, and yields the result of each epoch; `state` then holds the best weights.

    Args:
        state: from `start`, on the device.
        train: images to learn from.
        val: images that choose the epoch.
        task: what kind of classification it is.
        recipe: how to train.
        class_weights: of the loss, (classes,).
        augmentation: random changes to each training image.
        normalisation: of the images.
        seed: of every random draw.
        fabric: launched: the device, and the other processes if there are any.
        precision: that of fabric.
        checkpoints: where the state is kept.
        asked_to_stop: the number of the signal that asked for it, or 0; looked at in each step.

    Raises:
        UserError: a loss or an output is not finite, memory or the disk is full, a batch is too small to be shared, or
            val cannot choose the epoch.
        Interrupted: it was asked to stop; the state is in a checkpoint.
    """
    model, optimizer = fabric.setup(state.model, state.optimizer)
    alone, meter = fabric.world_size == 1, Meter(fabric.device)
    keeper = checkpoints if fabric.global_rank == 0 else None
    weights = torch.tensor(class_weights, dtype=torch.float32, device=fabric.device)
    per_epoch = -(-len(train.labels) // recipe.batch_size)  # steps
    probe, warmup = recipe.probe_epochs * per_epoch, round(recipe.warmup_epochs * per_epoch)

    def learning_rate(step: int) -> float:
        if step < probe:
            return recipe.learning_rate
        steps = recipe.epochs * per_epoch - probe
        return recipe.learning_rate * pace(step - probe, steps, warmup, recipe.schedule, state.plateau.rate)

    def keep() -> None:
        state.device_seconds += meter.take()
        if keeper is not None:
            keeper.save(state.state_dict(), state.step)

    def leave(number: int) -> NoReturn:
        keep()
        where = f"in epoch {state.epoch + 1}, after step {state.step}"
        raise Interrupted(f"stopped by {Signals(number).name} {where}; run again to go on from there", number)

    def leave_if_asked() -> None:
        if number := asked_to_stop():
            leave(number)

    while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.early_stopping_patience:
        epoch, rate = state.epoch + 1, learning_rate(state.epoch * per_epoch)
        probing = epoch <= recipe.probe_epochs
        if recipe.probe_epochs:  # else what a caller has frozen stays so
            unfreeze(state.model, new_to_backbone(state.model), only_new=probing)
        model.train(not probing)
        order = batches.draw(train.labels, task, recipe.sampling, recipe.batch_size, batches.mix(seed, epoch, 0))
        left = batches.shared(order, fabric.global_rank, fabric.world_size, recipe.accumulate)[state.batch :]
        began = time.perf_counter() - state.train_seconds
        with _bar(epoch, recipe.epochs, len(train.labels), state.seen, fabric) as bar:
            for batch, images in zip(left, batches.feed(train.pixels, left, fabric.device), strict=True):
                set_learning_rate(state.optimizer, learning_rate(state.step))
                seeds = [batches.mix(seed, epoch, use, state.batch) for use in (1, 2)]
                draws = augmentation.draw(batch.count, seeds[0])
                labels = torch.from_numpy(train.labels[batch.rows])
                measured = Measured(batch.own)

                with meter, within_memory(recipe.batch_size, recipe.accumulate):
                    for number, (part, places) in enumerate(batch.split(images)):
                        torch.manual_seed(seeds[1])  # of dropout; alike for all parts, which take their rows of it
                        truth = labels[places].to(fabric.device, non_blocking=True)
                        targets = task.smooth(task.targets(truth, len(weights)), recipe.label_smoothing)
                        seen = augmentation(part, draws[places], normalisation)
                        seen, targets = augmentation.mix(seen, targets, draws[places])
                        last = number == recipe.accumulate - 1
                        with fabric.no_backward_sync(model, enabled=not last and not alone):
                            with batch.as_whole(places):
                                logits = model(seen)
                            losses = task.losses(logits.float(), targets, weights, recipe.focal_gamma)
                            measured.add(losses.detach(), task.right(logits.detach(), truth))
                            if last:
                                measured.send(fabric, asked_to_stop())
                            fabric.backward(losses.sum() * fabric.world_size / batch.count)
                    if recipe.clip is not None:
                        fabric.clip_gradients(model, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if state.ema is not None:
                        state.ema.update(state.model, step=state.step)

                loss, right, another_leaves = measured.read()
                if not math.isfinite(loss):
                    where = f"the loss is {loss} at epoch {epoch}, batch {state.batch + 1}, step {state.step + 1}"
                    raise _diverged(where, train, measured.suspects(), learning_rate(state.step), checkpoints)
                state.loss, state.right, state.seen = state.loss + loss, state.right + right, state.seen + batch.count
                state.batch, state.step = state.batch + 1, state.step + 1
                state.train_seconds = time.perf_counter() - began
                bar.set_postfix(loss=f"{state.loss / state.seen:.3f}", refresh=False)
                bar.update(batch.count)
                if alone:
                    leave_if_asked()
                elif another_leaves:
                    leave(asked_to_stop() or SIGTERM)
                if keeper is not None and keeper.due():
                    keep()

        began = time.perf_counter()
        logits_of_val = predict_together(
            state.judged, val.pixels, recipe.batch_size, fabric, precision, normalisation,
            each=leave_if_asked if alone else lambda: None,
        )  # fmt: skip
        if not np.isfinite(logits_of_val).all():
            wrong = np.flatnonzero(~np.isfinite(logits_of_val).all(axis=1))
            where = f"outputs on val are not finite after epoch {epoch}"
            raise _diverged(where, val, wrong, learning_rate(state.step - 1), checkpoints)
        scores = task.probabilities(logits_of_val)
        val_loss, val_auc = log_loss(val.labels, scores, task), auc(val.labels, scores, task)
        val_accuracy = accuracy(val.labels, scores, task)
        cost = state.train_seconds, state.device_seconds + meter.take(), time.perf_counter() - began
        result = Epoch(
            epoch, state.loss / state.seen, state.right / state.seen, val_loss, val_accuracy, val_auc, rate,
            *cost, peak_memory(fabric.device),
        )  # fmt: skip
        state.finish(result, _score(result, recipe.monitor))
        keep()
        yield result


def _bar(epoch: int, epochs: int, images: int, seen: int, fabric: Fabric) -> tqdm:  # type: ignore[type-arg]
    """Progress of an epoch with images per second and the time left; none where nobody looks at it."""
    disable = None if fabric.global_rank == 0 else True
    title = f"epoch {epoch}/{epochs}"
    return tqdm(total=images, initial=seen, desc=title, unit=" images", leave=False, disable=disable, smoothing=0.1)


def _score(result: Epoch, monitor: str) -> float:
    """How good an epoch was, more is better."""
    if monitor == "loss":
        return -result.val_loss
    value = result.val_auc if monitor == "auc" else result.val_accuracy
    if value is None:
        raise UserError(
            "params.yaml: train.monitor is auc, but val lacks images of every class but one; set it to loss"
        )
    return value


def _diverged(
    what: str, images: Images, rows: NDArray[np.int64], learning_rate: float, checkpoints: Checkpoints | None
) -> UserError:
    ids = images.index["id"].to_numpy()[rows] if "id" in images.index else rows
    told = ", ".join(map(str, ids[:SHOWN])) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    kept = f"; the last good checkpoint is {checkpoints.paths[0]}" if checkpoints and checkpoints.paths else ""
    return UserError(
        f"training has diverged: {what}, on the images {told}; lower train.learning_rate (now {learning_rate:g}), set"
        f" train.clip to 1.0 or train.precision to 32{kept}"
    )
