"""FadeNet against the published model, and what else the factory builds."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fadeformer.models import FadeNet, create_model, load_weights
from tests.test_attention import REFERENCE, relative

PUBLISHED = json.loads((REFERENCE / "fadenet_vit_base.json").read_text())
SMALL = {"num_classes": 3, "image_size": 28, "in_chans": 3, "pretrained": False, "dropout": 0.1, "drop_path": 0.1}


@pytest.fixture(scope="module")
def fadenet() -> FadeNet:
    """The published model with 11 classes and the reference's weights."""
    model = FadeNet(PUBLISHED["num_classes"], pretrained=False).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            values = 0.05 * np.random.RandomState(i).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))
            if name.split(".")[-2:] in (["norm", "weight"], ["norm1", "weight"], ["norm2", "weight"]):
                parameter += 1
        model.attn.alpha.fill_(0.5)
    return model


def test_names_shapes_and_number_of_weights_are_the_published_ones(fadenet):
    assert {name: list(value.shape) for name, value in fadenet.state_dict().items()} == PUBLISHED["state_dict"]
    assert sum(parameter.numel() for parameter in fadenet.parameters()) == PUBLISHED["parameters"]


def test_logits_are_the_published_ones(fadenet):
    images = np.random.RandomState(999).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.inference_mode():
        logits = fadenet(torch.from_numpy(images))
    assert relative(logits, np.array(PUBLISHED["logits"])) < 1e-5


def test_a_published_file_of_weights_loads(fadenet, tmp_path):
    torch.save(fadenet.state_dict(), tmp_path / "best_model.pth")
    other = FadeNet(PUBLISHED["num_classes"], pretrained=False)
    load_weights(other, tmp_path / "best_model.pth")
    for one, two in zip(fadenet.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_that_do_not_fit_are_listed(tmp_path):
    model = create_model(backbone="fadevit_nano", fade={"num_heads": 4}, **SMALL)
    state = model.state_dict()
    state["extra"] = state.pop("attn.alpha")
    state["classifier.bias"] = torch.zeros(7)
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        save(state, tmp_path / name)
        with pytest.raises(
            ValueError, match=r"missing: attn\.alpha; left over: extra; of another shape: classifier\.bias"
        ):
            load_weights(model, tmp_path / name)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"classifier.bias": print}, tmp_path / "w.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load_weights(create_model(backbone="fadevit_nano", fade=None, **SMALL), tmp_path / "w.pth")


def test_a_file_that_holds_no_named_tensors_is_told(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_weights(create_model(backbone="fadevit_nano", fade=None, **SMALL), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("backbone", "fade"),
    [
        ("fadevit_nano", {"num_heads": 4}), ("fadevit_nano", None), ("resnet18", None),
        ("vit_tiny_patch16_224", {"num_heads": 3}), ("vit_tiny_patch16_224", None),
    ],
)  # fmt: skip
def test_every_kind_of_network_gives_logits_and_learns(backbone, fade):
    model = create_model(backbone=backbone, fade=fade, **{**SMALL, "image_size": 32})
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_a_network_without_stochastic_depth_needs_drop_path_0():
    with pytest.raises(ValueError, match=r"drop_path_rate.*model\.drop_path to 0"):
        create_model(backbone="densenet121", fade=None, **SMALL)
    model = create_model(backbone="densenet121", fade=None, **{**SMALL, "drop_path": 0.0}).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_a_misspelt_option_is_not_blamed_on_the_backbone():
    with pytest.raises(TypeError, match="img_sz"):
        FadeNet(2, backbone="vit_tiny_patch16_224", pretrained=False, img_sz=32)


def test_fadevit_nano_keeps_its_names_and_shapes():
    """Weights that were saved must load: a change here makes them unreadable."""
    state = create_model(backbone="fadevit_nano", fade={"num_heads": 4}, **SMALL).state_dict()
    told = json.dumps({name: list(value.shape) for name, value in state.items()}, sort_keys=True)
    assert hashlib.md5(told.encode(), usedforsecurity=False).hexdigest() == "81813939b9f400e12c44dd1e0e3437e1"


def test_fadevit_nano_is_small_and_sees_rectangles():
    model = FadeNet(2, 0.1, {"num_heads": 4}, "fadevit_nano", pretrained=False, img_size=(28, 36), in_chans=1)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.forward_features(torch.randn(1, 1, 28, 36)).shape == (1, 128, 7, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet18", "fade": {}}, "not a timm VisionTransformer"),
        ({"backbone": "vit_bass_patch16_224", "fade": {}}, "timm has no model vit_bass_patch16_224; near it"),
        ({"backbone": "fadevit_nano", "fade": {"num_heads": 5}}, "does not divide"),
        ({"backbone": "fadevit_nano", "fade": None, "image_size": 30}, "multiples of 4 pixels, not 30x30"),
        ({"backbone": "fadevit_nano", "fade": None, "pretrained": True}, "no pretrained weights"),
    ],
)
def test_what_cannot_be_built_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{**SMALL, **changes})
