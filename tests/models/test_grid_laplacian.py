"""Graph Laplacians of the patch grid against dense matrices and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn, idctn
from scipy.linalg import eigh, expm

from fadeformer.models import grid_laplacian

sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
times, exponents = st.floats(0, 50), st.floats(0.25, 1)


def gaussian_laplacian(height: int, width: int) -> np.ndarray:
    """L of the published graph, patch by patch."""
    positions = np.array([(i, j) for i in range(height) for j in range(width)], dtype=float)
    adjacency = np.exp(-((positions[:, None] - positions) ** 2).sum(-1) / 2)
    return np.diag(adjacency.sum(1)) - adjacency


def neighbor_laplacian(height: int, width: int) -> np.ndarray:
    """The Laplacian of the grid in which a patch is joined to those above, below, left and right of it."""
    positions = np.array([(i, j) for i in range(height) for j in range(width)])
    adjacency = (np.abs(positions[:, None] - positions).sum(-1) == 1).astype(float)
    return np.diag(adjacency.sum(1)) - adjacency


def diffuse(v: torch.Tensor, time: float, exponent: float) -> torch.Tensor:
    """exp(-t Lambda^s) of (B, H, W, C)."""
    parameters = (torch.tensor([value], dtype=v.dtype) for value in (time, exponent))
    decay = grid_laplacian.heat_decay(v.shape[1], v.shape[2], *parameters)
    return grid_laplacian.idct2(grid_laplacian.dct2(v.unsqueeze(3)) * decay.unsqueeze(-1)).squeeze(3)


@pytest.mark.parametrize(
    "sides", [(1, 1), (1, 2), (2, 2), (1, 40), (7, 7), (8, 9), (14, 14), (13, 18), (24, 24), (32, 32), (3, 200)]
)
def test_largest_eigenvalue_matches_dense_matrix(sides):
    exact = np.linalg.eigvalsh(gaussian_laplacian(*sides))[-1]
    assert grid_laplacian.largest_eigenvalue(*sides) == pytest.approx(exact, rel=2e-14, abs=1e-15)


@given(sides, st.integers(0, 5))
def test_laplacian_power_matches_dense_matrix(sides, power):
    laplacian = gaussian_laplacian(*sides)
    largest = np.linalg.eigvalsh(laplacian)[-1]
    rescaled = (2 / largest * laplacian if largest > 1e-12 else 0) - np.eye(len(laplacian))
    dense = np.linalg.matrix_power(rescaled, power)
    np.testing.assert_allclose(grid_laplacian.rescaled_laplacian_operator(*sides, power), dense, rtol=0, atol=1e-12)
    v = torch.randn(2, *sides, 3, dtype=torch.float64)
    actual = grid_laplacian.rescaled_laplacian_power(v, power).reshape(2, -1, 3)
    np.testing.assert_allclose(actual, dense @ v.reshape(2, -1, 3).numpy(), rtol=0, atol=1e-11)


@given(sides, times, exponents)
def test_diffusion_matches_dense_matrix_exponential(sides, time, exponent):
    v = torch.randn(2, *sides, 3, dtype=torch.float64)
    eigenvalues, eigenvectors = eigh(neighbor_laplacian(*sides))
    eigenvalues[0] = 0  # of a connected graph; eigh leaves 1e-17, whose root is not small
    dense = expm(-time * (eigenvectors * eigenvalues**exponent) @ eigenvectors.T) @ v.reshape(2, -1, 3).numpy()
    np.testing.assert_allclose(diffuse(v, time, exponent).reshape(2, -1, 3), dense, rtol=0, atol=1e-6)


@given(sides, times)
def test_diffusion_matches_dense_matrix_exponential_in_float32(sides, time):
    v = torch.randn(1, *sides, 2)
    dense = expm(-time * neighbor_laplacian(*sides)) @ v.reshape(-1, 2).double().numpy()
    np.testing.assert_allclose(
        diffuse(v, time, 1.0).reshape(-1, 2), dense, rtol=0, atol=1e-6 * float(v.abs().max() + 1)
    )


def test_heat_decay_uses_time_and_exponent_per_head():
    time, exponent = torch.tensor([0.0, 0.5, 4.0]).double(), torch.tensor([1.0, 0.3, 0.7]).double()
    actual = grid_laplacian.heat_decay(4, 5, time, exponent)
    for head in range(3):
        torch.testing.assert_close(
            actual[..., head : head + 1], grid_laplacian.heat_decay(4, 5, time[head], exponent[head])
        )


@pytest.mark.parametrize("sides", [(64, 64), (128, 96)])
def test_diffusion_is_exact_on_large_grids(sides):
    v = np.random.default_rng(0).standard_normal(sides)
    eigenvalues = np.add.outer(*(4 * np.sin(np.pi * np.arange(n) / (2 * n)) ** 2 for n in sides))
    expected = idctn(dctn(v, norm="ortho") * np.exp(-3.0 * eigenvalues**0.7), norm="ortho")
    actual = diffuse(torch.from_numpy(v)[None, :, :, None], 3.0, 0.7)
    np.testing.assert_allclose(actual[0, :, :, 0], expected, rtol=0, atol=1e-12)
    single = diffuse(torch.from_numpy(v)[None, :, :, None].float(), 3.0, 0.7)
    np.testing.assert_allclose(single[0, :, :, 0], expected, rtol=0, atol=1e-5)


def test_heat_decay_gradcheck():
    time = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    exponent = torch.tensor([0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *parameters: grid_laplacian.heat_decay(2, 3, *parameters), (time, exponent))
