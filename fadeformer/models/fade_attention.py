"""FadeAttn: self-attention mixed with a power of the patch grid's rescaled graph Laplacian (the published layer).

    out = proj(alpha softmax(Q K^T / sqrt(d)) V + (1 - alpha) L^^K V)

L^ is that of `fadeformer.models.grid_laplacian`; `alpha` and `K` are the published argument names; `num_heads` heads have
d = in_channels / num_heads channels each.

L 1 = 0, so 1^T L^^K = (-1)^K 1^T: under a mean over the grid the second term is (-1)^K (1 - alpha) mean(V), whatever
the graph. `forward_pooled` uses that, and is exact. The proof, and what follows from it, stands in docs/explanation/fade_attention.md.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fadeformer.models.grid_laplacian import rescaled_laplacian_operator, rescaled_laplacian_power

# Measured by `python benchmarks/fadenet.py rules`.
MAX_PRECOMPUTED_PATCHES = 256  # patches; L^^K is one matrix on grids up to here, and separable beyond
OPERATOR_CACHE_SIZE = 8  # grids whose matrix a layer keeps
CHUNK_SIZE = 2**22  # attention weights at once, 16 MiB of them in float32: what a processor's cache holds


class FadeAttn(nn.Module):
    """The published layer, its weights under the published names.

    Args:
        in_channels: channels of the map, before and after.
        num_heads: attention heads.
        K: power of the rescaled Laplacian.
        alpha: initial weight of attention against diffusion.
        dropout: of whole channels of the output.

    Raises:
        ValueError: there are no heads, they do not divide the channels, or K is negative.
    """

    def __init__(
        self, in_channels: int, num_heads: int = 8, K: int = 3, alpha: float = 0.5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if K < 0:
            raise ValueError(f"K is {K}; a power of the Laplacian is 0 or more")
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.head_dim = compute_head_dim(in_channels, num_heads)
        self.K = K
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float32))
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, kernel_size=1)
        self.proj = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        self._operators: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W).

        Under autocast the projections and the attention are computed in its type, diffusion and mixture in float32.
        """
        batch, channels, height, width = x.shape
        q, k, v = split_heads(project(self.qkv, x), 3, self.num_heads)  # each B, heads, N, d
        attended = functional.scaled_dot_product_attention(q, k, v)
        values, attended = (
            promote_to_float32(part.transpose(1, 2).reshape(batch, height, width, channels)) for part in (v, attended)
        )
        with disable_autocast(x.device):
            mixed = self.alpha * attended + (1 - self.alpha) * self._diffuse(values)  # B, H, W, C
        return self.dropout(self.proj(mixed.permute(0, 3, 1, 2).to(x.dtype)))  # type: ignore[no-any-return]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """The mean of `forward` over the grid, (B, C, H, W) to (B, C), without the map.

        V and the output projection act on what is pooled already, which is one vector for each head.
        """
        batch, channels, _, _ = x.shape
        weight_qk, weight_v = torch.split(self.qkv.weight, [2 * channels, channels])
        bias_qk, bias_v = torch.split(self.qkv.bias, [2 * channels, channels])  # type: ignore[arg-type]
        qk = functional.conv2d(to_channels_last(x), weight_qk, bias_qk).permute(0, 2, 3, 1)  # B, H, W, 2 C
        tokens = promote_to_float32(x.flatten(2).transpose(1, 2))  # B, N, C
        diffusion = (-1) ** self.K * (1 - self.alpha)
        with disable_autocast(x.device):
            weights = mean_attention_weights(*split_heads(qk, 2, self.num_heads)).to(tokens.dtype)  # B, heads, N
            pooled = self.alpha * (weights @ tokens) + diffusion * tokens.mean(dim=1, keepdim=True)  # B, heads, C
            of_heads = weight_v.reshape(self.num_heads, self.head_dim, channels).to(tokens.dtype)
            mixed = torch.einsum("bhc,hdc->bhd", pooled, of_heads).flatten(1) + (self.alpha + diffusion) * bias_v
        return self.dropout(self.proj(mixed.reshape(batch, channels, 1, 1).to(x.dtype))).flatten(1)  # type: ignore[no-any-return]

    def _diffuse(self, values: Tensor) -> Tensor:
        """L^^K of (B, H, W, C): small grids by a matrix kept for each of them, large ones separably.

        A tracer (torch.compile, torch.export) sees the separable form only: nothing that is kept has to be guarded.
        """
        batch, height, width, channels = values.shape
        if height * width > MAX_PRECOMPUTED_PATCHES or torch.compiler.is_compiling():
            return rescaled_laplacian_power(values, self.K)
        key = (height, width, values.device, values.dtype)
        if key not in self._operators:
            if len(self._operators) == OPERATOR_CACHE_SIZE:
                self._operators.clear()
            with torch.inference_mode(False):  # a tensor made in inference mode could never be trained with
                operator = rescaled_laplacian_operator(height, width, self.K)
                self._operators[key] = operator.to(values.device, values.dtype)
        return (self._operators[key] @ values.reshape(batch, height * width, channels)).reshape(values.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": {}}


def mean_attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) averaged over queries: how much each patch is looked at.

    Weights are computed by chunks and, where there is more than one, again in the backward pass: memory grows with N.
    (A tracer sees all of them at once.)

    Args:
        q: (B, heads, N, d).
        k: (B, heads, N, d).

    Returns:
        (B, heads, N), at least float32.
    """
    if torch.compiler.is_compiling():
        products = promote_to_float32(q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1))
        return torch.softmax(products, dim=-1).mean(dim=-2)
    return _MeanAttentionWeights.apply(q, k)  # type: ignore[no-any-return]


class _MeanAttentionWeights(torch.autograd.Function):
    """With W the weights and g the gradient of their mean, that of Q K^T is W_ij (g_j - sum_m W_im g_m) / N."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        batch, heads, patches, depth = q.shape
        q = (q / math.sqrt(depth)).reshape(batch * heads, patches, depth)
        k = k.reshape(batch * heads, patches, depth)
        chunks = _chunk_slices(len(q), patches)
        total = promote_to_float32(q.new_zeros(len(q), patches))
        for images, rows in chunks:
            weights = _attention_weights(q[images, rows], k[images])
            total[images] += weights.sum(dim=-2)
        ctx.save_for_backward(q, k, *([weights] if len(chunks) == 1 else []))
        ctx.shape = (batch, heads, patches, depth)
        return (total / patches).reshape(batch, heads, patches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k, *kept = ctx.saved_tensors
        batch, heads, patches, depth = ctx.shape
        grad = grad.reshape(batch * heads, patches)
        grad_q, grad_k = (torch.zeros_like(part, dtype=grad.dtype) for part in (q, k))  # sums of many terms
        for images, rows in _chunk_slices(*grad.shape):
            weights = kept[0] if kept else _attention_weights(q[images, rows], k[images])  # chunk, rows, N
            of_keys = grad[images].unsqueeze(-2)  # chunk, 1, N
            of_products = (of_keys - weights @ of_keys.mT).mul_(weights).to(q.dtype)  # chunk, rows, N
            grad_q[images, rows] = (of_products @ k[images]).to(grad_q.dtype)
            grad_k[images] += of_products.mT @ q[images, rows]
        grad_q, grad_k = grad_q / (patches * math.sqrt(depth)), grad_k / patches
        return grad_q.reshape(ctx.shape).to(q.dtype), grad_k.reshape(ctx.shape).to(k.dtype)


def _attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))


def _chunk_slices(images: int, patches: int) -> list[tuple[slice, slice]]:
    """Images (times heads) and rows of their weights such that a chunk has about CHUNK weights."""
    together, rows = max(1, CHUNK_SIZE // patches**2), max(1, min(patches, CHUNK_SIZE // patches))
    return [
        (slice(i, i + together), slice(j, j + rows))
        for i in range(0, images, together)
        for j in range(0, patches, rows)
    ]


def compute_head_dim(channels: int, num_heads: int) -> int:
    """Channels of each head.

    Raises:
        ValueError: there are no heads, or they do not divide the channels.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; a layer has 1 or more")
    if channels % num_heads:
        raise ValueError(f"num_heads is {num_heads}, which does not divide the {channels} channels")
    return channels // num_heads


def to_channels_last(x: Tensor) -> Tensor:
    """The same map with its channels beside each other in memory; free for the tokens of a ViT."""
    return x.contiguous(memory_format=torch.channels_last)


def project(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of (B, C, H, W) to (B, H, W, channels out).

    On a CPU it is faster than the same `nn.Linear`.
    """
    return convolution(to_channels_last(x)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, parts C) to queries, keys and, where there are three parts, values: each (B, heads, N, d)."""
    batch, height, width, channels = x.shape
    split = x.reshape(batch, height * width, parts, num_heads, channels // (parts * num_heads))  # B, N, parts, heads, d
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def disable_autocast(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: types stay as they are."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # such as the meta device


def promote_to_float32(x: Tensor) -> Tensor:
    """Half types to float32, wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
