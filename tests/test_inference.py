"""Images through a network: in order, in evaluation mode, whatever the batch."""

import numpy as np
import pytest
import torch

from fadeformer import inference
from fadeformer.errors import UserError
from fadeformer.models import create_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(
        backbone="fadevit_nano", num_classes=3, image_size=16, in_chans=1, pretrained=False, dropout=0.5, drop_path=0.5,
        fade={"num_heads": 4},
    )  # fmt: skip


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_batch_size_does_not_matter(model, precision):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)
    model.train()
    cpu = torch.device("cpu")
    whole = inference.logits_of(model, pixels, 100, cpu, precision)
    parts = inference.logits_of(model, pixels, 3, cpu, precision)
    assert whole.shape == (7, 3)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(parts, whole, atol=1e-5 if precision == torch.float32 else 0.05)
    assert not model.training


def test_a_cuda_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch finds no CUDA device"):
        inference.choose_device("cuda")
    assert inference.choose_device("auto") == inference.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "native", "expected"),
    [
        ("fp32", True, torch.float32), ("bf16", False, torch.bfloat16), ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)  # fmt: skip
def test_auto_precision_is_bfloat16_only_where_it_is_native(monkeypatch, name, native, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert inference.choose_precision(name, torch.device("cpu")) == expected
