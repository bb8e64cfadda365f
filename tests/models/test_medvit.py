"""MedViT against the authors' code, its attention formula, and timm's model interface."""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fadeformer.models.medvit import ESA, MedViT
from tests.models.test_fade_attention import relative_error


def tiny_medvit(**options: float) -> MedViT:
    """Return a model with all kinds of blocks and few channels."""
    torch.manual_seed(0)
    sizes = {"depths": (1, 2, 5, 2), "widths": (16, 48, 48, 48), "stem_widths": (8, 8, 8), "head_dim": 16}
    return MedViT(**sizes, **{"num_classes": 3, **options})


def fill_weights(model: MedViT) -> None:
    """Fill weights with values that depend only on the sorted names; variances near 3 keep activations bounded."""
    scales = {"weight": 1, "running_var": 3}
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(model.state_dict().items())):
            if value.is_floating_point():
                noise = torch.from_numpy(np.random.RandomState(i).standard_normal(tuple(value.shape)))
                scale = scales.get(name.split(".")[-1])
                if value.ndim > 1:
                    value.copy_(noise / value[0].numel() ** 0.5)
                else:
                    value.copy_(0.1 * noise if scale is None else scale * torch.exp(0.1 * noise))


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    # The paper's table has 10.8, 23.6 and 45.8 M parameters and 1.3, 4.9 and 13.4 G multiply-adds for its T, S and L.
    # The authors' code, the reference here, has the following sizes instead.
    [
        ("medvit_small", 32_161_440, 5_857_533_120),
        ("medvit_base", 45_430_972, 8_356_863_168),
        ("medvit_large", 58_700_504, 10_856_193_216),
    ],
)
def test_parameters_and_macs_match_authors_code(name, parameters, macs):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("medvit_small", "24fc558d6ec86071f1ba31f8e96f1bc2"),
        ("medvit_base", "09e0ed0b42e515b7606967f105e547db"),
        ("medvit_large", "177d8ddc3a376496497dc91a9766b326"),
    ],
)
def test_state_dict_matches_authors_code(name, digest):
    """The authors' published weights and weights saved here must load."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    results = json.dumps({name: list(value.shape) for name, value in state.items()}, sort_keys=True)
    assert hashlib.md5(results.encode(), usedforsecurity=False).hexdigest() == digest


def test_logits_match_authors_code():
    """Expected: their MedViT_small in float64 with these weights; at this size attention drops 12 and 3 tokens."""
    model = timm.create_model("medvit_small", num_classes=5).eval()
    fill_weights(model)
    images = np.random.RandomState(999).standard_normal((2, 3, 112, 80)).astype(np.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(images))
    expected = [
        [276.95715090582263, 522.9260520635825, -392.8496131869165, -541.8254669343132, 154.45165933242177],
        [261.40536310559264, 507.0012772585116, -395.3364418018295, -540.725236703206, 159.8747076825823],
    ]
    assert relative_error(logits, np.array(expected)) < 1e-5


def naive_attention(layer: ESA, x: Tensor) -> Tensor:
    """Compute the module's formula one token and one head at a time."""
    window = min(layer.reduction**2, x.shape[1])
    out = torch.zeros_like(x)
    for image in range(len(x)):
        context = [x[image, i : i + window].mean(dim=0) for i in range(0, x.shape[1] - window + 1, window)]
        if layer.reduction > 1:
            norm = layer.norm
            std = (norm.running_var + norm.eps).sqrt()
            context = [(token - norm.running_mean) / std * norm.weight + norm.bias for token in context]
        for i, token in enumerate(x[image]):
            for first in range(0, x.shape[2], layer.head_dim):
                head = slice(first, first + layer.head_dim)
                scores = [layer.q(token)[head] @ layer.k(other)[head] / layer.head_dim**0.5 for other in context]
                weights = torch.stack(scores).exp()
                values = torch.stack([layer.v(other)[head] for other in context])
                out[image, i, head] = (weights[:, None] * values).sum(dim=0) / weights.sum()
    return layer.proj(out)


@pytest.mark.parametrize(("reduction", "tokens"), [(1, 5), (2, 8), (2, 11), (2, 3), (3, 20)])
def test_attention_matches_naive_implementation(reduction, tokens):
    torch.manual_seed(0)
    layer = ESA(12, head_dim=4, reduction=reduction).double().eval()
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + (0.5 if name == "norm.running_var" else -0.5))
        x = torch.randn(2, tokens, 12, dtype=torch.float64)
        assert relative_error(layer(x), naive_attention(layer, x).numpy()) < 1e-12


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (28, 28), (65, 33), (1, 1)])
def test_any_image_size(size):
    model = tiny_medvit().eval()
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        features = model.forward_features(images)
        logits = model(images)
    assert features.shape == (1, model.num_features, -(-size[0] // 32), -(-size[1] // 32))
    assert logits.shape == (1, 3)
    assert logits.isfinite().all()


def test_timm_create_model_passes_options():
    options = {"num_classes": 3, "in_chans": 1, "drop_rate": 0.1, "drop_path_rate": 0.1}
    model = timm.create_model("medvit_small", pretrained=False, **options)
    assert isinstance(model, MedViT)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    assert model.head_drop.p == 0.1
    first, last = model.features[0], model.features[-1]
    assert first.drop_path.drop_prob == 0
    assert (last.drop_path1.drop_prob, last.drop_path2.drop_prob) == pytest.approx((0.075, 0.025))


def test_pretrained_raises():
    with pytest.raises(ValueError, match="medvit_small has no pretrained weights"):
        timm.create_model("medvit_small", pretrained=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depths": (3, 4, 8, 3)}, "the third a multiple of 5"),
        ({"depths": (3, 0, 5, 3)}, "each must be 1 or more"),
        ({"widths": (100, 192, 384, 768)}, "the first must be a multiple of 32"),
        ({"widths": (96, 128, 384, 768)}, "the others of 96"),
    ],
)
def test_invalid_sizes_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        MedViT(**sizes)


def test_gradients_reach_every_parameter():
    model = tiny_medvit(drop_path_rate=0.1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_keeps_results(training):
    images = torch.randn(3, 3, 64, 64)
    results = []
    for enable in (False, True):
        model = tiny_medvit(drop_rate=0.2, drop_path_rate=0.3, attn_drop_rate=0.2, proj_drop_rate=0.2).train(training)
        model.set_grad_checkpointing(enable)
        passes = []
        model.features[3].mhca.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        torch.manual_seed(1)
        logits = model(images)
        logits.square().sum().backward()
        assert len(passes) == 1 + enable
        results.append((logits, [parameter.grad for parameter in model.parameters()], list(model.buffers())))
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    (logits, gradients, buffers), (logits2, gradients2, buffers2) = results
    assert torch.equal(logits, logits2)
    assert all(torch.equal(first, second) for first, second in zip(gradients, gradients2, strict=True))
    assert all(torch.equal(first, second) for first, second in zip(buffers, buffers2, strict=True))


def test_reset_classifier():
    model = tiny_medvit().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        assert torch.equal(model.get_classifier()(pooled), model(images))
        model.reset_classifier(7)
        assert model.get_classifier().out_features == model.num_classes == 7
        assert model(images).shape == (2, 7)
        assert "proj_head.0.weight" in model.state_dict()
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
        assert model.num_classes == 0


def test_layer_groups_are_ordered():
    """One group per block, or per stage; the final norm belongs to the last one."""
    model = tiny_medvit()
    blocks = group_parameters(model, model.group_matcher(), reverse=True)
    assert blocks["stem.0.conv.weight"] == 0
    assert {blocks[name] for name in blocks if name.startswith("features.9.")} == {10}
    assert (blocks["norm.weight"], blocks["proj_head.0.weight"]) == (10, 11)
    stages = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    results = [{stages[name] for name in stages if name.startswith(f"features.{i}.")} for i in range(10)]
    assert results == [{1}, {2}, {2}, {3}, {3}, {3}, {3}, {3}, {4}, {4}]
    assert (stages["stem.0.conv.weight"], stages["norm.weight"], stages["proj_head.0.weight"]) == (0, 4, 5)
    assert set(stages) == set(blocks) == {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() == set()
