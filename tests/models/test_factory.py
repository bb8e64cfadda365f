"""Creation of models by name, and loading of initial weights."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fadeformer.models.factory import create_model, load_weights, newly_initialized_modules, set_probe_mode
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn

SMALL = {"num_classes": 3, "image_size": 28, "in_chans": 3, "pretrained": False, "dropout": 0.1, "drop_path": 0.1}


@pytest.fixture
def model() -> torch.nn.Module:
    return create_model(backbone="fadevit_nano", fade={"num_heads": 4}, **SMALL)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "best_model.pth"])
def test_load_weights(model, tmp_path, name):
    other = create_model(backbone="fadevit_nano", fade={"num_heads": 4}, **SMALL)
    (save_file if name.endswith("safetensors") else torch.save)(other.state_dict(), tmp_path / name)
    load_weights(model, tmp_path / name)
    for first, second in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_load_weights_unwraps_nested_state_dict(model, tmp_path, key):
    state = {f"module.{name}": value + 1 for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.attn.alpha, state["module.attn.alpha"])


@pytest.mark.parametrize(("name", "save"), [("w.pth", torch.save), ("w.safetensors", save_file)])
def test_mismatched_weights_are_listed(model, tmp_path, name, save):
    state = model.state_dict()
    state["extra"] = state.pop("attn.alpha")
    state["classifier.bias"] = torch.zeros(7)
    save(state, tmp_path / name)
    with pytest.raises(ValueError, match="does not match the model; ") as error:
        load_weights(model, tmp_path / name)
    for reason in ('Missing key(s) in state_dict: "attn.alpha"', 'Unexpected key(s) in state_dict: "extra"'):
        assert reason in str(error.value)
    assert "size mismatch for classifier.bias" in str(error.value)


def test_unsafe_pickle_is_rejected(model, tmp_path):
    torch.save({"classifier.bias": print}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="rejected, because it contains other objects than tensors"):
        load_weights(model, tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_damaged_weights_raise(model, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: (the file is damaged|rejected)"):
        load_weights(model, tmp_path / name)


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, {1: torch.zeros(3)}])
def test_file_without_state_dict_raises(model, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_weights(model, tmp_path / "w.pth")


def test_model_without_stochastic_depth_needs_zero_drop_path():
    with pytest.raises(ValueError, match=r"drop_path_rate.*model\.drop_path to 0"):
        create_model(backbone="densenet121", fade=None, **SMALL)
    model = create_model(backbone="densenet121", fade=None, **{**SMALL, "drop_path": 0.0}).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet18", "fade": {}}, "is not a ViT, which FadeNet needs"),
        ({"backbone": "vit_bass_patch16_224", "fade": {}}, "timm has no model vit_bass_patch16_224; similar names"),
        ({"backbone": "fadevit_nano", "fade": {"num_heads": 5}}, "does not divide"),
        ({"backbone": "fadevit_nano", "fade": None, "image_size": 30}, "multiples of 4 pixels, not 30x30"),
        ({"backbone": "fadevit_nano", "fade": None, "pretrained": True}, "no pretrained weights"),
    ],
)
def test_invalid_model_options_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{**SMALL, **changes})


FADE = {"num_heads": 4}
DIFFUSION = {"variant": "diffusion", "after_blocks": [1, "last"], "num_heads": 4, "dropout": 0.1}


@pytest.mark.parametrize(
    ("backbone", "fade", "expected"),
    [
        ("fadevit_nano", FADE, {"attn": FadeAttn, "classifier": nn.Linear}),
        (
            "fadevit_nano", DIFFUSION,
            {
                "blocks.0.fade": DiffusionAttn, "blocks.3.fade": DiffusionAttn, "readout": AttentionPool,
                "classifier": nn.Linear,
            },
        ),
        ("deit3_small_patch16_224", FADE, {"attn": FadeAttn, "classifier": nn.Linear}),
        ("deit_tiny_distilled_patch16_224", {"num_heads": 3}, {"attn": FadeAttn, "classifier": nn.Linear}),
        ("fadevit_nano", None, {"head": nn.Linear}),
        ("deit3_small_patch16_224", None, {"head": nn.Linear}),
        ("deit_tiny_distilled_patch16_224", None, {"head": nn.Linear, "head_dist": nn.Linear}),
        ("resnet18", None, {"fc": nn.Linear}),
        ("medvit_small", None, {"proj_head.0": nn.Linear}),
    ],
)  # fmt: skip
def test_newly_initialized_modules(backbone, fade, expected):
    with torch.device("meta"):
        model = create_model(backbone=backbone, fade=fade, **{**SMALL, "image_size": 32})
    names = {id(module): name for name, module in model.named_modules()}
    modules = newly_initialized_modules(model)
    assert {names[id(module)]: type(module) for module in modules} == expected
    assert len(modules) == len(expected)


@pytest.mark.parametrize(
    ("backbone", "fade"),
    [
        ("fadevit_nano", {**FADE, "dropout": 0.0}), ("fadevit_nano", {**DIFFUSION, "dropout": 0.0}),
        ("fadevit_nano", None), ("resnet18", None), ("medvit_small", None), ("convnext_atto", None),
    ],
)  # fmt: skip
def test_probe_mode_drops_out_before_classifier_only(backbone, fade):
    torch.manual_seed(0)
    options = {"num_classes": 4, "image_size": 32, "in_chans": 3, "pretrained": False, "drop_path": 0.5}
    model = create_model(backbone=backbone, fade=fade, dropout=0.5, **options)
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    expected, buffers = model.forward_features(images), {name: value.clone() for name, value in model.named_buffers()}
    set_probe_mode(model)
    assert torch.equal(model.forward_features(images), expected)
    assert not torch.equal(model.forward_head(expected), model.forward_head(expected))
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
