"""What a training is made of: the recipe, the state that changes, and the result of each epoch."""

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
    """How a network is trained; the fields are keys of `train:` in params.yaml.

    Attributes:
        epochs: at most.
        batch_size: images of one step, over all devices.
        accumulate: parts in which a device takes its images of a step.
        optimizer: by timm's name.
        learning_rate: once it has warmed up.
        weight_decay: as the optimiser means it.
        layer_decay: each layer learns so many times as fast as the one after it.
        schedule: of the learning rate.
        warmup_epochs: in which the learning rate rises.
        plateau_factor: by which a plateau multiplies it.
        plateau_patience: epochs without improvement before that.
        probe_epochs: at first, in which only what is new to the backbone learns.
        label_smoothing: share of each label that is spread over the classes.
        clip: largest norm of the gradient; None for any.
        ema: decay of the mean of the weights that is judged and kept; 0 for the weights themselves.
        monitor: what of val chooses the best epoch.
        early_stopping_patience: epochs without improvement before training ends.
        sampling: weighted draws every class equally often, uniform every image once an epoch.
        focal_gamma: of the focal loss; 0 for cross-entropy.
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
    """Results of one epoch: losses, accuracies and AUC in [0, 1], and the learning rate it began with.

    What it cost: seconds of training, of training without waiting for images, and of validation, and the largest
    memory, MiB, of the GPU or else of the process.
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


COST_FIELDS = ("train_seconds", "device_seconds", "val_seconds", "memory_mib")


@dataclass
class TrainingState:
    """All that changes while a network is trained.

    Attributes:
        model: the network.
        optimizer: of its weights.
        plateau: what a plateau has made of the learning rate.
        ema: mean of the weights; None if it is off.
        epoch: epochs finished.
        batch: batches done of the epoch that has begun; the sampler's position.
        step: steps done in all.
        loss: of the images seen in this epoch, summed.
        right: right decisions on them, summed.
        seen: images seen in this epoch.
        train_seconds: spent on this epoch so far.
        device_seconds: of them, without waiting for images.
        best: highest score on val so far.
        best_epoch: the epoch that had it.
        best_weights: a copy of the weights it left.
        history: results of the epochs finished.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    plateau: PlateauSchedule
    ema: ModelEmaV3 | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    right: float = 0.0
    seen: int = 0
    train_seconds: float = 0.0
    device_seconds: float = 0.0
    best: float = -math.inf
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[EpochResult] = field(default_factory=list)

    STATEFUL_FIELDS: ClassVar = ("model", "optimizer", "plateau", "ema")

    @property
    def eval_model(self) -> nn.Module:
        """The network that is judged and kept."""
        return self.model if self.ema is None else self.ema.module

    def end_epoch(self, result: EpochResult, score: float) -> None:
        """Notes what an epoch came to; the weights are kept if no epoch before had as high a score."""
        self.epoch, self.history = result.epoch, [*self.history, result]
        self.batch, self.seen, self.loss, self.right = 0, 0, 0.0, 0.0
        self.train_seconds = self.device_seconds = 0.0
        self.plateau.scheduler.step(result.val_loss)
        if score > self.best:
            self.best, self.best_epoch = score, result.epoch
            weights = self.eval_model.state_dict()
            self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as a checkpoint holds them."""
        parts = {
            name: None if (part := getattr(self, name)) is None else part.state_dict() for name in self.STATEFUL_FIELDS
        }
        plain = {name: value for name, value in vars(self).items() if name not in self.STATEFUL_FIELDS}
        return {**plain, **parts, "history": [asdict(epoch) for epoch in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        for name in self.STATEFUL_FIELDS:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        vars(self).update({name: value for name, value in state.items() if name not in self.STATEFUL_FIELDS})
        self.history = [EpochResult(**epoch) for epoch in state["history"]]


def create_training_state(model: nn.Module, recipe: Recipe) -> TrainingState:
    """A network, not yet trained and on its device, with all that its training needs.

    Raises:
        UserError: timm knows no optimiser of that name.
    """
    optimizer = create_optimizer(model, recipe.optimizer, recipe.learning_rate, recipe.weight_decay, recipe.layer_decay)
    ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    return TrainingState(model, optimizer, PlateauSchedule(recipe.plateau_factor, recipe.plateau_patience), ema)
