"""Images through a network: in order, in evaluation mode, whatever the batch."""

import numpy as np
import pytest
import torch

from fadeformer.data.normalization import IMAGENET
from fadeformer.errors import UserError
from fadeformer.inference import forward
from fadeformer.models.factory import create_model

GREY = IMAGENET.for_channels(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        backbone="fadevit_nano", num_classes=3, image_size=16, in_chans=1, pretrained=False, dropout=0.5, drop_path=0.5,
        fade={"num_heads": 4},
    )  # fmt: skip


def test_the_batch_size_does_not_matter(model):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)
    model.train()
    whole = forward.predict_logits(model, pixels, 100, CPU, GREY)
    parts = forward.predict_logits(model, pixels, 3, CPU, GREY)
    assert whole.shape == (7, 3)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert not model.training


def test_logits_are_those_of_the_network_for_normalised_images(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    found = forward.predict_logits(model, pixels, 2, CPU, GREY)
    with torch.no_grad():
        expected = model.eval()(GREY(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = forward.predict_logits(model, pixels, 2, CPU, type(GREY)((0.0,), (0.1,)))
    assert np.abs(other - found).max() > 1e-3


def test_someone_may_look_up_before_each_batch(model):
    pixels, calls = np.zeros((7, 16, 16, 1), dtype=np.uint8), []
    forward.predict_logits(model, pixels, 3, CPU, GREY, on_batch=lambda: calls.append(1))
    assert len(calls) == 3

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward.predict_logits(model, pixels, 3, CPU, GREY, on_batch=stop)


def test_a_cuda_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch finds no CUDA device"):
        forward.choose_device("cuda")
    assert forward.choose_device("auto") == forward.choose_device("cpu") == CPU


@pytest.mark.parametrize(("name", "expected"), [("auto", "32"), (32, "32"), ("bf16", "bf16")])
def test_auto_precision_on_a_cpu_is_float32(name, expected):
    assert forward.choose_precision(name, CPU) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_a_gpu_is_bfloat16_only_where_it_is_not_emulated(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    cuda = torch.device("cuda")
    assert forward.choose_precision("auto", cuda) == ("bf16" if native else "32")
    assert forward.choose_precision(16, cuda) == "16"


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"train\.precision is 16, which needs a GPU; set it to bf16, 32 or auto"):
        forward.choose_precision(16, CPU)
