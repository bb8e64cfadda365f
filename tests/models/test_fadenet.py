"""FadeNet against the published model, on all kinds of timm ViTs, and with the interface of timm models."""

import copy
import hashlib
import json
import pickle

import numpy as np
import pytest
import timm
import torch

from fadeformer.models.factory import create_model
from fadeformer.models.fadenet import FadeBlock, FadeNet
from tests.models.test_fade_attention import REFERENCE, relative_error

PUBLISHED = json.loads((REFERENCE / "fadenet_vit_base.json").read_text())
VARIANTS = ("published", "diffusion")
# Small versions of each kind of timm ViT: name, further arguments, height and width.
VITS = [
    ("vit_tiny_patch16_224", {"depth": 2}, (32, 48)),  # class token
    ("vit_small_patch14_reg4_dinov2", {"depth": 2}, (28, 42)),  # class token and registers
    ("test_vit3", {}, (32, 48)),  # registers alone, attention pooling
    ("deit_tiny_distilled_patch16_224", {"depth": 2}, (32, 48)),  # class and distillation tokens
    ("vit_relpos_small_patch16_224", {"depth": 2}, (32, 48)),  # no prefix, relative positions
    ("eva02_tiny_patch14_224", {"depth": 2}, (28, 42)),  # rotary positions, norm after pooling
    ("beit_base_patch16_224", {"depth": 2, "embed_dim": 96, "num_heads": 4}, (32, 48)),
    ("vit_small_patch16_dinov3", {"depth": 2}, (32, 48)),
    ("deit3_small_patch16_224", {"depth": 2}, (32, 48)),  # class token without a position
    ("vit_tiny_r_s16_p8_224", {"depth": 2}, (64, 96)),  # a ResNet as stem
    ("fadevit_nano", {}, (28, 36)),
]


def small_fadenet(variant: str = "published", **changes) -> FadeNet:
    arguments = {
        "num_classes": 3, "dropout": 0.0, "fade_attn_params": {"num_heads": 4, "dropout": 0.0},
        "backbone": "fadevit_nano", "pretrained": False, "variant": variant, "img_size": 28,
    }  # fmt: skip
    return FadeNet(**{**arguments, **changes})


@pytest.fixture(scope="module")
def fadenet() -> FadeNet:
    """Return the published model with 11 classes and the weights of the reference."""
    model = FadeNet(PUBLISHED["num_classes"], pretrained=False).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = 0.05 * np.random.RandomState(i).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))
            if name.split(".")[-2:] in (["norm", "weight"], ["norm1", "weight"], ["norm2", "weight"]):
                parameter += 1
        model.attn.alpha.fill_(0.5)
    return model


def test_state_dict_matches_published_model(fadenet):
    assert {name: list(value.shape) for name, value in fadenet.state_dict().items()} == PUBLISHED["state_dict"]
    assert sum(parameter.numel() for parameter in fadenet.parameters()) == PUBLISHED["parameters"]


def test_logits_match_published_model(fadenet):
    images = np.random.RandomState(999).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.inference_mode():
        features = fadenet.forward_features(torch.from_numpy(images))
        map_logits = fadenet.classifier(fadenet.attn(features).mean(dim=(2, 3)))
        logits = fadenet.forward_head(features)
    assert relative_error(logits, np.array(PUBLISHED["logits"])) < 1e-5
    assert relative_error(map_logits, np.array(PUBLISHED["logits"])) < 1e-5


def test_fadevit_nano_state_dict_is_stable():
    """Saved weights must remain loadable."""
    for variant, expected in (
        ("published", "81813939b9f400e12c44dd1e0e3437e1"), ("diffusion", "9a7ca65ac0457a7a5dff4ae246a3497d"),
    ):  # fmt: skip
        shapes = {name: list(value.shape) for name, value in small_fadenet(variant).state_dict().items()}
        shapes_json = json.dumps(shapes, sort_keys=True)
        assert hashlib.md5(shapes_json.encode(), usedforsecurity=False).hexdigest() == expected, variant


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("backbone", "options", "size"), VITS)
def test_fadenet_on_every_kind_of_vit(backbone, options, size, variant):
    after_blocks = ("last",) if variant == "published" else (1, "last")
    width = timm.create_model(backbone, **options).embed_dim
    heads = {"num_heads": 4 if width % 4 == 0 else 3}
    model = FadeNet(3, 0.0, heads, backbone, False, variant, after_blocks, img_size=size, **options).eval()
    assert isinstance(model, type(timm.create_model(backbone, **options)))
    images = torch.randn(2, 3, *size)
    features, logits = model.forward_features(images), model(images)
    patch = size[0] // features.shape[2]
    assert features.shape == (2, width, size[0] // patch, size[1] // patch)
    torch.testing.assert_close(logits, model.forward_head(features))
    torch.testing.assert_close(model(images.flip(0)), logits.flip(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)  # noqa: S301  trusted bytes
    model.train()(images).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_dynamic_image_sizes(variant):
    model = FadeNet(
        3, 0.0, {"num_heads": 3}, "vit_tiny_patch16_224", False, variant, depth=2, img_size=64, dynamic_img_size=True
    ).eval()
    for height, width in ((64, 64), (48, 96), (64, 64), (32, 32)):
        images = torch.randn(1, 3, height, width)
        assert model.forward_features(images).shape[2:] == (height // 16, width // 16)
        assert model(images).isfinite().all()


def test_fade_layers_follow_the_listed_blocks():
    model = small_fadenet("diffusion", after_blocks=(1, 3, "last"))
    assert [isinstance(block, FadeBlock) for block in model.blocks] == [True, False, True, True]


def test_prefix_tokens_bypass_fade_layer():
    block, fade = torch.nn.Identity(), torch.nn.Flatten(0, -1)
    fade.forward = lambda x: x + 1
    fade_block = FadeBlock(block, fade, num_prefix_tokens=2)
    fade_block.grid_size = (2, 3)
    tokens = torch.zeros(1, 8, 4)
    assert torch.equal(fade_block(tokens), torch.cat([torch.zeros(1, 2, 4), torch.ones(1, 6, 4)], dim=1))


def test_forward_intermediates():
    model = FadeNet(
        3, 0.0, {"num_heads": 3}, "vit_tiny_patch16_224", False, "diffusion", (1,), depth=2, dynamic_img_size=True
    ).eval()
    for height, width in ((32, 64), (64, 32)):  # same number of patches, different shape
        images = torch.randn(2, 3, height, width)
        _, features = model.forward_intermediates(images, norm=True)
        assert [tuple(feature.shape[2:]) for feature in features] == [(height // 16, width // 16)] * 2
        torch.testing.assert_close(features[-1], model.forward_features(images))
    assert model.prune_intermediate_layers(1) == [1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_classifier(variant):
    model = small_fadenet(variant).double().eval()
    images = torch.randn(2, 3, 28, 28).double()
    before = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model.get_classifier() is model.classifier
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), before)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixing_parameters_are_excluded_from_weight_decay(variant):
    no_decay = small_fadenet(variant).no_weight_decay()
    mixing = {
        "published": {"attn.alpha"},
        "diffusion": {f"blocks.3.fade.{name}" for name in ("time_logit", "exponent_logit", "gate_logit")},
    }
    assert no_decay == {"pos_embed", "cls_token", "reg_token", "dist_token"} | mixing[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_keeps_gradients(variant):
    torch.manual_seed(0)
    model = small_fadenet(variant).train()
    images = torch.randn(4, 3, 28, 28)
    gradients, passes = [], []
    model.blocks[-1].register_forward_pre_hook(lambda *_: passes.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert passes == [False, True, True]  # recomputed in the backward pass
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_close_to_float32(variant):
    torch.manual_seed(0)
    model = small_fadenet(variant).eval()
    images = torch.randn(4, 3, 28, 28)
    with torch.inference_mode():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(images)
    assert (actual - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("backbone", ["swin_tiny_patch4_window7_224", "cait_xxs24_224"])
def test_backbone_without_patch_grid_raises(backbone):
    with pytest.raises(ValueError, match=f"{backbone} is not a ViT, which FadeNet needs"):
        FadeNet(2, backbone=backbone, pretrained=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after_blocks": (5,)}, r"after_blocks is \[5\]; list blocks by number, 1 to 4, or last, each once"),
        ({"after_blocks": (0, 1)}, "1 to 4"),
        ({"after_blocks": ("first",)}, r"\[first\]"),
        ({"after_blocks": (4, "last")}, "each once"),
        ({"after_blocks": ()}, r"\[\]"),
        ({"variant": "published", "after_blocks": (1,)}, "one layer, after the last block"),
        ({"variant": "difusion"}, "variant is 'difusion'"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
    ],
)
def test_invalid_options_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        small_fadenet(**{"variant": "diffusion", **changes})


def exportable(variant: str) -> FadeNet:
    torch.manual_seed(0)
    after_blocks = ("last",) if variant == "published" else (1, "last")
    return small_fadenet(variant, depth=2, after_blocks=after_blocks).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_model_accepts_any_batch_size(variant):
    """Traced in full graph mode without code generation; tests/inference/test_export.py exports both variants."""
    model = exportable(variant)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (3, 8):
            images = torch.randn(count, 3, 28, 28)
            assert relative_error(compiled(images), model(images).numpy()) < 1e-5


def test_create_model_builds_both_variants():
    fade = {"variant": "diffusion", "after_blocks": [2, "last"], "num_heads": 4, "K": 3, "alpha": 0.5, "dropout": 0.1}
    options = {"backbone": "fadevit_nano", "num_classes": 3, "image_size": 28, "in_chans": 1, "pretrained": False}
    diffusion = create_model(**options, dropout=0.1, drop_path=0.1, fade=fade)
    published = create_model(
        **options, dropout=0.1, drop_path=0.1, fade={**fade, "variant": "published", "after_blocks": ["last"]}
    )
    assert [isinstance(block, FadeBlock) for block in diffusion.blocks] == [False, True, False, True]
    assert published.attn.K == 3
