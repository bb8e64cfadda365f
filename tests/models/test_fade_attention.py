"""FadeAttn against the published layer's numbers, and against the formula written plainly."""

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
# file, heads, K; the numbers were computed with the published code in float32
CASES = [("c64_h8_k3_14x14", 8, 3), ("c48_h4_k1_7x5", 4, 1), ("c32_h8_k5_4x16", 8, 5)]


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest error as a fraction of the largest value."""
    return float((found.detach().double() - torch.from_numpy(expected).double()).abs().max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "heads", "power"), CASES)
@pytest.mark.parametrize("precomputed", [True, False])
def test_output_and_gradients_are_the_published_ones(name, heads, power, precomputed):
    numbers = np.load(REFERENCE / f"fadeattn_{name}.npz")
    layer = FadeAttn(numbers["x"].shape[1], heads, power).eval()
    layer.load_state_dict({key: torch.from_numpy(numbers[key]) for key in layer.state_dict()})
    x = torch.from_numpy(numbers["x"]).requires_grad_()
    with settings(precomputed, 2**22):
        y = layer(x)
    assert relative(y, numbers["y"]) < 1e-5
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert relative(x.grad, numbers["grad_x"]) < 1e-5
    for key, parameter in layer.named_parameters():
        assert relative(parameter.grad, numbers[f"grad_{key}"]) < 1e-5, key


def plain(layer: FadeAttn, x: torch.Tensor) -> torch.Tensor:
    """The formula of the module's docstring, one head and one patch at a time."""
    batch, channels, height, width = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    near = [[math.exp(-((i - k) ** 2 + (j - m) ** 2) / 2) for k, m in places] for i, j in places]
    a = torch.tensor(near, dtype=torch.float64)
    lap = torch.diag(a.sum(1)) - a
    top = torch.linalg.eigvalsh(lap)[-1]
    rescaled = -torch.eye(len(lap)).double() + (2 * lap / top if top > 0 else 0)
    qkv = torch.einsum("oc,bchw->bohw", layer.qkv.weight[:, :, 0, 0], x) + layer.qkv.bias[:, None, None]
    q, k, v = (part.flatten(2) for part in qkv.chunk(3, dim=1))
    out = torch.empty(batch, channels, height * width, dtype=x.dtype)
    for b in range(batch):
        for h in range(layer.num_heads):
            of = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            weights = torch.softmax(q[b, of].T @ k[b, of] / math.sqrt(layer.head_dim), dim=1)
            diffused = v[b, of].T.double()
            for _ in range(layer.K):
                diffused = rescaled @ diffused
            out[b, of] = (layer.alpha * (weights @ v[b, of].T) + (1 - layer.alpha) * diffused).T
    mixed = out.reshape(x.shape)
    return torch.einsum("oc,bchw->bohw", layer.proj.weight[:, :, 0, 0], mixed) + layer.proj.bias[:, None, None]


layers = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([1, 2, 4]), "K": st.integers(0, 4), "alpha": st.floats(-1, 2),
        "grid": st.tuples(st.integers(1, 6), st.integers(1, 6)), "seed": st.integers(0, 1000),
        "dtype": st.sampled_from([torch.float32, torch.float64]), "precomputed": st.booleans(),
        "chunk": st.sampled_from([1, 50, 2**22]),
    }
)  # fmt: skip
PATHS = ("forward", "forward_pooled")


@contextmanager
def settings(precomputed: bool, chunk: int):
    """How L^^K is applied, and how many attention weights are computed at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fade_attention, "MAX_PRECOMPUTED_PATCHES", 10**6 if precomputed else 0)
        patch.setattr(fade_attention, "CHUNK_SIZE", chunk)
        yield


def make(case: dict) -> tuple[FadeAttn, torch.Tensor]:
    torch.manual_seed(case["seed"])
    layer = FadeAttn(8, case["heads"], case["K"], case["alpha"]).to(case["dtype"]).eval()
    return layer, torch.randn(2, 8, *case["grid"], dtype=case["dtype"])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if found.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


@given(layers)
def test_map_is_the_formula(case):
    layer, x = make(case)
    with settings(case["precomputed"], case["chunk"]):
        assert_close(layer(x), plain(layer, x))


@given(layers)
def test_pooled_is_the_mean_of_the_map(case):
    layer, x = make(case)
    with settings(case["precomputed"], case["chunk"]):
        assert_close(layer.forward_pooled(x), layer(x).mean(dim=(2, 3)))


@given(layers, st.sampled_from(PATHS))
def test_memory_layout_does_not_matter(case, path):
    layer, x = make(case)
    expected = getattr(layer, path)(x)
    for axes, back in (((0, 2, 3, 1), (0, 3, 1, 2)), ((3, 2, 1, 0), (3, 2, 1, 0))):
        elsewhere = x.permute(axes).contiguous().permute(back)
        assert_close(getattr(layer, path)(elsewhere), expected)
    spaced = torch.stack([x, x], dim=-1)[..., 0]
    assert_close(getattr(layer, path)(spaced), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("precomputed", "chunk"), [(True, 2**22), (False, 8)])
def test_gradients_are_right(path, precomputed, chunk):
    torch.manual_seed(0)
    layer = FadeAttn(4, 2, 3).double().eval()
    x = torch.randn(2, 4, 2, 3).double().requires_grad_()
    with settings(precomputed, chunk):
        assert torch.autograd.gradcheck(lambda *inputs: getattr(layer, path)(inputs[0]), (x, *layer.parameters()))


def test_a_layer_first_used_for_inference_still_trains():
    layer = FadeAttn(8, 2)
    x = torch.randn(1, 8, 3, 4)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.qkv.weight.grad is not None


def test_pooled_drops_the_channels_that_the_map_drops():
    layer = FadeAttn(8, 2, dropout=0.5).train()
    x = torch.randn(4, 8, 3, 5)
    torch.manual_seed(0)
    of_map = layer(x).mean(dim=(2, 3))
    torch.manual_seed(0)
    pooled = layer.forward_pooled(x)
    assert (pooled == 0).any()
    torch.testing.assert_close(pooled, of_map)


def test_no_spatial_information_passes_the_published_diffusion():
    """docs/explanation/fade_attention.md: whatever the graph is, logits and gradients behind a mean are the same."""
    layer, x = make(CASE)
    found, narrower = [], grid_laplacian.gaussian_kernel
    for largest in (6.0, 1.0, 50.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid_laplacian, "largest_eigenvalue", lambda *_, value=largest: value)
            patch.setattr(
                grid_laplacian, "gaussian_kernel", lambda size, like, power=largest: narrower(size, like) ** power
            )
            layer._operator_cache.clear()
            pooled = layer(x).mean(dim=(2, 3))
        found.append([pooled, *torch.autograd.grad(pooled.square().sum(), list(layer.parameters()))])
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_of_it_in_half_the_bits(path, dtype):
    torch.manual_seed(0)
    layer = FadeAttn(64, 8).eval()
    x = torch.randn(2, 64, 9, 9, requires_grad=True)
    expected = getattr(layer, path)(x)
    (of_x,) = torch.autograd.grad(expected.sum(), x)
    with settings(precomputed=False, chunk=200):
        found = getattr(layer.to(dtype), path)(x.to(dtype))
        (of_half,) = torch.autograd.grad(found.sum(), x)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.02 * layer(x.to(dtype)).abs().max()
    assert (of_half - of_x).abs().max() < 0.02 * of_x.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"), [((10, 3), "does not divide"), ((8, 0), "num_heads is 0"), ((8, 2, -1), "K is -1")]
)
def test_arguments_that_do_not_fit_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        FadeAttn(*arguments)
