"""Optimizers of timm and learning-rate schedules."""

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
    """Create a timm optimizer; with layer decay each parameter group has its learning-rate factor as `lr_scale`.

    Args:
        model: its `group_matcher` assigns parameters to layers, its `no_weight_decay` excludes some from weight decay.
        name: name of a timm optimizer.
        learning_rate: learning rate of the last layer.
        weight_decay: weight decay, as the optimizer defines it; `adam` applies it to all parameters, as published,
            other optimizers not to biases and normalization layers.
        layer_decay: learning rate of each layer divided by that of the next (Bao et al. 2022, arXiv:2106.08254,
            appendix); 1 for the same rate in all layers.

    Raises:
        UserError: timm has no such optimizer.
    """
    try:
        optimizer = create_optimizer_v2(
            model, opt=name, lr=learning_rate, weight_decay=weight_decay, filter_bias_and_bn=name != "adam",
            layer_decay=layer_decay if layer_decay < 1 else None,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise UserError(f"params.yaml: train.optimizer is {name!r}, which timm does not have") from error
    if name == "adam":  # timm excludes parameters of no_weight_decay, such as position embeddings and FadeAttn's alpha
        for group in optimizer.param_groups:
            group["weight_decay"] = weight_decay
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each parameter group, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def lr_multiplier(
    step: int, steps: int, warmup: int, schedule: Literal["cosine", "plateau", "constant"], plateau: float
) -> float:
    """Return the multiplier of the learning rate at a step.

    Warm-up is linear to 1; `cosine` then decays towards 0 (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts), `plateau` returns the multiplier of a `PlateauSchedule`, `constant` stays at 1.

    Args:
        step: current step, from 0.
        steps: total number of steps.
        warmup: number of warm-up steps among them.
        schedule: schedule after warm-up.
        plateau: current multiplier of the plateau schedule.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    return plateau if schedule == "plateau" else 1.0


def set_trainable(model: nn.Module, new: Sequence[nn.Module], only_new: bool) -> None:
    """Make all parameters trainable, or only those of the new modules."""
    for parameter in model.parameters():
        parameter.requires_grad_(not only_new)
    for module in new:
        module.requires_grad_(True)


class PlateauSchedule:
    """Reduce the learning rate when a loss stops decreasing: torch's `ReduceLROnPlateau` on a learning rate of 1.

    Args:
        factor: multiplier of the learning rate at a plateau.
        patience: epochs without improvement before that.
    """

    def __init__(self, factor: float, patience: int) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience)

    @property
    def multiplier(self) -> float:
        """Current learning-rate multiplier."""
        return float(self.scheduler.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier and the state of the scheduler."""
        return {"multiplier": self.multiplier, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.scheduler.optimizer.param_groups[0]["lr"] = state["multiplier"]
        self.scheduler.load_state_dict(state["scheduler"])
