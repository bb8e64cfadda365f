"""Batched inference in evaluation mode, devices and precisions."""

import numpy as np
import pytest
import torch

from fadeformer.data.normalization import IMAGENET
from fadeformer.errors import UserError
from fadeformer.inference import forward
from fadeformer.models.factory import create_model

GRAY = IMAGENET.for_channels(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        backbone="fadevit_nano", num_classes=3, image_size=16, in_chans=1, pretrained=False, dropout=0.5, drop_path=0.5,
        fade={"num_heads": 4},
    )  # fmt: skip


def test_batch_size_changes_nothing(model):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)
    model.train()
    single_batch = forward.predict_logits(model, pixels, 100, CPU, GRAY)
    small_batches = forward.predict_logits(model, pixels, 3, CPU, GRAY)
    assert single_batch.shape == (7, 3)
    assert single_batch.dtype == np.float64
    np.testing.assert_allclose(small_batches, single_batch, atol=1e-5)
    assert not model.training


def test_logits_match_model_on_normalized_images(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    result = forward.predict_logits(model, pixels, 2, CPU, GRAY)
    with torch.no_grad():
        expected = model.eval()(GRAY(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-5)
    other = forward.predict_logits(model, pixels, 2, CPU, type(GRAY)((0.0,), (0.1,)))
    assert np.abs(other - result).max() > 1e-3


def test_callback_runs_before_each_batch(model):
    pixels, calls = np.zeros((7, 16, 16, 1), dtype=np.uint8), []
    forward.predict_logits(model, pixels, 3, CPU, GRAY, on_batch=lambda: calls.append(1))
    assert len(calls) == 3

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward.predict_logits(model, pixels, 3, CPU, GRAY, on_batch=stop)


def test_missing_cuda_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch finds no CUDA device"):
        forward.choose_device("cuda")
    assert forward.choose_device("auto") == forward.choose_device("cpu") == CPU


@pytest.mark.parametrize(("name", "expected"), [("auto", "32"), (32, "32"), ("bf16", "bf16")])
def test_auto_precision_on_cpu_is_float32(name, expected):
    assert forward.choose_precision(name, CPU) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_gpu_needs_native_bfloat16(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    cuda = torch.device("cuda")
    assert forward.choose_precision("auto", cuda) == ("bf16" if native else "32")
    assert forward.choose_precision(16, cuda) == "16"


def test_float16_on_cpu_is_rejected():
    with pytest.raises(UserError, match=r"train\.precision is 16, which needs a GPU; set it to bf16, 32 or auto"):
        forward.choose_precision(16, CPU)
