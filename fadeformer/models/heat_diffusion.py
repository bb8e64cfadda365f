"""A layer of fractional heat diffusion and attention that the read-out can see.

    y = x + proj(concat over heads of g softmax(Q K^T / sqrt(d)) V + (1 - g) exp(-t Lambda^s) V),  Q, K, V of norm(x)

Each head learns its own time t, exponent s and gate g. Lambda is the Laplacian of the grid of patches with its four
neighbours and reflecting borders (`fadeformer.models.grid_laplacian`, exact). The residual, the normalisation and a read-out that
weighs patches (`AttentionPool`) are what the published layer lacks: there a linear map and a mean follow the diffusion,
and all that they leave of it is a constant (docs/explanation/fade_attention.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fadeformer.models.fade_attention import (
    compute_head_dim,
    disable_autocast,
    project,
    promote_to_float32,
    split_heads,
)
from fadeformer.models.grid_laplacian import dct2, heat_decay, idct2

TIME_RANGE = (0.02, 20.0)  # range of t; a kernel of standard deviation sqrt(2 t) patches where s is 1
EXPONENT_RANGE = (0.25, 1.0)  # range of s; in (0, 1] the kernel is nowhere negative
# Adam moves a weight by about the learning rate in a step, whatever its gradient; a head's three numbers, whose natural
# unit is 1 and not 0.02, would stay where they began.
LOGIT_SCALE = 10.0


class DiffusionAttn(nn.Module):
    """Attention and heat diffusion mixed by a gate for each head, with residual and normalisation.

    Heads begin with times spread evenly over the logarithm of 0.1 to 2, so that near and far context are both there.

    Args:
        channels: of the map, before and after.
        num_heads: heads.
        dropout: of whole channels of what is added to the map.

    Raises:
        ValueError: there are no heads, or they do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.head_dim = compute_head_dim(channels, num_heads)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj = nn.Conv2d(channels, channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        times = torch.linspace(math.log(0.1), math.log(2.0), num_heads)
        shortest, longest = map(math.log, TIME_RANGE)
        self.time_logit = nn.Parameter(torch.logit((times - shortest) / (longest - shortest)) / LOGIT_SCALE)
        self.exponent_logit = nn.Parameter(torch.full((num_heads,), 1.0 / LOGIT_SCALE))
        self.gate_logit = nn.Parameter(torch.zeros(num_heads))

    @property
    def time(self) -> Tensor:
        """T of each head, (heads,), in `TIMES`."""
        shortest, longest = map(math.log, TIME_RANGE)
        return torch.exp(shortest + (longest - shortest) * torch.sigmoid(LOGIT_SCALE * self.time_logit))

    @property
    def exponent(self) -> Tensor:
        """S of each head, (heads,), in `EXPONENTS`."""
        low, high = EXPONENT_RANGE
        return low + (high - low) * torch.sigmoid(LOGIT_SCALE * self.exponent_logit)

    @property
    def gate(self) -> Tensor:
        """G of each head, (heads,), in (0, 1): the share of attention."""
        return torch.sigmoid(LOGIT_SCALE * self.gate_logit)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, H, W, C)."""
        batch, height, width, channels = x.shape
        q, k, v = split_heads(project(self.qkv, self.norm(x).permute(0, 3, 1, 2)), 3, self.num_heads)
        attended = functional.scaled_dot_product_attention(q, k, v)  # B, heads, N, d, as q, k and v
        values, attended = (
            promote_to_float32(part.transpose(1, 2).reshape(batch, height, width, self.num_heads, self.head_dim))
            for part in (v, attended)
        )
        with disable_autocast(x.device):
            mixed = gated_heat_diffusion(values, attended, self.time, self.exponent, self.gate)  # B, H, W, heads, d
        mixed = mixed.reshape(batch, height, width, channels)
        return x + self.dropout(self.proj(mixed.permute(0, 3, 1, 2).to(x.dtype))).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def gated_heat_diffusion(values: Tensor, attended: Tensor, time: Tensor, exponent: Tensor, gate: Tensor) -> Tensor:
    """The mixture of the module's formula, g attended + (1 - g) exp(-t Lambda^s) values.

    Args:
        values: (B, H, W, heads, d).
        attended: the same shape.
        time: (heads,), as in `fadeformer.models.grid_laplacian.heat_decay`.
        exponent: (heads,), as there.
        gate: (heads,), in [0, 1].

    Returns:
        (B, H, W, heads, d).
    """
    height, width = values.shape[1:3]
    time, exponent, gate = (numbers.to(values.dtype) for numbers in (time, exponent, gate))
    decay = (1 - gate) * heat_decay(height, width, time, exponent)  # H, W, heads
    if torch.compiler.is_compiling():
        return torch.addcmul(idct2(dct2(values) * decay.unsqueeze(-1)), attended, gate[:, None])
    return _GatedHeatDiffusion.apply(values, attended, decay, gate)  # type: ignore[no-any-return]


class _GatedHeatDiffusion(torch.autograd.Function):
    """The same with a backward pass that sums over d before all else, where autograd's would sum over it last."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, attended: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
        waves = dct2(values)
        ctx.save_for_backward(waves, attended, decay, gate)
        return idct2(waves * decay.unsqueeze(-1)).addcmul_(attended, gate[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        waves, attended, decay, gate = ctx.saved_tensors
        grad_waves = dct2(grad)
        grad_decay = torch.linalg.vecdot(grad_waves, waves).sum(dim=0)  # H, W, heads
        grad_gate = torch.linalg.vecdot(grad, attended).sum(dim=(0, 1, 2))  # heads
        return idct2(grad_waves.mul_(decay.unsqueeze(-1))), grad * gate[:, None], grad_decay, grad_gate


class AttentionPool(nn.Module):
    """A mean over patches with learned weights: each head scores every patch and pools its own channels.

    The scores begin at zero, so it begins as the plain mean.

    Args:
        channels: of a token.
        num_heads: heads.

    Raises:
        ValueError: there are no heads, or they do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = compute_head_dim(channels, num_heads)
        self.num_heads = num_heads
        self.score = nn.Linear(channels, num_heads, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to (B, C)."""
        batch, tokens, _ = x.shape
        weights = torch.softmax(promote_to_float32(self.score(x)), dim=1)  # B, N, heads
        values = x.reshape(batch, tokens, self.num_heads, self.head_dim)  # B, N, heads, d
        return (weights.to(x.dtype).unsqueeze(-1) * values).sum(dim=1).flatten(1)  # B, C
