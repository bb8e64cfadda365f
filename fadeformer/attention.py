"""FadeAttn: self-attention mixed with a power of the patch grid's rescaled graph Laplacian (the published layer).

With N = H W patches at integer positions p_i:

    A_ij = exp(-|p_i - p_j|^2 / 2),  L = diag(A 1) - A,  L^ = 2 L / lambda_max(L) - I
    out = proj(alpha softmax(Q K^T / sqrt(d)) V + (1 - alpha) L^^K V)

`alpha` and `K` are the published argument names; `num_heads` heads have d = in_channels / num_heads channels each.

L 1 = 0, so 1^T L^^K = (-1)^K 1^T: under a mean over the grid the second term is (-1)^K (1 - alpha) mean(V), whatever
the graph. `forward_pooled` uses that, and is exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def laplacian(height: int, width: int) -> Tensor:
    """L of a grid, float64, (height width, height width)."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in (height, width))
    positions = torch.cartesian_prod(rows, columns).reshape(-1, 2)  # N, 2
    offsets = positions[:, None] - positions[None]  # N, N, 2
    adjacency = torch.exp(-offsets.square().sum(dim=-1) / 2)
    return torch.diag(adjacency.sum(dim=1)) - adjacency


def diffusion_operator(height: int, width: int, power: int) -> Tensor:
    """L^^power of a grid, float64, (height width, height width)."""
    lap = laplacian(height, width)
    largest = torch.linalg.eigvalsh(lap)[-1]
    identity = torch.eye(len(lap), dtype=lap.dtype)
    if largest == 0:  # one patch has no neighbours; L^ is then -I, as it is on every constant map
        return torch.linalg.matrix_power(-identity, power)  # type: ignore[no-any-return]
    return torch.linalg.matrix_power(2 / largest * lap - identity, power)  # type: ignore[no-any-return]


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
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}; a layer has 1 or more")
        if in_channels % num_heads:
            raise ValueError(f"num_heads is {num_heads}, which does not divide the {in_channels} channels")
        if K < 0:
            raise ValueError(f"K is {K}; a power of the Laplacian is 0 or more")
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.head_dim = in_channels // num_heads
        self.K = K
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float32))
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, kernel_size=1)
        self.proj = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        self._operators: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[-2:]
        q, k, v = self._heads(self.qkv(x))  # each B, heads, N, d
        attended = functional.scaled_dot_product_attention(q, k, v)
        diffused = self.operator(height, width, v.device, v.dtype) @ v
        mixed = self.alpha * attended + (1 - self.alpha) * diffused
        mixed = mixed.transpose(-2, -1).reshape(x.shape)  # B, C, H, W
        return self.dropout(self.proj(mixed))  # type: ignore[no-any-return]

    def forward_pooled(self, x: Tensor) -> Tensor:
        """The mean of `forward` over the grid, (B, C, H, W) to (B, C), without the map."""
        q, k, v = self._heads(self.qkv(x))  # each B, heads, N, d
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), dim=-1)  # B, heads, N, N
        attended = weights.mean(dim=-2, keepdim=True) @ v  # B, heads, 1, d
        diffused = (-1) ** self.K * v.mean(dim=-2, keepdim=True)
        mixed = self.alpha * attended + (1 - self.alpha) * diffused
        pooled = self.dropout(self.proj(mixed.reshape(len(x), self.in_channels, 1, 1)))
        return pooled.flatten(1)  # type: ignore[no-any-return]

    def operator(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """L^^K of a grid, (height width, height width), computed once for each grid."""
        key = (height, width, device, dtype)
        if key not in self._operators:
            with torch.inference_mode(False):  # a tensor made in inference mode could never be trained with
                self._operators[key] = diffusion_operator(height, width, self.K).to(device, dtype)
        return self._operators[key]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = qkv.reshape(len(qkv), 3, self.num_heads, self.head_dim, -1)  # B, 3, heads, d, N
        q, k, v = split.transpose(-2, -1).unbind(1)  # each B, heads, N, d
        return q, k, v

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": {}}
