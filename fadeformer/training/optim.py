"""What turns gradients into weights: timm's optimisers, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from fadeformer.errors import UserError


def create_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, layer_decay: float
) -> torch.optim.Optimizer:
    """An optimiser of timm's by name; each group of weights has its share of the learning rate as `lr_scale`.

    Args:
        model: says by `group_matcher` which weights are of which layer, and by `no_weight_decay` which do not decay.
        name: timm's.
        learning_rate: of the last layer.
        weight_decay: as the optimiser means it; `adam` decays every weight, as published, others no bias and no norm.
        layer_decay: each layer learns so many times as fast as the one after it (Bao et al. 2022, arXiv:2106.08254,
            appendix); 1 for all alike.

    Raises:
        UserError: timm knows no optimiser of that name.
    """
    try:
        optimizer = create_optimizer_v2(
            model, opt=name, lr=learning_rate, weight_decay=weight_decay, filter_bias_and_bn=name != "adam",
            layer_decay=layer_decay if layer_decay < 1 else None,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise UserError(f"params.yaml: train.optimizer is {name!r}, which timm does not know") from error
    if name == "adam":  # timm lets alone what the model lists, such as positions and FadeAttn's alpha
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate, each group of weights to its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def lr_multiplier(
    step: int, steps: int, warmup: int, schedule: Literal["cosine", "plateau", "constant"], plateau: float
) -> float:
    """By what the learning rate is multiplied at a step.

    It rises in even steps to 1 while it warms up; `cosine` then falls along half a wave towards 0 (Loshchilov and
    Hutter 2017, arXiv:1608.03983, without restarts).

    Args:
        step: from 0.
        steps: in all.
        warmup: steps of them in which it rises.
        schedule: what it does after that.
        plateau: what a plateau has made of it so far, 1 at first.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    return plateau if schedule == "plateau" else 1.0


def set_trainable(model: nn.Module, new: Sequence[nn.Module], only_new: bool) -> None:
    """Lets all weights learn, or only those of the modules that are new to the backbone."""
    for weight in model.parameters():
        weight.requires_grad_(not only_new)
    for module in new:
        module.requires_grad_(True)


class PlateauSchedule:
    """Lowers the learning rate when a loss has stopped falling: torch's `ReduceLROnPlateau`, on a rate of 1.

    Args:
        factor: by which it is multiplied then.
        patience: epochs without improvement before that.
    """

    def __init__(self, factor: float, patience: int) -> None:
        unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(unit, factor=factor, patience=patience)

    @property
    def multiplier(self) -> float:
        """What has become of 1."""
        return float(self.scheduler.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {"rate": self.multiplier, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.scheduler.optimizer.param_groups[0]["lr"] = state["rate"]
        self.scheduler.load_state_dict(state["scheduler"])
