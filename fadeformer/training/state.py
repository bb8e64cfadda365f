"""Training recipe (hyperparameters), training state, and the result of each epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn, optim

from fadeformer.training.optim import PlateauSchedule, create_optimizer


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters; the fields are keys of `train:` in params.yaml.

    Attributes:
        epochs: maximum number of epochs.
        batch_size: images of an optimizer step, over all devices.
        accumulate: micro-batches per step and device (gradient accumulation).
        optimizer: name of a timm optimizer.
        learning_rate: peak learning rate, after warm-up.
        weight_decay: weight decay, as the optimizer defines it.
        layer_decay: factor of the learning rate from each layer to the one before it.
        schedule: learning-rate schedule.
        warmup_epochs: epochs of linear warm-up.
        plateau_factor: factor of the learning rate when validation loss plateaus.
        plateau_patience: epochs without improvement before that.
        probe_epochs: initial epochs with a frozen backbone (linear probing).
        label_smoothing: fraction of each label that is spread over the classes.
        clip: maximum gradient norm; None disables clipping.
        ema: decay of the exponential moving average of the weights, which is evaluated and saved; 0 disables it.
        monitor: validation metric that selects the best epoch.
        early_stopping_patience: epochs without improvement before training stops.
        sampling: weighted draws images by `sampling.sampling_weights`, uniform draws each image once per epoch.
        focal_gamma: gamma of the focal loss; 0 is cross-entropy.
    """

    epochs: int
    batch_size: int
    accumulate: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    layer_decay: float
    schedule: Literal["cosine", "plateau", "constant"]
    warmup_epochs: float
    plateau_factor: float
    plateau_patience: int
    probe_epochs: int
    label_smoothing: float
    clip: float | None
    ema: float
    monitor: Literal["loss", "accuracy", "auc"]
    early_stopping_patience: int
    sampling: Literal["weighted", "uniform"]
    focal_gamma: float


@dataclass(frozen=True)
class EpochResult:
    """Results of one epoch: losses, accuracies and AUC in [0, 1], and the learning rate of its first step.

    `train_seconds` includes the time spent waiting for images, `device_seconds` does not. `memory_mib` is the peak
    memory of the GPU, or of the process if there is none.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_auc: float | None
    learning_rate: float
    train_seconds: float
    device_seconds: float
    val_seconds: float
    memory_mib: float


# Time and memory, which are not reproducible.
COST_FIELDS = ("train_seconds", "device_seconds", "val_seconds", "memory_mib")


@dataclass
class TrainingState:
    """Everything that changes during training; a checkpoint stores its `state_dict`.

    Attributes:
        model: model in training.
        optimizer: optimizer of its parameters.
        plateau: learning-rate multiplier of the plateau schedule.
        ema: exponential moving average of the weights; None if it is off.
        epoch: number of finished epochs.
        batch: number of finished batches of the current epoch; the position of the sampler.
        step: total number of optimizer steps.
        loss_sum: sum of the training losses of this epoch's images so far.
        num_correct: correct predictions among them.
        num_seen: training images of this epoch so far.
        train_seconds: training time of this epoch so far.
        device_seconds: the same without waiting for images.
        best_score: highest validation score so far; the negative loss if the loss is monitored.
        best_epoch: epoch with this score.
        best_weights: copy of the weights after that epoch.
        history: results of all finished epochs.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    plateau: PlateauSchedule
    ema: ModelEmaV3 | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    num_correct: float = 0.0
    num_seen: int = 0
    train_seconds: float = 0.0
    device_seconds: float = 0.0
    best_score: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochResult] = field(default_factory=list)

    STATEFUL_FIELDS: ClassVar = ("model", "optimizer", "plateau", "ema")

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved: the moving average of the weights if it is on."""
        return self.model if self.ema is None else self.ema.module

    def end_epoch(self, result: EpochResult, score: float) -> None:
        """Record the result of an epoch, and copy the weights if its score is the best so far."""
        self.epoch, self.history = result.epoch, [*self.history, result]
        self.batch, self.num_seen, self.loss_sum, self.num_correct = 0, 0, 0.0, 0.0
        self.train_seconds = self.device_seconds = 0.0
        self.plateau.scheduler.step(result.val_loss)
        if score > self.best_score:
            self.best_score, self.best_epoch = score, result.epoch
            weights = self.eval_model.state_dict()
            self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, the content of a checkpoint."""
        components = {
            name: None if (component := getattr(self, name)) is None else component.state_dict()
            for name in self.STATEFUL_FIELDS
        }
        plain = {name: value for name, value in vars(self).items() if name not in self.STATEFUL_FIELDS}
        return {**plain, **components, "history": [asdict(epoch) for epoch in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        for name in self.STATEFUL_FIELDS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        vars(self).update({name: value for name, value in state.items() if name not in self.STATEFUL_FIELDS})
        self.history = [EpochResult(**epoch) for epoch in state["history"]]


def create_training_state(model: nn.Module, recipe: Recipe) -> TrainingState:
    """Create the initial training state of a model that is on its device.

    Raises:
        UserError: timm has no such optimizer.
    """
    optimizer = create_optimizer(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.layer_decay)
    ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    return TrainingState(model, optimizer, PlateauSchedule(recipe.plateau_factor, recipe.plateau_patience), ema)
