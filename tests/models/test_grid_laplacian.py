"""The patch grid's two graphs against whole matrices, linear algebra and scipy."""

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
    places = np.array([(i, j) for i in range(height) for j in range(width)], dtype=float)
    near = np.exp(-((places[:, None] - places) ** 2).sum(-1) / 2)
    return np.diag(near.sum(1)) - near


def neighbour_laplacian(height: int, width: int) -> np.ndarray:
    """The Laplacian of the grid in which a patch is joined to those above, below, left and right of it."""
    places = np.array([(i, j) for i in range(height) for j in range(width)])
    joined = (np.abs(places[:, None] - places).sum(-1) == 1).astype(float)
    return np.diag(joined.sum(1)) - joined


def heated(v: torch.Tensor, time: float, exponent: float) -> torch.Tensor:
    """exp(-t Lambda^s) of (B, H, W, C)."""
    numbers = (torch.tensor([value], dtype=v.dtype) for value in (time, exponent))
    decay = grid_laplacian.heat_decay(v.shape[1], v.shape[2], *numbers)
    return grid_laplacian.idct2(grid_laplacian.dct2(v.unsqueeze(3)) * decay.unsqueeze(-1)).squeeze(3)


@pytest.mark.parametrize(
    "sides", [(1, 1), (1, 2), (2, 2), (1, 40), (7, 7), (8, 9), (14, 14), (13, 18), (24, 24), (32, 32), (3, 200)]
)
def test_lambda_max_is_that_of_the_whole_matrix(sides):
    exact = np.linalg.eigvalsh(gaussian_laplacian(*sides))[-1]
    assert grid_laplacian.largest_eigenvalue(*sides) == pytest.approx(exact, rel=2e-14, abs=1e-15)


@given(sides, st.integers(0, 5))
def test_powers_are_those_of_the_whole_matrix(sides, power):
    lap = gaussian_laplacian(*sides)
    top = np.linalg.eigvalsh(lap)[-1]
    rescaled = (2 / top * lap if top > 1e-12 else 0) - np.eye(len(lap))
    whole = np.linalg.matrix_power(rescaled, power)
    np.testing.assert_allclose(grid_laplacian.rescaled_laplacian_operator(*sides, power), whole, rtol=0, atol=1e-12)
    v = torch.randn(2, *sides, 3, dtype=torch.float64)
    found = grid_laplacian.rescaled_laplacian_power(v, power).reshape(2, -1, 3)
    np.testing.assert_allclose(found, whole @ v.reshape(2, -1, 3).numpy(), rtol=0, atol=1e-11)


@given(sides, times, exponents)
def test_heat_is_the_exponential_of_the_whole_matrix(sides, time, exponent):
    v = torch.randn(2, *sides, 3, dtype=torch.float64)
    values, waves = eigh(neighbour_laplacian(*sides))
    values[0] = 0  # of a connected graph; eigh leaves 1e-17, whose root is not small
    whole = expm(-time * (waves * values**exponent) @ waves.T) @ v.reshape(2, -1, 3).numpy()
    np.testing.assert_allclose(heated(v, time, exponent).reshape(2, -1, 3), whole, rtol=0, atol=1e-6)


@given(sides, times)
def test_heat_is_the_exponential_of_the_whole_matrix_in_float32(sides, time):
    v = torch.randn(1, *sides, 2)
    whole = expm(-time * neighbour_laplacian(*sides)) @ v.reshape(-1, 2).double().numpy()
    np.testing.assert_allclose(heated(v, time, 1.0).reshape(-1, 2), whole, rtol=0, atol=1e-6 * float(v.abs().max() + 1))


def test_each_head_has_its_own_time_and_exponent():
    time, exponent = torch.tensor([0.0, 0.5, 4.0]).double(), torch.tensor([1.0, 0.3, 0.7]).double()
    found = grid_laplacian.heat_decay(4, 5, time, exponent)
    for head in range(3):
        torch.testing.assert_close(
            found[..., head : head + 1], grid_laplacian.heat_decay(4, 5, time[head], exponent[head])
        )


@pytest.mark.parametrize("sides", [(64, 64), (128, 96)])
def test_large_grids_are_as_exact(sides):
    v = np.random.default_rng(0).standard_normal(sides)
    eigenvalues = np.add.outer(*(4 * np.sin(np.pi * np.arange(n) / (2 * n)) ** 2 for n in sides))
    expected = idctn(dctn(v, norm="ortho") * np.exp(-3.0 * eigenvalues**0.7), norm="ortho")
    found = heated(torch.from_numpy(v)[None, :, :, None], 3.0, 0.7)
    np.testing.assert_allclose(found[0, :, :, 0], expected, rtol=0, atol=1e-12)
    single = heated(torch.from_numpy(v)[None, :, :, None].float(), 3.0, 0.7)
    np.testing.assert_allclose(single[0, :, :, 0], expected, rtol=0, atol=1e-5)


def test_gradients_of_the_decay_are_right():
    time = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    exponent = torch.tensor([0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *numbers: grid_laplacian.heat_decay(2, 3, *numbers), (time, exponent))
