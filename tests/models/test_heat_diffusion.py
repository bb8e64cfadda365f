"""DiffusionAttn against a naive implementation of its formula, and attention pooling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fadeformer.models import grid_laplacian, heat_diffusion
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn

cases = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([1, 2, 4]), "grid": st.tuples(st.integers(1, 6), st.integers(1, 6)),
        "seed": st.integers(0, 1000), "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)  # fmt: skip


def make_layer(case: dict) -> tuple[DiffusionAttn, torch.Tensor]:
    torch.manual_seed(case["seed"])
    layer = DiffusionAttn(8, case["heads"]).to(case["dtype"]).eval()
    with torch.no_grad():
        for parameter in (layer.time_logit, layer.exponent_logit, layer.gate_logit):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(2, *case["grid"], 8, dtype=case["dtype"])


def diffuse(values: torch.Tensor, time: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    decay = grid_laplacian.heat_decay(*values.shape[1:3], time, exponent)
    return grid_laplacian.idct2(grid_laplacian.dct2(values) * decay.unsqueeze(-1))


def naive_diffusion_attention(layer: DiffusionAttn, x: torch.Tensor) -> torch.Tensor:
    """Compute the formula of the module's docstring, one head at a time."""
    batch, height, width, channels = x.shape
    normalized = functional.layer_norm(x, (channels,), layer.norm.weight, layer.norm.bias)
    qkv = normalized.reshape(batch, -1, channels) @ layer.qkv.weight[:, :, 0, 0].T + layer.qkv.bias
    outs = []
    for head, depth in enumerate([channels // layer.num_heads] * layer.num_heads):
        q, k, v = (part[..., head * depth : (head + 1) * depth] for part in qkv.chunk(3, dim=-1))
        attended = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(depth), dim=-1) @ v
        head_values = v.reshape(batch, height, width, 1, depth)
        diffused = diffuse(head_values, layer.time[head : head + 1], layer.exponent[head : head + 1])
        outs.append(layer.gate[head] * attended + (1 - layer.gate[head]) * diffused.reshape(v.shape))
    residual = torch.cat(outs, dim=-1) @ layer.proj.weight[:, :, 0, 0].T + layer.proj.bias
    return x + residual.reshape(x.shape)


@given(cases)
def test_forward_matches_formula(case):
    layer, x = make_layer(case)
    tolerance = 1e-9 if case["dtype"] == torch.float64 else 1e-5
    torch.testing.assert_close(layer(x), naive_diffusion_attention(layer, x), rtol=tolerance, atol=tolerance)


def test_layer_gradcheck():
    layer, x = make_layer({"heads": 2, "grid": (2, 3), "seed": 0, "dtype": torch.float64})
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *layer.parameters()))


@pytest.mark.parametrize("compiling", [False, True])
def test_gated_heat_diffusion_gradcheck(compiling, monkeypatch):
    """For the custom backward pass, and for the traced form."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    values, attended = torch.randn(2, 2, 2, 3, 2, 2).double().requires_grad_().unbind(0)
    parameters = [torch.tensor(pair).double().requires_grad_() for pair in ([0.3, 2.0], [0.5, 0.9], [0.2, 0.7])]
    assert torch.autograd.gradcheck(heat_diffusion.gated_heat_diffusion, (values, attended, *parameters))
    time, exponent, gate = parameters
    expected = gate[:, None] * attended + (1 - gate[:, None]) * diffuse(values, time, exponent)
    torch.testing.assert_close(heat_diffusion.gated_heat_diffusion(values, attended, *parameters), expected)


def test_initial_times_differ_and_parameters_stay_in_range():
    layer = DiffusionAttn(8, 4)
    torch.testing.assert_close(layer.time, torch.tensor([0.1, 0.1 * 20 ** (1 / 3), 0.1 * 20 ** (2 / 3), 2.0]))
    for value in (-1e3, 1e3):
        with torch.no_grad():
            for parameter in (layer.time_logit, layer.exponent_logit, layer.gate_logit):
                parameter.fill_(value)
        for parameters, (low, high) in (
            (layer.time, heat_diffusion.TIME_RANGE), (layer.exponent, heat_diffusion.EXPONENT_RANGE),
            (layer.gate, (0.0, 1.0)),
        ):  # fmt: skip
            assert (parameters >= low * (1 - 1e-6)).all()
            assert (parameters <= high * (1 + 1e-6)).all()
        assert layer(torch.randn(1, 3, 3, 8)).isfinite().all()


def test_time_and_gate_converge_to_teacher():
    """Trained on the output of a teacher layer, time and gate approach the teacher's."""
    torch.manual_seed(0)
    layer = DiffusionAttn(4, 2, dropout=0.0)
    optimizer = torch.optim.Adam([layer.time_logit, layer.exponent_logit, layer.gate_logit], lr=1e-2)
    teacher = DiffusionAttn(4, 2, dropout=0.0)
    teacher.load_state_dict(layer.state_dict())
    with torch.no_grad():
        teacher.time_logit.copy_(layer.time_logit + torch.tensor([2.0, 1.0]) / heat_diffusion.LOGIT_SCALE)
        teacher.gate_logit.copy_(torch.tensor([2.0, -2.0]) / heat_diffusion.LOGIT_SCALE)
    for _ in range(150):
        x = torch.randn(8, 6, 6, 4)
        loss = (layer(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(layer.time, teacher.time, rtol=0.3, atol=0)
    torch.testing.assert_close(layer.gate, torch.sigmoid(torch.tensor([2.0, -2.0])), rtol=0, atol=0.1)


def test_attention_pool_output_depends_on_diffusion_time():
    """Unlike with the published layer, the pooled features change with diffusion time by more than a constant."""
    torch.manual_seed(0)
    layer, pool = DiffusionAttn(8, 2, dropout=0.0), AttentionPool(8, 2)
    with torch.no_grad():
        pool.score.weight.normal_()
    x = torch.randn(3, 5, 5, 8)
    before = pool(layer(x).flatten(1, 2))
    with torch.no_grad():
        layer.time_logit.add_(1.0 / heat_diffusion.LOGIT_SCALE)
    difference = pool(layer(x).flatten(1, 2)) - before
    assert (difference.std(dim=0) > 1e-3).all()


def test_pooling_starts_as_mean_and_gets_gradients():
    pool = AttentionPool(8, 2)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(pool(x), x.mean(dim=1))
    pool(x).square().sum().backward()
    assert pool.score.weight.grad.abs().max() > 0


def test_pooling_weights_channels_of_each_head():
    pool = AttentionPool(4, 2)
    with torch.no_grad():
        pool.score.weight[0, 0] = 100.0  # the first head scores patches by the first channel
    x = torch.randn(1, 6, 4)
    x[0, 4, 0] = x[0, :, 0].max() + 1
    torch.testing.assert_close(pool(x)[0, :2], x[0, 4, :2])
    torch.testing.assert_close(pool(x)[0, 2:], x[0, :, 2:].mean(dim=0))


def test_saturated_time_still_gets_gradient():
    layer, x = make_layer({"heads": 2, "grid": (3, 4), "seed": 0, "dtype": torch.float32})
    with torch.no_grad():
        layer.time_logit.fill_(5.0 / heat_diffusion.LOGIT_SCALE)
    layer(x).square().sum().backward()
    assert (layer.time_logit.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    layer, x = make_layer({"heads": 2, "grid": (5, 6), "seed": 1, "dtype": torch.float32})
    expected = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("heads", "message"), [(3, "does not divide"), (0, "num_heads is 0")])
def test_invalid_num_heads_raises(heads, message):
    for make_layer in (DiffusionAttn, AttentionPool):
        with pytest.raises(ValueError, match=message):
            make_layer(8, heads)
