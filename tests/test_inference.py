"""Images through a network: in order, in evaluation mode, whatever the batch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from fadeformer import inference
from fadeformer.errors import UserError
from fadeformer.models import create_model
from fadeformer.normalisation import IMAGENET

GREY = IMAGENET.of(1)
CPU = torch.device("cpu")


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
    whole = inference.logits_of(model, pixels, 100, CPU, precision, GREY)
    parts = inference.logits_of(model, pixels, 3, CPU, precision, GREY)
    assert whole.shape == (7, 3)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(parts, whole, atol=1e-5 if precision == torch.float32 else 0.05)
    assert not model.training


def test_logits_are_those_of_the_network_for_normalised_images(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    found = inference.logits_of(model, pixels, 2, CPU, torch.float32, GREY)
    with torch.no_grad():
        expected = model.eval()(GREY(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = inference.logits_of(model, pixels, 2, CPU, torch.float32, type(GREY)((0.0,), (0.1,)))
    assert np.abs(other - found).max() > 1e-3


def test_bfloat16_is_computed_in_bfloat16(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    exact, coarse = (inference.logits_of(model, pixels, 3, CPU, kind, GREY) for kind in (torch.float32, torch.bfloat16))
    assert 0 < np.abs(exact - coarse).max() < 0.05


def test_someone_may_look_up_before_each_batch(model):
    pixels, calls = np.zeros((7, 16, 16, 1), dtype=np.uint8), []
    inference.logits_of(model, pixels, 3, CPU, torch.float32, GREY, each=lambda: calls.append(1))
    assert len(calls) == 3

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inference.logits_of(model, pixels, 3, CPU, torch.float32, GREY, each=stop)


def test_a_cuda_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch finds no CUDA device"):
        inference.choose_device("cuda")
    assert inference.choose_device("auto") == inference.choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "native", "expected"),
    [
        (32, True, torch.float32), ("32", True, torch.float32), ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16), ("auto", False, torch.float32),
    ],
)  # fmt: skip
def test_auto_precision_is_bfloat16_only_where_it_is_native(monkeypatch, name, native, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    assert inference.choose_precision(name, CPU) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_on_a_gpu_is_bfloat16_only_where_it_is_not_emulated(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    cuda = torch.device("cuda")
    assert inference.choose_precision("auto", cuda) == (torch.bfloat16 if native else torch.float32)
    assert inference.choose_precision(16, cuda) == torch.float16


@pytest.mark.parametrize("name", [16, "16"])
def test_float16_on_a_cpu_is_refused(name):
    with pytest.raises(UserError, match=r"train\.precision is 16, which needs a GPU; set it to bf16, 32 or auto"):
        inference.choose_precision(name, CPU)


def test_attention_in_bfloat16_on_a_cpu_is_computed_in_float32():
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 9, 8, generator=random).bfloat16().requires_grad_() for _ in range(3)]
    wide = [part.detach().float().requires_grad_() for part in parts]
    with inference.autocast(CPU, torch.bfloat16):
        found = functional.scaled_dot_product_attention(*parts, scale=0.1)
        assert (wide[0] @ wide[1].mT).dtype == torch.bfloat16  # all else is as autocast has it
    expected = functional.scaled_dot_product_attention(*wide, scale=0.1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    found.float().square().sum().backward()
    expected.bfloat16().float().square().sum().backward()
    for part, other in zip(parts, wide, strict=True):
        assert torch.equal(part.grad, other.grad.bfloat16())


@pytest.mark.parametrize(("given", "found"), [(None, "AVX512_CORE_BF16"), ("SSE41", "SSE41")])
def test_amx_is_left_alone_unless_the_environment_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    program = (
        "import os, torch, fadeformer; torch.nn.functional.conv2d(torch.ones(4, 3, 16, 16), torch.ones(8, 3, 3, 3));"
        " print('capped at', os.environ['ONEDNN_MAX_CPU_ISA'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**environment, "ONEDNN_VERBOSE": "1", **({} if given is None else {"ONEDNN_MAX_CPU_ISA": given})},
    ).stdout  # fmt: skip
    assert f"capped at {found}" in told
    assert "AMX" not in told
    assert ("isa:Intel SSE4.1" in told) == (given == "SSE41")  # what stands there reaches oneDNN
