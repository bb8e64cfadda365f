"""Attribution maps: exact decomposition, agreement with the formulas, and no side effects on the model."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fadeformer.data.normalization import IMAGENET
from fadeformer.explain import attribution
from fadeformer.explain.attribution import fade_attribution, grad_cam, is_constant, upsample
from fadeformer.models.factory import create_model
from fadeformer.models.grid_laplacian import rescaled_laplacian_operator

GRAY = IMAGENET.for_channels(1)
PUBLISHED = {"num_heads": 4}
DIFFUSION = {"variant": "diffusion", "after_blocks": [1, "last"], "num_heads": 4, "dropout": 0.1}


def build_network(backbone: str = "fadevit_nano", fade: dict | None = PUBLISHED, side: int = 28, in_chans: int = 1):
    torch.manual_seed(0)
    return create_model(
        backbone=backbone, num_classes=3, image_size=side, in_chans=in_chans, pretrained=False, dropout=0.5,
        drop_path=0.0, fade=fade,
    ).eval()  # fmt: skip


def noise(images: int = 5, side: int = 28, channels: int = 1):
    return np.random.default_rng(0).integers(0, 256, (images, side, side, channels), dtype=np.uint8)


CLASSES = np.array([0, 1, 2, 0, 1])


def randomize_biases(model):
    """Set non-zero biases, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def snapshot(model):
    """Return everything that an attribution method might modify."""
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    ]
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad is None for parameter in model.parameters()],
        "hooks": hooks,
        "weights": [value.clone() for value in model.state_dict().values()],
    }


def assert_same_state(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before.pop("weights"), after.pop("weights"), strict=True))
    assert before == after


@pytest.mark.parametrize("power", [0, 2, 3])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize(("backbone", "heads", "side"), [("fadevit_nano", 4, 28), ("eva02_tiny_patch14_224", 3, 42)])
def test_fade_attribution_and_bias_sum_to_logit(backbone, heads, side, alpha, power):
    fade = {"num_heads": heads, "alpha": alpha, "K": power}
    model = randomize_biases(build_network(backbone, fade, side)).double()
    maps = fade_attribution(model, noise(side=side), GRAY, CLASSES)
    with torch.no_grad():
        logits = model(GRAY(torch.from_numpy(noise(side=side))).double()).numpy()[np.arange(5), CLASSES]
    np.testing.assert_allclose(maps.logits, logits, atol=1e-10)
    attention = maps.attention.sum(axis=(1, 2))
    for laplacian in (maps.laplacian, maps.laplacian_outputs):
        np.testing.assert_allclose(attention + laplacian.sum(axis=(1, 2)) + maps.bias, logits, atol=1e-8)
    assert maps.alpha == pytest.approx(alpha)
    assert np.abs(maps.bias).min() > 1e-4  # the bias must matter in this test


def test_fade_attribution_matches_explicit_formula():
    """Compare with contributions patch by patch from the full attention and Laplacian matrices."""
    model = randomize_biases(build_network(fade={"num_heads": 4, "alpha": 0.7, "K": 3})).double()
    maps = fade_attribution(model, noise(), GRAY, CLASSES)
    with torch.no_grad():
        features = model.forward_features(GRAY(torch.from_numpy(noise())).double())
        layer, patches = model.attn, features.shape[2] * features.shape[3]
        q, k, v = layer.qkv(features).flatten(2).chunk(3, dim=1)  # each B, C, N
        q, k, v = (part.unflatten(1, (4, 32)).transpose(2, 3) for part in (q, k, v))  # B, heads, N, d
        weights = torch.softmax(q @ k.mT / math.sqrt(32), dim=-1)
        power = rescaled_laplacian_operator(*features.shape[2:], 3)
        project = layer.proj.weight.flatten(1)
        for image, target in enumerate(CLASSES):
            class_direction = model.classifier.weight[target] @ project  # C
            for n in (0, 17, patches - 1):
                patch_values = torch.zeros_like(v[image])
                patch_values[:, n] = v[image][:, n]
                attended = (weights[image] @ patch_values).mean(dim=1).flatten()  # C, from the value of patch n alone
                diffused = (power @ patch_values).mean(dim=1).flatten()
                output = (power @ v[image])[:, n].flatten() / patches
                for name, expected in (
                    ("attention", 0.7 * attended), ("laplacian", 0.3 * diffused), ("laplacian_outputs", 0.3 * output),
                ):  # fmt: skip
                    actual = getattr(maps, name)[image].ravel()[n]
                    assert actual == pytest.approx(float(class_direction @ expected), abs=1e-8), name


def test_laplacian_maps_differ_but_have_equal_sums():
    maps = fade_attribution(build_network(), noise(), GRAY, CLASSES)
    assert np.abs(maps.laplacian - maps.laplacian_outputs).max() > 0.1 * np.abs(maps.laplacian).max()
    sums = [part.sum(axis=(1, 2)) for part in (maps.laplacian, maps.laplacian_outputs)]
    np.testing.assert_allclose(*sums, atol=1e-12)


@pytest.mark.parametrize(
    ("backbone", "fade"), [("fadevit_nano", DIFFUSION), ("fadevit_nano", None), ("resnet18", None)]
)
def test_fade_attribution_rejects_other_networks(backbone, fade):
    with pytest.raises(ValueError, match="fade_attribution needs a FadeNet of variant published; use grad_cam"):
        fade_attribution(build_network(backbone, fade), noise(), GRAY, CLASSES)


@pytest.mark.parametrize(
    ("backbone", "fade", "side", "grid"),
    [
        ("fadevit_nano", PUBLISHED, 28, 7), ("fadevit_nano", DIFFUSION, 28, 7), ("fadevit_nano", None, 28, 7),
        ("vit_tiny_patch16_224", None, 48, 3), ("vit_tiny_patch16_224", PUBLISHED | {"num_heads": 3}, 48, 3),
        ("deit_tiny_distilled_patch16_224", None, 48, 3), ("eva02_tiny_patch14_224", None, 42, 3),
        ("resnet18", None, 96, 3), ("densenet121", None, 96, 3), ("swin_tiny_patch4_window7_224", None, 224, 7),
        ("medvit_small", None, 96, 3),
    ],
)  # fmt: skip
def test_grad_cam_supports_many_architectures(backbone, fade, side, grid):
    model = build_network(backbone, fade, side)
    before = snapshot(model)
    maps = grad_cam(model, noise(side=side), GRAY, CLASSES)
    assert maps.shape == (5, grid, grid)
    assert maps.min() >= 0
    assert maps.max() > 0
    assert not is_constant(maps).all()
    assert_same_state(snapshot(model), before)


def test_grad_cam_matches_the_paper():
    model = build_network("resnet18", None, 96)
    cam = grad_cam(model, noise(side=96), GRAY, CLASSES)
    features = model.forward_features(GRAY(torch.from_numpy(noise(side=96)))).detach().requires_grad_()
    logits = model.forward_head(features)[torch.arange(5), torch.from_numpy(CLASSES)]
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    channels = gradient.mean(dim=(2, 3), keepdim=True)
    expected = functional.relu((channels * features).sum(dim=1)).detach().numpy()
    np.testing.assert_allclose(cam, expected, atol=1e-6 * expected.max())


def test_grad_cam_of_vit_uses_last_block_input():
    model = build_network("vit_tiny_patch16_224", None, 48)
    cam = grad_cam(model, noise(side=48), GRAY, CLASSES)
    images = GRAY(torch.from_numpy(noise(side=48)))
    with torch.no_grad():
        tokens = model.blocks[:-1](model.norm_pre(model._pos_embed(model.patch_embed(images))))
    patches = tokens[:, 1:].clone().requires_grad_()
    last = model.norm(model.blocks[-1](torch.cat([tokens[:, :1], patches], dim=1)))
    logits = model.head(last[:, 0])[torch.arange(5), torch.from_numpy(CLASSES)]
    (gradient,) = torch.autograd.grad(logits.sum(), patches)
    expected = functional.relu((gradient.mean(dim=1, keepdim=True) * patches).sum(dim=2)).detach().numpy()
    np.testing.assert_allclose(cam.reshape(5, 9), expected, atol=1e-6 * expected.max())


@pytest.mark.parametrize("backbone", ["mixer_s32_224", "crossvit_tiny_240"])
def test_network_without_spatial_features_raises_error(backbone):
    side = 240 if "240" in backbone else 224
    model = build_network(backbone, None, side)
    before = snapshot(model)
    with pytest.raises(ValueError, match="have no spatial positions, which Grad-CAM needs"):
        grad_cam(model, noise(1, side), GRAY, CLASSES[:1])
    assert_same_state(snapshot(model), before)


def test_non_timm_module_raises_error():
    with pytest.raises(ValueError, match="Linear lacks timm's methods"):
        grad_cam(torch.nn.Linear(3, 3).eval(), noise(), GRAY, CLASSES)


@pytest.mark.parametrize("explain", [fade_attribution, grad_cam])
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (np.array([0, 1]), r"one integer per image and at least one image, not int64 \(2,\)"),
        (np.array([0.0, 1, 2, 0, 1]), "one integer per image"),
        (np.array([0, 1, -1, 0, 1]), "classes contains -1"),
        (np.array([0, 1, 3, 0, 1]), "classes contains 3, but the model has 3 outputs"),
    ],
)
def test_invalid_classes_raise_error(explain, classes, message):
    with pytest.raises(ValueError, match=message):
        explain(build_network(), noise(), GRAY, classes)


@pytest.mark.parametrize("explain", [fade_attribution, grad_cam])
def test_model_in_training_mode_raises_error(explain):
    model = build_network()
    model.blocks[1].train()
    with pytest.raises(ValueError, match=r"in training mode; call model\.eval\(\) first"):
        explain(model, noise(), GRAY, CLASSES)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("explain", [fade_attribution, grad_cam])
def test_model_and_random_state_are_unchanged(explain, frozen):
    model = build_network()
    model.blocks.requires_grad_(not frozen)
    before, random = snapshot(model), torch.get_rng_state()
    with torch.no_grad():  # callers may disable gradients
        explain(model, noise(), GRAY, CLASSES)
    assert_same_state(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_hooks_are_removed_after_an_error(monkeypatch):
    model = build_network("vit_tiny_patch16_224", None, 48)
    before = snapshot(model)
    monkeypatch.setattr(model.blocks[-1], "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grad_cam(model, noise(side=48), GRAY, CLASSES)
    assert_same_state(snapshot(model), before)


@pytest.mark.parametrize("explain", [lambda *inputs: fade_attribution(*inputs).attention, grad_cam])
def test_maps_are_deterministic_and_independent_of_batch_size(explain, monkeypatch):
    model = build_network()
    maps = explain(model, noise(), GRAY, CLASSES)
    np.testing.assert_array_equal(explain(model, noise(), GRAY, CLASSES), maps)
    monkeypatch.setattr(attribution, "BATCH_SIZE", 2)
    np.testing.assert_allclose(explain(model, noise(), GRAY, CLASSES), maps, atol=1e-5 * np.abs(maps).max())


def test_upsampling_keeps_positions():
    grid = np.zeros((2, 7, 7))
    grid[0, 2, 5], grid[1] = 1.0, 3.0
    maps = upsample(grid, 28)
    assert maps.shape == (2, 28, 28)
    row, column = np.unravel_index(maps[0].argmax(), (28, 28))
    assert (row // 4, column // 4) == (2, 5)
    np.testing.assert_allclose(maps[1], 3.0)
    assert maps[0].sum() == pytest.approx(16.0)  # the value of an inner patch is spread over its 16 pixels


def test_constant_maps_are_detected():
    maps = np.stack([np.zeros((3, 3)), np.full((3, 3), 0.1) + 1e-17, np.arange(9.0).reshape(3, 3)])
    assert is_constant(maps).tolist() == [True, True, False]
