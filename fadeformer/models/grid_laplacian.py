"""Graph Laplacians of a patch grid, applied separably along its rows and columns.

The published graph connects every pair of patches with a Gaussian weight of their distance; its adjacency matrix is the
Kronecker product of one small matrix per side of the grid, so it is applied by two small matrix products:

    A_ij = exp(-|p_i - p_j|^2 / 2),  L = diag(A 1) - A,  L^ = 2 L / lambda_max(L) - I

The heat graph connects the four neighbors. The discrete cosine transform (DCT) diagonalizes its Laplacian with
reflecting borders (Strang 1999, The discrete cosine transform, SIAM Review 41); the eigenvalues are 4 sin^2(pi k / 2 H)
along the rows plus the same along the columns. So exp(-t Lambda^s) is computed exactly by a DCT, an elementwise product
and an inverse DCT.

Only lambda_max is cached, one number per grid size. The small matrices are computed on use, which takes microseconds
and lets a model change its device, precision and image size, and be compiled or exported.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

MAX_DENSE_PATCHES = 64  # lambda_max is computed from the dense matrix on grids up to this size, by Lanczos above


def rescaled_laplacian_power(v: Tensor, power: int) -> Tensor:
    """Apply the rescaled Laplacian of the published graph: L^^power v.

    Args:
        v: feature map (B, H, W, C).
        power: exponent K, 0 or more.

    Returns:
        (B, H, W, C).
    """
    if power == 0:
        return v
    batch, height, width, channels = v.shape
    largest = largest_eigenvalue(len(range(height)), len(range(width)))  # len(range()) makes a traced size a constant
    factor = 2 / largest if largest > 0 else 0.0  # a single patch has L = 0, so L^ = -I
    rows, columns = (factor * gaussian_kernel(height, v)), gaussian_kernel(width, v)
    # 2 degree / lambda_max - 1; H, W, 1
    diagonal = (torch.outer(rows.sum(dim=1), columns.sum(dim=1)) - 1).unsqueeze(-1)
    for _ in range(power):
        adjacent = (rows @ (columns @ v).reshape(batch, height, width * channels)).reshape(v.shape)
        v = torch.addcmul(-adjacent, diagonal, v)
    return v


def rescaled_laplacian_operator(height: int, width: int, power: int) -> Tensor:
    """Return L^^power of the published graph as a dense matrix, float64, (H W, H W)."""
    identity = torch.eye(height * width, dtype=torch.float64).reshape(1, height, width, height * width)
    return rescaled_laplacian_power(identity, power).reshape(height * width, height * width)


def dct2(v: Tensor) -> Tensor:
    """Two-dimensional orthonormal DCT of a feature map, (B, H, W, heads, d) to the same shape."""
    return _apply_separable(v, dct_matrix(v.shape[1], v), dct_matrix(v.shape[2], v))


def idct2(v: Tensor) -> Tensor:
    """Inverse of `dct2`, which is its transpose."""
    return _apply_separable(v, dct_matrix(v.shape[1], v).T, dct_matrix(v.shape[2], v).T)


def _apply_separable(v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    batch, height, width, heads, depth = v.shape
    v = columns @ v.reshape(batch, height, width, heads * depth)
    return (rows @ v.reshape(batch, height, width * heads * depth)).reshape(batch, height, width, heads, depth)


def heat_decay(height: int, width: int, time: Tensor, exponent: Tensor) -> Tensor:
    """Return the eigenvalues of exp(-t Lambda^s), the factor by which diffusion scales each DCT coefficient.

    They are 1 at t = 0; as t grows, all but that of the constant component go to 0. For s in (0, 1] the kernel is
    non-negative, so output values stay in the range of the input (it is the transition kernel of a random walk, with
    long-tailed steps for s < 1).

    Args:
        height: rows of the patch grid.
        width: columns of the patch grid.
        time: t, (heads,), 0 or more; in squared patches if s is 1.
        exponent: s, (heads,), above 0.

    Returns:
        (H, W, heads), in [0, 1].
    """
    along_rows, along_columns = (
        4 * torch.sin(torch.arange(n, device=time.device, dtype=time.dtype) * (math.pi / (2 * n))).square()
        for n in (height, width)
    )
    eigenvalues = (along_rows[:, None] + along_columns)[..., None]  # H, W, 1
    constant = eigenvalues == 0  # 0^s is 0, but its derivative with respect to s is NaN
    powers = torch.where(constant, 1.0, eigenvalues) ** exponent
    return torch.exp(-time * torch.where(constant, 0.0, powers))


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """Return the matrix of the orthonormal DCT-II, (size, size), with the dtype and device of `like`."""
    n = torch.arange(size, device=like.device)
    phases = n[:, None] * (2 * n + 1) % (4 * size)  # reduced in integers: float32 would lose precision at large sizes
    matrix = torch.cos(phases.to(like.dtype) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    return torch.where(n[:, None] == 0, math.sqrt(1 / size), matrix)


def gaussian_kernel(size: int, like: Tensor) -> Tensor:
    """Return exp(-(i - j)^2 / 2), (size, size), with the dtype and device of `like`."""
    n = torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.exp((n[:, None] - n).square() / -2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def largest_eigenvalue(height: int, width: int) -> float:
    """Return lambda_max of the published graph's Laplacian, to float64 precision; 0 for a single patch."""
    return _largest_eigenvalue(height, width)


@lru_cache(maxsize=256)
def _largest_eigenvalue(height: int, width: int) -> float:
    rows, columns = (np.exp(-(np.subtract.outer(n, n) ** 2) / 2) for n in (np.arange(height), np.arange(width)))
    degree = np.outer(rows.sum(1), columns.sum(1))

    def apply_laplacian(v: NDArray[np.float64]) -> NDArray[np.float64]:
        grid = v.reshape(height, width)
        result: NDArray[np.float64] = degree * grid - rows @ grid @ columns
        return result.ravel()

    count = height * width
    if count <= MAX_DENSE_PATCHES:
        matrix = np.stack([apply_laplacian(unit) for unit in np.eye(count)])
        return max(0.0, float(np.linalg.eigvalsh(matrix)[-1])) if count > 1 else 0.0
    # The leading eigenvector resembles a checkerboard times an arch. A start vector with this shape and symmetry
    # converges; a random one converges slowly, because many eigenvalues are close to the largest.
    checkerboard = np.where(np.add.outer(np.arange(height), np.arange(width)) % 2, -1.0, 1.0)
    arches = (np.sin(np.pi * (np.arange(n) + 0.5) / n) for n in (height, width))
    start = (checkerboard * np.outer(*arches)).ravel()
    operator = LinearOperator((count, count), matvec=apply_laplacian, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-13, return_eigenvectors=False)[0])
