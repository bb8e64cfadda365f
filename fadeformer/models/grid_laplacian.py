"""The two graphs of a patch grid, and what diffuses on them, by matrices no larger than a side of the grid.

The published graph joins every two patches by a Gaussian of their distance; its adjacency is the Kronecker product of
one small matrix along the columns of the grid and one along the rows, so it is applied by two small matrix products:

    A_ij = exp(-|p_i - p_j|^2 / 2),  L = diag(A 1) - A,  L^ = 2 L / lambda_max(L) - I

The heat graph joins the four neighbours. The discrete cosine transform diagonalises its Laplacian, reflecting borders
included (Strang 1999, The discrete cosine transform, SIAM Review 41), with eigenvalues 4 sin^2(pi k / 2 H) along the
rows plus the same along the columns; exp(-t Lambda^s) is then exact by two products in, a multiplication, two out.

All that is held of a grid is lambda_max, one number; the small matrices are made where and when they are used, which
costs microseconds and lets a network change its device, precision and image size, and be compiled or exported.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

MAX_DENSE_PATCHES = 64  # patches; up to here lambda_max comes from the whole matrix


def rescaled_laplacian_power(v: Tensor, power: int) -> Tensor:
    """L^^power v on the published graph.

    Args:
        v: (B, H, W, C).
        power: 0 or more.

    Returns:
        (B, H, W, C).
    """
    if power == 0:
        return v
    batch, height, width, channels = v.shape
    largest = largest_eigenvalue(len(range(height)), len(range(width)))  # for a tracer the grid is a constant from here
    factor = 2 / largest if largest > 0 else 0.0  # one patch has no neighbours; L^ is then -I, as on constant maps
    rows, columns = (factor * gaussian_kernel(height, v)), gaussian_kernel(width, v)
    own = (torch.outer(rows.sum(dim=1), columns.sum(dim=1)) - 1).unsqueeze(-1)  # H, W, 1
    for _ in range(power):
        mixed = (rows @ (columns @ v).reshape(batch, height, width * channels)).reshape(v.shape)
        v = torch.addcmul(-mixed, own, v)
    return v


def rescaled_laplacian_operator(height: int, width: int, power: int) -> Tensor:
    """L^^power on the published graph as a matrix, float64, (H W, H W)."""
    unit = torch.eye(height * width, dtype=torch.float64).reshape(1, height, width, height * width)
    return rescaled_laplacian_power(unit, power).reshape(height * width, height * width)


def dct2(v: Tensor) -> Tensor:
    """The cosine transform of a map, (B, H, W, heads, d) to the same shape: how much of each wave is in it."""
    return _apply_separable(v, dct_matrix(v.shape[1], v), dct_matrix(v.shape[2], v))


def idct2(v: Tensor) -> Tensor:
    """The inverse of `to_waves`, which is its transpose."""
    return _apply_separable(v, dct_matrix(v.shape[1], v).T, dct_matrix(v.shape[2], v).T)


def _apply_separable(v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    batch, height, width, heads, depth = v.shape
    v = columns @ v.reshape(batch, height, width, heads * depth)
    return (rows @ v.reshape(batch, height, width * heads * depth)).reshape(batch, height, width, heads, depth)


def heat_decay(height: int, width: int, time: Tensor, exponent: Tensor) -> Tensor:
    """What exp(-t Lambda^s) leaves of each wave of the grid: all at t = 0, only the constant one as t grows.

    For s in (0, 1] heat spreads without ever overshooting: no value leaves the range of the map (the kernel is that of
    a random walk whose steps are, for s < 1, long-tailed).

    Args:
        height: of the grid, patches; width likewise.
        width: of the grid.
        time: (heads,), 0 or more; patches squared where s is 1.
        exponent: (heads,), above 0.

    Returns:
        (H, W, heads), each in [0, 1].
    """
    down, across = (
        4 * torch.sin(torch.arange(n, device=time.device, dtype=time.dtype) * (math.pi / (2 * n))).square()
        for n in (height, width)
    )
    eigenvalues = (down[:, None] + across)[..., None]  # H, W, 1
    constant = eigenvalues == 0  # 0^s is 0, but its derivative by s would be a NaN
    powers = torch.where(constant, 1.0, eigenvalues) ** exponent
    return torch.exp(-time * torch.where(constant, 0.0, powers))


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II), (size, size), of the type and on the device of `like`."""
    n = torch.arange(size, device=like.device)
    turns = n[:, None] * (2 * n + 1) % (4 * size)  # exact in integers, so that float32 loses nothing at large sizes
    matrix = torch.cos(turns.to(like.dtype) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    return torch.where(n[:, None] == 0, math.sqrt(1 / size), matrix)


def gaussian_kernel(size: int, like: Tensor) -> Tensor:
    """exp(-(i - j)^2 / 2), (size, size), of the type and on the device of `like`."""
    n = torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.exp((n[:, None] - n).square() / -2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def largest_eigenvalue(height: int, width: int) -> float:
    """lambda_max of the published graph's Laplacian, to the last bits of float64; 0 for a single patch."""
    return _largest_eigenvalue(height, width)


@lru_cache(maxsize=256)
def _largest_eigenvalue(height: int, width: int) -> float:
    rows, columns = (np.exp(-(np.subtract.outer(n, n) ** 2) / 2) for n in (np.arange(height), np.arange(width)))
    degree = np.outer(rows.sum(1), columns.sum(1))

    def apply(v: NDArray[np.float64]) -> NDArray[np.float64]:
        grid = v.reshape(height, width)
        applied: NDArray[np.float64] = degree * grid - rows @ grid @ columns
        return applied.ravel()

    count = height * width
    if count <= MAX_DENSE_PATCHES:
        matrix = np.stack([apply(unit) for unit in np.eye(count)])
        return max(0.0, float(np.linalg.eigvalsh(matrix)[-1])) if count > 1 else 0.0
    # The largest wave is a checkerboard under an arch; a start near it, of the same symmetries, converges where a
    # random one would spend its steps on the many waves that are almost as large.
    checkerboard = np.where(np.add.outer(np.arange(height), np.arange(width)) % 2, -1.0, 1.0)
    arches = (np.sin(np.pi * (np.arange(n) + 0.5) / n) for n in (height, width))
    start = (checkerboard * np.outer(*arches)).ravel()
    operator = LinearOperator((count, count), matvec=apply, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-13, return_eigenvectors=False)[0])
