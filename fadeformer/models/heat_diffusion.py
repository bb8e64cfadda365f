"""Fractional heat diffusion mixed with self-attention (`DiffusionAttn`), and attention pooling.

    y = x + proj(concat over heads of g softmax(Q K^T / sqrt(d)) V + (1 - g) exp(-t Lambda^s) V),  Q, K, V of norm(x)

Each head learns its own time t, exponent s and gate g. Lambda is the Laplacian of the patch grid with four neighbors
and reflecting borders (`fadeformer.models.grid_laplacian`, exact). The published layer lacks the residual connection,
the normalization and pooling with weights per patch (`AttentionPool`): there diffusion is followed only by a linear map
and average pooling, which reduce it to a constant (docs/explanation/fade_attention.md).
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

TIME_RANGE = (0.02, 20.0)  # range of t; with s = 1 the kernel is a Gaussian of standard deviation sqrt(2 t) patches
EXPONENT_RANGE = (0.25, 1.0)  # range of s; in (0, 1] the kernel is non-negative
# Adam's steps are about as large as the learning rate, for any gradient. The logits of t, s and g are of the order of
# 1, other weights of 0.02; without this factor they would hardly move.
LOGIT_SCALE = 10.0


class DiffusionAttn(nn.Module):
    """Attention and heat diffusion mixed by a gate per head, with residual connection and layer normalization.

    The initial times of the heads are log-spaced from 0.1 to 2, to cover short-range and long-range context.

    Args:
        channels: input and output channels.
        num_heads: number of heads.
        dropout: probability of dropping a channel of the residual branch.

    Raises:
        ValueError: num_heads is below 1 or does not divide the channels.
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
        """Diffusion time t of each head, (heads,), in `TIME_RANGE`."""
        shortest, longest = map(math.log, TIME_RANGE)
        return torch.exp(shortest + (longest - shortest) * torch.sigmoid(LOGIT_SCALE * self.time_logit))

    @property
    def exponent(self) -> Tensor:
        """Exponent s of each head, (heads,), in `EXPONENT_RANGE`."""
        low, high = EXPONENT_RANGE
        return low + (high - low) * torch.sigmoid(LOGIT_SCALE * self.exponent_logit)

    @property
    def gate(self) -> Tensor:
        """Gate g of each head, (heads,), in (0, 1): the weight of attention."""
        return torch.sigmoid(LOGIT_SCALE * self.gate_logit)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map (B, H, W, C) to (B, H, W, C)."""
        batch, height, width, channels = x.shape
        q, k, v = split_heads(project(self.qkv, self.norm(x).permute(0, 3, 1, 2)), 3, self.num_heads)
        attended = functional.scaled_dot_product_attention(q, k, v)  # B, heads, N, d, as q, k and v
        values, attended = (
            promote_to_float32(heads.transpose(1, 2).reshape(batch, height, width, self.num_heads, self.head_dim))
            for heads in (v, attended)
        )
        with disable_autocast(x.device):
            mixed = gated_heat_diffusion(values, attended, self.time, self.exponent, self.gate)  # B, H, W, heads, d
        mixed = mixed.reshape(batch, height, width, channels)
        return x + self.dropout(self.proj(mixed.permute(0, 3, 1, 2).to(x.dtype))).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def gated_heat_diffusion(values: Tensor, attended: Tensor, time: Tensor, exponent: Tensor, gate: Tensor) -> Tensor:
    """Compute g attended + (1 - g) exp(-t Lambda^s) values, the term inside proj of the module's formula.

    Args:
        values: (B, H, W, heads, d).
        attended: output of attention, same shape.
        time: t, (heads,), 0 or more.
        exponent: s, (heads,), above 0.
        gate: g, (heads,), in [0, 1].

    Returns:
        (B, H, W, heads, d).
    """
    height, width = values.shape[1:3]
    time, exponent, gate = (parameter.to(values.dtype) for parameter in (time, exponent, gate))
    decay = (1 - gate) * heat_decay(height, width, time, exponent)  # H, W, heads
    if torch.compiler.is_compiling():
        return torch.addcmul(idct2(dct2(values) * decay.unsqueeze(-1)), attended, gate[:, None])
    return _GatedHeatDiffusion.apply(values, attended, decay, gate)  # type: ignore[no-any-return]


class _GatedHeatDiffusion(torch.autograd.Function):
    """`gated_heat_diffusion` with a backward pass that sums over d first; autograd would sum over it last."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, attended: Tensor, decay: Tensor, gate: Tensor) -> Tensor:
        spectrum = dct2(values)
        ctx.save_for_backward(spectrum, attended, decay, gate)
        return idct2(spectrum * decay.unsqueeze(-1)).addcmul_(attended, gate[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spectrum, attended, decay, gate = ctx.saved_tensors
        grad_spectrum = dct2(grad)
        grad_decay = torch.linalg.vecdot(grad_spectrum, spectrum).sum(dim=0)  # H, W, heads
        grad_gate = torch.linalg.vecdot(grad, attended).sum(dim=(0, 1, 2))  # heads
        return idct2(grad_spectrum.mul_(decay.unsqueeze(-1))), grad * gate[:, None], grad_decay, grad_gate


class AttentionPool(nn.Module):
    """Attention pooling: each head scores every patch and averages its own channels with softmax weights.

    Scores are initialized to zero, so the initial state is average pooling.

    Args:
        channels: channels of a token.
        num_heads: number of heads.

    Raises:
        ValueError: num_heads is below 1 or does not divide the channels.
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
