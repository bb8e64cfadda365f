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
from typing import NoReturn, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.distributed import distribute_bn
from torch import Tensor
from tqdm import tqdm

from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import Normalization
from fadeformer.errors import StageInterrupted, UserError
from fadeformer.evaluation.metrics import accuracy, auc, log_loss
from fadeformer.models.factory import newly_initialized_modules
from fadeformer.tasks import Task
from fadeformer.training import sampling
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.checkpoints import CheckpointManager
from fadeformer.training.distributed import peak_memory_mib, predict_distributed, report_out_of_memory
from fadeformer.training.optim import lr_multiplier, set_learning_rate, set_trainable
from fadeformer.training.state import EpochResult, Recipe, TrainingState

MAX_REPORTED_IDS = 8  # ids of images in a message


def fit(
    state: TrainingState,
    train: SplitArrays,
    val: SplitArrays,
    *,
    task: Task,
    recipe: Recipe,
    class_weights: NDArray[np.float64],
    augmentation: Augmentation,
    normalization: Normalization,
    seed: int,
    fabric: Fabric,
    checkpoints: CheckpointManager | None = None,
    pending_signal: Callable[[], int] = lambda: 0,
) -> Iterator[EpochResult]:
    """Trains from where the state is, and yields the result of each epoch; `state` then holds the best weights.

    Args:
        state: from `start`, on the device.
        train: images to learn from.
        val: images that choose the epoch.
        task: what kind of classification it is.
        recipe: how to train.
        class_weights: of the loss, (classes,).
        augmentation: random changes to each training image.
        normalization: of the images.
        seed: of every random draw.
        fabric: launched: the device, and the other processes if there are any.
        checkpoints: where the state is kept.
        pending_signal: the number of the signal that asked for it, or 0; looked at in each step.

    Raises:
        UserError: a loss or an output is not finite, memory or the disk is full, a batch is too small to be shared, or
            val cannot choose the epoch.
        Interrupted: it was asked to stop; the state is in a checkpoint.
    """
    world, rank, alone = fabric.world_size, fabric.global_rank, fabric.world_size == 1
    if not alone and fabric.device.type == "cuda":
        # torch's SyncBatchNorm refuses CPU tensors
        state.model = convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
    model, optimizer = fabric.setup(state.model, state.optimizer)
    keeper = checkpoints if rank == 0 else None
    weights = torch.tensor(class_weights, dtype=torch.float32, device=fabric.device)
    per_epoch = -(-len(train.labels) // recipe.batch_size)  # steps
    probe, warmup = recipe.probe_epochs * per_epoch, round(recipe.warmup_epochs * per_epoch)

    def learning_rate(step: int) -> float:
        if step < probe:
            return recipe.learning_rate
        steps = recipe.epochs * per_epoch - probe
        return recipe.learning_rate * lr_multiplier(
            step - probe, steps, warmup, recipe.schedule, state.plateau.multiplier
        )

    def keep() -> None:
        if keeper is not None:
            keeper.save(state.state_dict(), state.step)

    def leave(number: int) -> NoReturn:
        keep()
        where = f"in epoch {state.epoch + 1}, after step {state.step}"
        raise StageInterrupted(f"stopped by {Signals(number).name} {where}; run again to go on from there", number)

    def leave_if_asked() -> None:
        if number := pending_signal():
            leave(number)

    while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.early_stopping_patience:
        epoch, rate = state.epoch + 1, learning_rate(state.epoch * per_epoch)
        probing = epoch <= recipe.probe_epochs
        if recipe.probe_epochs:  # else what a caller has frozen stays so
            set_trainable(state.model, newly_initialized_modules(state.model), only_new=probing)
        model.train(not probing)
        order = sampling.sample_batches(
            train.labels, task, recipe.sampling, recipe.batch_size, sampling.derive_seed(seed, epoch, 0)
        )
        sampling.check_batch_size(order, world, recipe.accumulate)
        own = [rows[sampling.shard_slice(len(rows), rank, world)] for rows in order]  # of this process
        began = time.perf_counter() - state.train_seconds
        with _progress_bar(epoch, recipe.epochs, len(train.labels), state.seen, fabric) as bar:
            for images in sampling.prefetch_batches(train.images, own[state.batch :], fabric.device):
                arrived = time.perf_counter()
                set_learning_rate(state.optimizer, learning_rate(state.step))
                rows, count = own[state.batch], len(order[state.batch])
                draws = augmentation.draw_uniforms(count, sampling.derive_seed(seed, epoch, 1, state.batch))
                draws = draws[sampling.shard_slice(count, rank, world)]
                labels = torch.from_numpy(train.labels[rows])
                torch.manual_seed(sampling.derive_seed(seed, epoch, 2, state.batch) + rank)  # of dropout

                with report_out_of_memory(recipe.batch_size, recipe.accumulate):
                    parts, right = [], torch.zeros((), device=fabric.device)
                    for number in range(recipe.accumulate):
                        part = sampling.shard_slice(len(rows), number, recipe.accumulate)
                        truth = labels[part].to(fabric.device, non_blocking=True)
                        targets = task.smooth_targets(task.targets(truth, len(weights)), recipe.label_smoothing)
                        seen = augmentation(images[part], draws[part], normalization)
                        seen, targets = augmentation.mix_batch(seen, targets, draws[part])
                        with fabric.no_backward_sync(model, enabled=not alone and number < recipe.accumulate - 1):
                            logits = model(seen)
                            losses = task.losses(logits.float(), targets, weights, recipe.focal_gamma)
                            fabric.backward(losses.sum() * world / count)
                        parts.append(losses.detach())
                        right += task.correct(logits.detach(), truth).sum()
                    losses = torch.cat(parts)
                    sums = torch.stack([losses.sum(), right, right.new_tensor(pending_signal() > 0)])
                    loss, right_of_all, stop = cast(Tensor, fabric.all_reduce(sums, reduce_op="sum")).tolist()
                    if not math.isfinite(loss):
                        where = f"the loss is {loss} at epoch {epoch}, batch {state.batch + 1}, step {state.step + 1}"
                        wrong = ~losses.isfinite().cpu().numpy()
                        suspects = rows[wrong] if wrong.any() else rows  # none where the loss is another process's
                        raise _divergence_error(where, train, suspects, learning_rate(state.step), checkpoints)
                    if recipe.clip is not None:
                        fabric.clip_gradients(model, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if state.ema is not None:
                        state.ema.update(state.model, step=state.step)

                state.loss, state.right, state.seen = state.loss + loss, state.right + right_of_all, state.seen + count
                state.batch, state.step = state.batch + 1, state.step + 1
                state.train_seconds = time.perf_counter() - began
                state.device_seconds += time.perf_counter() - arrived
                bar.set_postfix(loss=f"{state.loss / state.seen:.3f}", refresh=False)
                bar.update(count)
                if stop:
                    leave(pending_signal() or SIGTERM)
                if keeper is not None and keeper.is_due():
                    keep()

        if not alone:
            # on CPUs each process has running statistics of its own
            distribute_bn(state.eval_model, world, reduce=True)  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        logits_of_val = predict_distributed(
            state.eval_model, val.images, recipe.batch_size, fabric, normalization,
            on_batch=leave_if_asked if alone else lambda: None,
        )  # fmt: skip
        if not np.isfinite(logits_of_val).all():
            wrong = np.flatnonzero(~np.isfinite(logits_of_val).all(axis=1))
            where = f"outputs on val are not finite after epoch {epoch}"
            raise _divergence_error(where, val, wrong, learning_rate(state.step - 1), checkpoints)
        scores = task.probabilities(logits_of_val)
        val_loss, val_auc = log_loss(val.labels, scores, task), auc(val.labels, scores, task)
        val_accuracy = accuracy(val.labels, scores, task)
        cost = state.train_seconds, state.device_seconds, time.perf_counter() - began
        result = EpochResult(
            epoch, state.loss / state.seen, state.right / state.seen, val_loss, val_accuracy, val_auc, rate,
            *cost, peak_memory_mib(fabric.device),
        )  # fmt: skip
        state.end_epoch(result, _monitored_value(result, recipe.monitor))
        keep()
        yield result


def _progress_bar(epoch: int, epochs: int, images: int, seen: int, fabric: Fabric) -> tqdm:  # type: ignore[type-arg]
    """Progress of an epoch with images per second and the time left; none where nobody looks at it."""
    disable = None if fabric.global_rank == 0 else True
    title = f"epoch {epoch}/{epochs}"
    return tqdm(total=images, initial=seen, desc=title, unit=" images", leave=False, disable=disable, smoothing=0.1)


def _monitored_value(result: EpochResult, monitor: str) -> float:
    """How good an epoch was, more is better."""
    if monitor == "loss":
        return -result.val_loss
    value = result.val_auc if monitor == "auc" else result.val_accuracy
    if value is None:
        raise UserError(
            "params.yaml: train.monitor is auc, but val lacks images of every class but one; set it to loss"
        )
    return value


def _divergence_error(
    what: str, images: SplitArrays, rows: NDArray[np.int64], learning_rate: float, checkpoints: CheckpointManager | None
) -> UserError:
    ids = images.index["id"].to_numpy()[rows] if "id" in images.index else rows
    told = ", ".join(map(str, ids[:MAX_REPORTED_IDS])) + (
        f" and {len(ids) - MAX_REPORTED_IDS} more" if len(ids) > MAX_REPORTED_IDS else ""
    )
    kept = f"; the last good checkpoint is {checkpoints.paths[0]}" if checkpoints and checkpoints.paths else ""
    return UserError(
        f"training has diverged: {what}, on the images {told}; lower train.learning_rate (now {learning_rate:g}), set"
        f" train.clip to 1.0 or train.precision to 32{kept}"
    )
