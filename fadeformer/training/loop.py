"""The training loop: schedule, forward, loss, backward, clip, step; per epoch validation, checkpoint, early stopping.

`fit` yields one result per epoch; the caller logs it. Everything that changes is in a `TrainingState`, which
checkpoints store completely. All random numbers derive from the seed, the epoch and the batch number (dropout also from
the rank), so on a CPU a resumed run is bitwise identical to an uninterrupted one, and any number of devices sees the
same batches.
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
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import Normalization
from fadeformer.errors import StageInterrupted, UserError
from fadeformer.evaluation.metrics import accuracy, auc, log_loss, selecting_classes
from fadeformer.models.factory import newly_initialized_modules, set_probe_mode
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
    """Train from the current state and yield the result of each remaining epoch; `state` then holds the best weights.

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
    loop = _Loop(
        state, train, val, task, recipe, class_weights, augmentation, normalization, seed, fabric, checkpoints,
        pending_signal,
    )  # fmt: skip
    while state.epoch < recipe.epochs and state.epoch - state.best_epoch < recipe.early_stopping_patience:
        rate = loop.learning_rate(state.epoch * loop.steps_per_epoch)
        loop.train_epoch()
        yield loop.validate(rate)


class _Loop:
    """The parts of one training on one process: epoch, step, validation. Arguments are those of `fit`."""

    def __init__(
        self,
        state: TrainingState,
        train: SplitArrays,
        val: SplitArrays,
        task: Task,
        recipe: Recipe,
        class_weights: NDArray[np.float64],
        augmentation: Augmentation,
        normalization: Normalization,
        seed: int,
        fabric: Fabric,
        checkpoints: CheckpointManager | None,
        pending_signal: Callable[[], int],
    ) -> None:
        self.state, self.train, self.val, self.task, self.recipe = state, train, val, task, recipe
        self.augmentation, self.normalization, self.seed, self.fabric = augmentation, normalization, seed, fabric
        self.checkpoints, self.pending_signal = checkpoints, pending_signal
        self.single_process = fabric.world_size == 1
        if not self.single_process and fabric.device.type == "cuda":
            # SyncBatchNorm does not support CPU tensors
            state.model = convert_sync_batchnorm(state.model)  # type: ignore[no-untyped-call]
        self.model, self.optimizer = fabric.setup(state.model, state.optimizer)
        self.manager = checkpoints if fabric.global_rank == 0 else None
        self.weights = torch.tensor(class_weights, dtype=torch.float32, device=fabric.device)
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in state.model.modules())
        self.steps_per_epoch = sampling.num_batches(len(train.labels), recipe.batch_size)
        self.selecting = selecting_classes(val.labels, len(class_weights), task)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: constant during the probe, then by schedule and plateau."""
        recipe = self.recipe
        probe_steps = recipe.probe_epochs * self.steps_per_epoch
        if step < probe_steps:
            return recipe.learning_rate
        warmup_steps = round(recipe.warmup_epochs * self.steps_per_epoch)
        steps = recipe.epochs * self.steps_per_epoch - probe_steps
        return recipe.learning_rate * lr_multiplier(
            step - probe_steps, steps, warmup_steps, recipe.schedule, self.state.plateau.multiplier
        )

    def save_checkpoint(self) -> None:
        """Save the state, on the first process only."""
        if self.manager is not None:
            self.manager.save(self.state.state_dict(), self.state.step)

    def stop(self, number: int) -> NoReturn:
        """Save a checkpoint and raise StageInterrupted for a signal."""
        self.save_checkpoint()
        where = f"in epoch {self.state.epoch + 1}, after step {self.state.step}"
        raise StageInterrupted(f"stopped by {Signals(number).name} {where}; run again to resume from there", number)

    def stop_if_signaled(self) -> None:
        """Stop if a signal was received."""
        if number := self.pending_signal():
            self.stop(number)

    def train_epoch(self) -> None:
        """Train the batches of the current epoch that are left."""
        state, recipe, fabric, epoch = self.state, self.recipe, self.fabric, self.state.epoch + 1
        world_size, rank = fabric.world_size, fabric.global_rank
        probing = epoch <= recipe.probe_epochs
        if recipe.probe_epochs:  # otherwise keep the caller's frozen parameters
            set_trainable(state.model, newly_initialized_modules(state.model), only_new=probing)
        self.model.train(not probing)
        if probing:
            set_probe_mode(state.model)
        labels = self.train.labels
        seed = sampling.derive_seed(self.seed, epoch, 0)
        batches = sampling.sample_batches(labels, self.task, recipe.sampling, recipe.batch_size, seed)
        sampling.check_batch_size(batches, world_size, recipe.accumulate, has_batch_norm=self.has_batch_norm)
        local_batches = [rows[sampling.shard_slice(len(rows), rank, world_size)] for rows in batches]
        start = time.perf_counter() - state.train_seconds
        with _progress_bar(epoch, recipe.epochs, len(labels), state.num_seen, fabric) as bar:
            for images in sampling.prefetch_batches(self.train.images, local_batches[state.batch :], fabric.device):
                batch_start, count = time.perf_counter(), len(batches[state.batch])
                with report_out_of_memory(recipe.batch_size, recipe.accumulate):
                    loss, num_correct, signaled = self._train_batch(images, local_batches[state.batch], count)
                state.loss_sum, state.num_correct = state.loss_sum + loss, state.num_correct + num_correct
                state.num_seen += count
                state.batch, state.step = state.batch + 1, state.step + 1
                state.train_seconds = time.perf_counter() - start
                state.device_seconds += time.perf_counter() - batch_start
                bar.set_postfix(loss=f"{state.loss_sum / state.num_seen:.3f}", refresh=False)
                bar.update(count)
                if signaled:
                    self.stop(self.pending_signal() or SIGTERM)
                if self.manager is not None and self.manager.is_due():
                    self.save_checkpoint()

    def _train_batch(self, images: Tensor, rows: NDArray[np.int64], count: int) -> tuple[float, float, float]:
        """Take one optimizer step.

        Args:
            images: uint8 images of this process, (B, H, W, C), on the device.
            rows: their rows in train, (B,).
            count: number of images of the batch over all processes.

        Returns:
            Over all processes: sum of the losses, number of correct images, number of processes with a pending signal.
        """
        state, recipe, fabric, epoch = self.state, self.recipe, self.fabric, self.state.epoch + 1
        world_size, rank = fabric.world_size, fabric.global_rank
        set_learning_rate(state.optimizer, self.learning_rate(state.step))
        draws = self.augmentation.draw_uniforms(count, sampling.derive_seed(self.seed, epoch, 1, state.batch))
        draws = draws[sampling.shard_slice(count, rank, world_size)]
        labels = torch.from_numpy(self.train.labels[rows])
        torch.manual_seed(sampling.derive_seed(self.seed, epoch, 2, state.batch) + rank)  # dropout
        micro_losses, num_correct = [], torch.zeros((), device=fabric.device)
        for number in range(recipe.accumulate):
            micro = sampling.shard_slice(len(rows), number, recipe.accumulate)
            accumulating = number < recipe.accumulate - 1
            with fabric.no_backward_sync(self.model, enabled=not self.single_process and accumulating):
                losses, correct = self._backward(images[micro], labels[micro], draws[micro], count)
            micro_losses.append(losses)
            num_correct += correct
        losses = torch.cat(micro_losses)
        sums = torch.stack([losses.sum(), num_correct, num_correct.new_tensor(self.pending_signal() > 0)])
        loss, total_correct, signaled = cast(Tensor, fabric.all_reduce(sums, reduce_op="sum")).tolist()
        if not math.isfinite(loss):
            problem = f"the loss is {loss} at epoch {epoch}, batch {state.batch + 1}, step {state.step + 1}"
            nonfinite = ~losses.isfinite().cpu().numpy()
            suspect_rows = rows[nonfinite] if nonfinite.any() else rows  # all rows if the cause is in another process
            raise _divergence_error(problem, self.train, suspect_rows, self.learning_rate(state.step), self.checkpoints)
        if recipe.clip is not None:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)
        return loss, total_correct, signaled

    def _backward(self, images: Tensor, labels: Tensor, draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Run a micro-batch forward and backward; return the loss of each image, (B,), and the number correct."""
        labels = labels.to(self.fabric.device, non_blocking=True)
        targets = self.task.smooth_targets(self.task.targets(labels, len(self.weights)), self.recipe.label_smoothing)
        inputs = self.augmentation(images, draws, self.normalization)
        inputs, targets = self.augmentation.mix_batch(inputs, targets, draws)
        logits = self.model(inputs)
        losses = self.task.losses(logits.float(), targets, self.weights, self.recipe.focal_gamma)
        self.fabric.backward(losses.sum() * self.fabric.world_size / count)  # DDP averages over processes
        return losses.detach(), self.task.correct(logits.detach(), labels).sum()

    def validate(self, rate: float) -> EpochResult:
        """Evaluate the epoch on val, end it with a checkpoint, and return its result.

        Args:
            rate: learning rate at the start of the epoch.
        """
        state, recipe, task, val, epoch = self.state, self.recipe, self.task, self.val, self.state.epoch + 1
        if not self.single_process:
            # without SyncBatchNorm, on CPUs, running statistics differ between processes
            distribute_bn(state.eval_model, self.fabric.world_size, reduce=True)  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        logits = predict_distributed(
            state.eval_model, val.images, recipe.batch_size, self.fabric, self.normalization,
            on_batch=self.stop_if_signaled if self.single_process else lambda: None,
        )  # fmt: skip
        if not np.isfinite(logits).all():
            suspect_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            problem = f"outputs on val are not finite after epoch {epoch}"
            raise _divergence_error(problem, val, suspect_rows, self.learning_rate(state.step - 1), self.checkpoints)
        labels, scores = val.labels, task.probabilities(logits)
        val_auc = auc(labels, scores, task, self.selecting)
        if task.multi_label:  # findings with too few images do not select the epoch
            labels, scores = labels[:, self.selecting], scores[:, self.selecting]
        val_loss, val_accuracy = log_loss(labels, scores, task), accuracy(labels, scores, task)
        seconds = state.train_seconds, state.device_seconds, time.perf_counter() - start
        result = EpochResult(
            epoch, state.loss_sum / state.num_seen, state.num_correct / state.num_seen, val_loss, val_accuracy, val_auc,
            rate, *seconds, peak_memory_mib(self.fabric.device),
        )  # fmt: skip
        state.end_epoch(result, _monitored_value(result, recipe.monitor))
        self.save_checkpoint()
        return result


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
