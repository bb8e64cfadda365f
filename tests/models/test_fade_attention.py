"""FadeAttn against the published numbers and a naive implementation of the formula."""

import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.models import fade_attention, grid_laplacian
from fadeformer.models.fade_attention import FadeAttn

REFERENCE = Path(__file__).parents[1] / "reference"
CASE = {"heads": 2, "K": 3, "alpha": 0.3, "grid": (4, 5), "seed": 1, "dtype": torch.float64}
# file, heads, K; computed with the published code in float32
CASES = [("c64_h8_k3_14x14", 8, 3), ("c48_h4_k1_7x5", 4, 1), ("c32_h8_k5_4x16", 8, 5)]


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Return the maximum absolute error divided by the maximum absolute value."""
    return float((actual.detach().double() - torch.from_numpy(expected).double()).abs().max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "heads", "power"), CASES)
@pytest.mark.parametrize("precomputed", [True, False])
def test_output_and_gradients_match_published_layer(name, heads, power, precomputed):
    numbers = np.load(REFERENCE / f"fadeattn_{name}.npz")
    layer = FadeAttn(numbers["x"].shape[1], heads, power).eval()
    layer.load_state_dict({key: torch.from_numpy(numbers[key]) for key in layer.state_dict()})
    x = torch.from_numpy(numbers["x"]).requires_grad_()
    with constants(precomputed, 2**22):
        y = layer(x)
    assert relative_error(y, numbers["y"]) < 1e-5
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert relative_error(x.grad, numbers["grad_x"]) < 1e-5
    for key, parameter in layer.named_parameters():
        assert relative_error(parameter.grad, numbers[f"grad_{key}"]) < 1e-5, key


def naive_fade_attention(layer: FadeAttn, x: torch.Tensor) -> torch.Tensor:
    """Compute the formula of the module's docstring, one head at a time, with dense matrices."""
    batch, channels, height, width = x.shape
    positions = [(i, j) for i in range(height) for j in range(width)]
    adjacency = [[math.exp(-((i - k) ** 2 + (j - m) ** 2) / 2) for k, m in positions] for i, j in positions]
    a = torch.tensor(adjacency, dtype=torch.float64)
    laplacian = torch.diag(a.sum(1)) - a
    largest = torch.linalg.eigvalsh(laplacian)[-1]
    rescaled = -torch.eye(len(laplacian)).double() + (2 * laplacian / largest if largest > 0 else 0)
    qkv = torch.einsum("oc,bchw->bohw", layer.qkv.weight[:, :, 0, 0], x) + layer.qkv.bias[:, None, None]
    q, k, v = (part.flatten(2) for part in qkv.chunk(3, dim=1))
    out = torch.empty(batch, channels, height * width, dtype=x.dtype)
    for b in range(batch):
        for h in range(layer.num_heads):
            head = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            weights = torch.softmax(q[b, head].T @ k[b, head] / math.sqrt(layer.head_dim), dim=1)
            diffused = v[b, head].T.double()
            for _ in range(layer.K):
                diffused = rescaled @ diffused
            out[b, head] = (layer.alpha * (weights @ v[b, head].T) + (1 - layer.alpha) * diffused).T
    mixed = out.reshape(x.shape)
    return torch.einsum("oc,bchw->bohw", layer.proj.weight[:, :, 0, 0], mixed) + layer.proj.bias[:, None, None]


layer_cases = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([1, 2, 4]), "K": st.integers(0, 4), "alpha": st.floats(-1, 2),
        "grid": st.tuples(st.integers(1, 6), st.integers(1, 6)), "seed": st.integers(0, 1000),
        "dtype": st.sampled_from([torch.float32, torch.float64]), "precomputed": st.booleans(),
        "chunk": st.sampled_from([1, 50, 2**22]),
    }
)  # fmt: skip
METHODS = ("forward", "forward_pooled")


@contextmanager
def constants(precomputed: bool, chunk: int):
    """Set how L^^K is applied and the chunk size of attention weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fade_attention, "MAX_PRECOMPUTED_PATCHES", 10**6 if precomputed else 0)
        patch.setattr(fade_attention, "CHUNK_SIZE", chunk)
        yield


def make_layer(case: dict) -> tuple[FadeAttn, torch.Tensor]:
    torch.manual_seed(case["seed"])
    layer = FadeAttn(8, case["heads"], case["K"], case["alpha"]).to(case["dtype"]).eval()
    return layer, torch.randn(2, 8, *case["grid"], dtype=case["dtype"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if actual.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


@given(layer_cases)
def test_forward_matches_formula(case):
    layer, x = make_layer(case)
    with constants(case["precomputed"], case["chunk"]):
        assert_close(layer(x), naive_fade_attention(layer, x))


@given(layer_cases)
def test_forward_pooled_is_mean_of_forward(case):
    layer, x = make_layer(case)
    with constants(case["precomputed"], case["chunk"]):
        assert_close(layer.forward_pooled(x), layer(x).mean(dim=(2, 3)))


@given(layer_cases, st.sampled_from(METHODS))
def test_memory_layout_does_not_change_output(case, method):
    layer, x = make_layer(case)
    expected = getattr(layer, method)(x)
    for axes, back in (((0, 2, 3, 1), (0, 3, 1, 2)), ((3, 2, 1, 0), (3, 2, 1, 0))):
        permuted = x.permute(axes).contiguous().permute(back)
        assert_close(getattr(layer, method)(permuted), expected)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert_close(getattr(layer, method)(strided), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precomputed", "chunk"), [(True, 2**22), (False, 8)])
def test_gradcheck(method, precomputed, chunk):
    torch.manual_seed(0)
    layer = FadeAttn(4, 2, 3).double().eval()
    x = torch.randn(2, 4, 2, 3).double().requires_grad_()
    with constants(precomputed, chunk):
        assert torch.autograd.gradcheck(lambda *inputs: getattr(layer, method)(inputs[0]), (x, *layer.parameters()))


def test_layer_trains_after_inference_mode():
    layer = FadeAttn(8, 2)
    x = torch.randn(1, 8, 3, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.qkv.weight.grad is not None


def test_pooled_dropout_drops_same_channels():
    layer = FadeAttn(8, 2, dropout=0.5).train()
    x = torch.randn(4, 8, 3, 5)
    torch.manual_seed(0)
    map_mean = layer(x).mean(dim=(2, 3))
    torch.manual_seed(0)
    pooled = layer.forward_pooled(x)
    assert (pooled == 0).any()
    torch.testing.assert_close(pooled, map_mean)


def test_pooled_output_is_independent_of_graph():
    """Average pooling removes all spatial information of the diffusion term (docs/explanation/fade_attention.md)."""
    layer, x = make_layer(CASE)
    results, original_kernel = [], grid_laplacian.gaussian_kernel
    for largest in (6.0, 1.0, 50.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid_laplacian, "largest_eigenvalue", lambda *_, value=largest: value)
            patch.setattr(
                grid_laplacian,
                "gaussian_kernel",
                lambda size, like, power=largest: original_kernel(size, like) ** power,
            )
            layer._operator_cache.clear()
            pooled = layer(x).mean(dim=(2, 3))
        results.append([pooled, *torch.autograd.grad(pooled.square().sum(), list(layer.parameters()))])
    for one, two, three in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(method, dtype):
    torch.manual_seed(0)
    layer = FadeAttn(64, 8).eval()
    x = torch.randn(2, 64, 9, 9, requires_grad=True)
    expected = getattr(layer, method)(x)
    (grad_x,) = torch.autograd.grad(expected.sum(), x)
    with constants(precomputed=False, chunk=200):
        actual = getattr(layer.to(dtype), method)(x.to(dtype))
        (grad_half,) = torch.autograd.grad(actual.sum(), x)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.02 * layer(x.to(dtype)).abs().max()
    assert (grad_half - grad_x).abs().max() < 0.02 * grad_x.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"), [((10, 3), "does not divide"), ((8, 0), "num_heads is 0"), ((8, 2, -1), "K is -1")]
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        FadeAttn(*arguments)
