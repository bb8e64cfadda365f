"""FadeAttn: self-attention mixed with a power of the patch grid's rescaled graph Laplacian (the published layer).

    out = proj(alpha softmax(Q K^T / sqrt(d)) V + (1 - alpha) L^^K V)

L^ is defined in `fadeformer.models.grid_laplacian`; `alpha` and `K` are the published argument names; each of the
`num_heads` heads has d = in_channels / num_heads channels.

L 1 = 0, so 1^T L^^K = (-1)^K 1^T: averaged over the grid, the second term is (-1)^K (1 - alpha) mean(V) for any graph.
`forward_pooled` uses this identity and is exact. docs/explanation/fade_attention.md has the proof and its consequences.
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

# Chosen with `python benchmarks/fadenet.py rules`.
MAX_PRECOMPUTED_PATCHES = 256  # L^^K is a precomputed matrix on grids up to this size, and applied separably above
OPERATOR_CACHE_SIZE = 8  # matrices, one per grid size, that a layer caches
CHUNK_SIZE = 2**22  # attention weights computed at once; 16 MiB in float32, which fit into a processor's cache


class FadeAttn(nn.Module):
    """The published FadeAttn layer, with the published parameter names.

    Args:
        in_channels: input and output channels.
        num_heads: number of attention heads.
        K: power of the rescaled Laplacian.
        alpha: initial weight of attention; diffusion gets 1 - alpha.
        dropout: probability of dropping an output channel.

    Raises:
        ValueError: num_heads is below 1 or does not divide in_channels, or K is negative.
    """

    def __init__(
        self, in_channels: int, num_heads: int = 8, K: int = 3, alpha: float = 0.5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if K < 0:
            raise ValueError(f"K is {K}; the power of the Laplacian must be 0 or more")
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.head_dim = compute_head_dim(in_channels, num_heads)
        self.K = K
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float32))
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, kernel_size=1)
        self.proj = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        self._operator_cache: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Feature map (B, C, H, W) to (B, C, H, W).

        Under autocast, projections and attention run in the autocast dtype; diffusion and mixing run in float32.
        """
        batch, channels, height, width = x.shape
        q, k, v = split_heads(project(self.qkv, x), 3, self.num_heads)  # each B, heads, N, d
        attended = functional.scaled_dot_product_attention(q, k, v)
        values, attended = (
            promote_to_float32(heads.transpose(1, 2).reshape(batch, height, width, channels)) for heads in (v, attended)
        )
        with disable_autocast(x.device):
            mixed = self.alpha * attended + (1 - self.alpha) * self._diffuse(values)  # B, H, W, C
        return self.dropout(self.proj(mixed.permute(0, 3, 1, 2).to(x.dtype)))  # type: ignore[no-any-return]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Return the global average pooling of `forward`, (B, C, H, W) to (B, C), without computing the output map.

        The value and output projections are applied after pooling, to one vector per head.
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
            weight_v = weight_v.reshape(self.num_heads, self.head_dim, channels).to(tokens.dtype)
            mixed = torch.einsum("bhc,hdc->bhd", pooled, weight_v).flatten(1) + (self.alpha + diffusion) * bias_v
        return self.dropout(self.proj(mixed.reshape(batch, channels, 1, 1).to(x.dtype))).flatten(1)  # type: ignore[no-any-return]

    def _diffuse(self, values: Tensor) -> Tensor:
        """Apply L^^K to (B, H, W, C): small grids by a cached matrix, large ones separably.

        Under torch.compile and torch.export the separable form is traced: a cache would need guards.
        """
        batch, height, width, channels = values.shape
        if height * width > MAX_PRECOMPUTED_PATCHES or torch.compiler.is_compiling():
            return rescaled_laplacian_power(values, self.K)
        key = (height, width, values.device, values.dtype)
        if key not in self._operator_cache:
            if len(self._operator_cache) == OPERATOR_CACHE_SIZE:
                self._operator_cache.clear()
            with torch.inference_mode(False):  # autograd rejects tensors that were created in inference mode
                operator = rescaled_laplacian_operator(height, width, self.K)
                self._operator_cache[key] = operator.to(values.device, values.dtype)
        return (self._operator_cache[key] @ values.reshape(batch, height * width, channels)).reshape(values.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operator_cache": {}}


def mean_attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) averaged over queries: the mean attention that each patch receives.

    Weights are computed in chunks and, if there is more than one chunk, recomputed in the backward pass, so memory is
    linear in N. (Under torch.compile and torch.export they are computed in one chunk.)

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
    """With weights W and g the gradient of their mean, the gradient of Q K^T is W_ij (g_j - sum_m W_im g_m) / N."""

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
        q, k, *saved_weights = ctx.saved_tensors
        batch, heads, patches, depth = ctx.shape
        grad = grad.reshape(batch * heads, patches)
        # accumulated in the dtype of grad, at least float32
        grad_q, grad_k = torch.zeros_like(q, dtype=grad.dtype), torch.zeros_like(k, dtype=grad.dtype)
        for images, rows in _chunk_slices(*grad.shape):
            weights = saved_weights[0] if saved_weights else _attention_weights(q[images, rows], k[images])
            grad_mean = grad[images].unsqueeze(-2)  # chunk, 1, N
            grad_qk = (grad_mean - weights @ grad_mean.mT).mul_(weights).to(q.dtype)  # chunk, rows, N
            grad_q[images, rows] = (grad_qk @ k[images]).to(grad_q.dtype)
            grad_k[images] += grad_qk.mT @ q[images, rows]
        grad_q, grad_k = grad_q / (patches * math.sqrt(depth)), grad_k / patches
        return grad_q.reshape(ctx.shape).to(q.dtype), grad_k.reshape(ctx.shape).to(k.dtype)


def _attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))


def _chunk_slices(images: int, patches: int) -> list[tuple[slice, slice]]:
    """Return slices of images (times heads) and of query rows; a chunk has about CHUNK_SIZE attention weights."""
    chunk_images, rows = max(1, CHUNK_SIZE // patches**2), max(1, min(patches, CHUNK_SIZE // patches))
    return [
        (slice(i, i + chunk_images), slice(j, j + rows))
        for i in range(0, images, chunk_images)
        for j in range(0, patches, rows)
    ]


def compute_head_dim(channels: int, num_heads: int) -> int:
    """Return the number of channels of each head.

    Raises:
        ValueError: num_heads is below 1 or does not divide the channels.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be 1 or more")
    if channels % num_heads:
        raise ValueError(f"num_heads is {num_heads}, which does not divide the {channels} channels")
    return channels // num_heads


def to_channels_last(x: Tensor) -> Tensor:
    """Return the feature map in channels-last memory format; a ViT's tokens have it already and are not copied."""
    return x.contiguous(memory_format=torch.channels_last)


def project(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1 x 1 convolution, (B, C, H, W) to (B, H, W, output channels).

    On a CPU it is faster than the same `nn.Linear`.
    """
    return convolution(to_channels_last(x)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split (B, H, W, parts C) into queries, keys and, for three parts, values: each (B, heads, N, d)."""
    batch, height, width, channels = x.shape
    split = x.reshape(batch, height * width, parts, num_heads, channels // (parts * num_heads))  # B, N, parts, heads, d
    return split.permute(2, 0, 3, 1, 4).unbind(0)


def disable_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast is off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # the meta device, for example


def promote_to_float32(x: Tensor) -> Tensor:
    """Convert half-precision tensors to float32; leave float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
