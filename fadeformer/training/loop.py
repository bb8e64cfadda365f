"""The training loop: forward, loss, backward, clip, step; then validation, schedule, checkpoint, early stopping.

`fit` yields one result per epoch; the caller logs it. Everything that changes is in a `TrainingState`, which
checkpoints store completely. All random numbers derive from the seed, the epoch and the batch number, so a resumed run
is bitwise identical to an uninterrupted one, and any number of devices sees the same batches.
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

MAX_REPORTED_IDS = 8  # image ids in a message


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
    """Train from the current state and yield the result of each epoch; `state` then holds the best weights.

    Args:
        state: from `create_training_state`, or resumed from a checkpoint; on the device.
        train: training images.
        val: validation images, which select the best epoch.
        task: classification task.
        recipe: hyperparameters.
        class_weights: weights of the loss, (classes,).
        augmentation: augmentation of the training images.
        normalization: channel means and standard deviations.
        seed: seed of all random numbers.
        fabric: launched Fabric, with the device and the other processes.
        checkpoints: where the state is saved; None disables checkpoints.
        pending_signal: returns the number of a received signal that asks to stop, or 0; called in each step.

    Raises:
        UserError: a loss or an output is not finite, memory or the disk is full, a batch is too small to be divided, or
            the monitored metric is undefined on val.
        StageInterrupted: a signal stopped training; the state is saved in a checkpoint.
    """
    world_size, rank, single_process = fabric.world_size, fabric.global_rank, fabric.world_size == 1
    if not single_process and fabric.device.type == "cuda":
        # SyncBatchNorm does not support CPU tensors
        state.model = convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
    model, optimizer = fabric.setup(state.model, state.optimizer)
    manager = checkpoints if rank == 0 else None
    weights = torch.tensor(class_weights, dtype=torch.float32, device=fabric.device)
    steps_per_epoch = -(-len(train.labels) // recipe.batch_size)
    probe_steps, warmup_steps = recipe.probe_epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)

    def learning_rate(step: int) -> float:
        if step < probe_steps:
            return recipe.learning_rate
        steps = recipe.epochs * steps_per_epoch - probe_steps
        return recipe.learning_rate * lr_multiplier(
            step - probe_steps, steps, warmup_steps, recipe.schedule, state.plateau.multiplier
        )

    def save_checkpoint() -> None:
        if manager is not None:
            manager.save(state.state_dict(), state.step)

    def stop(number: int) -> NoReturn:
        save_checkpoint()
        where = f"in epoch {state.epoch + 1}, after step {state.step}"
        raise StageInterrupted(f"stopped by {Signals(number).name} {where}; run again to resume from there", number)

    def stop_if_signaled() -> None:
        if number := pending_signal():
            stop(number)

    while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.early_stopping_patience:
        epoch, rate = state.epoch + 1, learning_rate(state.epoch * steps_per_epoch)
        probing = epoch <= recipe.probe_epochs
        if recipe.probe_epochs:  # otherwise keep the caller's frozen parameters
            set_trainable(state.model, newly_initialized_modules(state.model), only_new=probing)
        model.train(not probing)
        batches = sampling.sample_batches(
            train.labels, task, recipe.sampling, recipe.batch_size, sampling.derive_seed(seed, epoch, 0)
        )
        sampling.check_batch_size(batches, world_size, recipe.accumulate)
        local_batches = [rows[sampling.shard_slice(len(rows), rank, world_size)] for rows in batches]
        start = time.perf_counter() - state.train_seconds
        with _progress_bar(epoch, recipe.epochs, len(train.labels), state.num_seen, fabric) as bar:
            for images in sampling.prefetch_batches(train.images, local_batches[state.batch :], fabric.device):
                batch_start = time.perf_counter()
                set_learning_rate(state.optimizer, learning_rate(state.step))
                rows, count = local_batches[state.batch], len(batches[state.batch])
                draws = augmentation.draw_uniforms(count, sampling.derive_seed(seed, epoch, 1, state.batch))
                draws = draws[sampling.shard_slice(count, rank, world_size)]
                labels = torch.from_numpy(train.labels[rows])
                torch.manual_seed(sampling.derive_seed(seed, epoch, 2, state.batch) + rank)  # dropout

                with report_out_of_memory(recipe.batch_size, recipe.accumulate):
                    micro_losses, correct = [], torch.zeros((), device=fabric.device)
                    for number in range(recipe.accumulate):
                        micro = sampling.shard_slice(len(rows), number, recipe.accumulate)
                        micro_labels = labels[micro].to(fabric.device, non_blocking=True)
                        targets = task.smooth_targets(task.targets(micro_labels, len(weights)), recipe.label_smoothing)
                        inputs = augmentation(images[micro], draws[micro], normalization)
                        inputs, targets = augmentation.mix_batch(inputs, targets, draws[micro])
                        accumulating = number < recipe.accumulate - 1
                        with fabric.no_backward_sync(model, enabled=not single_process and accumulating):
                            logits = model(inputs)
                            losses = task.losses(logits.float(), targets, weights, recipe.focal_gamma)
                            fabric.backward(losses.sum() * world_size / count)
                        micro_losses.append(losses.detach())
                        correct += task.correct(logits.detach(), micro_labels).sum()
                    losses = torch.cat(micro_losses)
                    sums = torch.stack([losses.sum(), correct, correct.new_tensor(pending_signal() > 0)])
                    loss, batch_correct, signaled = cast(Tensor, fabric.all_reduce(sums, reduce_op="sum")).tolist()
                    if not math.isfinite(loss):
                        problem = f"the loss is {loss} at epoch {epoch}, batch {state.batch + 1}, step {state.step + 1}"
                        nonfinite = ~losses.isfinite().cpu().numpy()
                        # all rows if the cause is in another process
                        suspect_rows = rows[nonfinite] if nonfinite.any() else rows
                        raise _divergence_error(problem, train, suspect_rows, learning_rate(state.step), checkpoints)
                    if recipe.clip is not None:
                        fabric.clip_gradients(model, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if state.ema is not None:
                        state.ema.update(state.model, step=state.step)

                state.loss_sum, state.num_correct = state.loss_sum + loss, state.num_correct + batch_correct
                state.num_seen += count
                state.batch, state.step = state.batch + 1, state.step + 1
                state.train_seconds = time.perf_counter() - start
                state.device_seconds += time.perf_counter() - batch_start
                bar.set_postfix(loss=f"{state.loss_sum / state.num_seen:.3f}", refresh=False)
                bar.update(count)
                if signaled:
                    stop(pending_signal() or SIGTERM)
                if manager is not None and manager.is_due():
                    save_checkpoint()

        if not single_process:
            # without SyncBatchNorm, on CPUs, running statistics differ between processes
            distribute_bn(state.eval_model, world_size, reduce=True)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        val_logits = predict_distributed(
            state.eval_model, val.images, recipe.batch_size, fabric, normalization,
            on_batch=stop_if_signaled if single_process else lambda: None,
        )  # fmt: skip
        if not np.isfinite(val_logits).all():
            suspect_rows = np.flatnonzero(~np.isfinite(val_logits).all(axis=1))
            problem = f"outputs on val are not finite after epoch {epoch}"
            raise _divergence_error(problem, val, suspect_rows, learning_rate(state.step - 1), checkpoints)
        scores = task.probabilities(val_logits)
        val_loss, val_auc = log_loss(val.labels, scores, task), auc(val.labels, scores, task)
        val_accuracy = accuracy(val.labels, scores, task)
        seconds = state.train_seconds, state.device_seconds, time.perf_counter() - start
        result = EpochResult(
            epoch, state.loss_sum / state.num_seen, state.num_correct / state.num_seen, val_loss, val_accuracy, val_auc,
            rate, *seconds, peak_memory_mib(fabric.device),
        )  # fmt: skip
        state.end_epoch(result, _monitored_value(result, recipe.monitor))
        save_checkpoint()
        yield result


def _progress_bar(epoch: int, epochs: int, total: int, done: int, fabric: Fabric) -> tqdm:  # type: ignore[type-arg]
    """Create the progress bar of an epoch; disabled without a terminal and on all processes but the first."""
    disable = None if fabric.global_rank == 0 else True
    title = f"epoch {epoch}/{epochs}"
    return tqdm(total=total, initial=done, desc=title, unit=" images", leave=False, disable=disable, smoothing=0.1)


def _monitored_value(result: EpochResult, monitor: str) -> float:
    """Return the monitored metric, negated for the loss, so that higher is better."""
    if monitor == "loss":
        return -result.val_loss
    value = result.val_auc if monitor == "auc" else result.val_accuracy
    if value is None:
        raise UserError(
            "params.yaml: train.monitor is auc, but AUC is undefined, because val has images of one class only; set"
            " train.monitor to loss"
        )
    return value


def _divergence_error(
    problem: str,
    images: SplitArrays,
    rows: NDArray[np.int64],
    learning_rate: float,
    checkpoints: CheckpointManager | None,
) -> UserError:
    ids = images.index["id"].to_numpy()[rows] if "id" in images.index else rows
    shown = ", ".join(map(str, ids[:MAX_REPORTED_IDS])) + (
        f" and {len(ids) - MAX_REPORTED_IDS} more" if len(ids) > MAX_REPORTED_IDS else ""
    )
    checkpoint = f"; the last good checkpoint is {checkpoints.paths[0]}" if checkpoints and checkpoints.paths else ""
    return UserError(
        f"training has diverged: {problem}, on the images {shown}; lower train.learning_rate (now {learning_rate:g}),"
        f" set train.clip to 1.0 or train.precision to 32{checkpoint}"
    )
