"""Fabric precision, out-of-memory messages, and predictions of several processes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fadeformer.data.normalization import IMAGENET
from fadeformer.errors import UserError
from fadeformer.inference.forward import predict_logits
from fadeformer.training.distributed import create_fabric, peak_memory_mib, predict_distributed, report_out_of_memory
from tests.training.test_loop import create_network, random_split

CPU = torch.device("cpu")


class DtypeRecorder(nn.Linear):
    """Records the dtype of its output."""

    def forward(self, x):
        actual = super().forward(x)
        self.output_dtype = actual.dtype
        return actual


@pytest.mark.parametrize(
    ("precision", "name", "dtype"), [("32", "32-true", torch.float32), ("bf16", "bf16-mixed", torch.bfloat16)]
)
def test_fabric_uses_requested_precision(precision, name, dtype):
    fabric = create_fabric(CPU, precision)
    assert fabric._precision.precision == name
    assert (fabric.world_size, fabric.global_rank, fabric.device) == (1, 0, CPU)
    layer = DtypeRecorder(3, 2)
    model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    logits = model(torch.randn(4, 3))
    assert (layer.output_dtype, logits.dtype, layer.weight.dtype) == (dtype, torch.float32, torch.float32)
    fabric.backward(logits.sum())
    optimizer.step()
    assert layer.weight.grad.dtype == torch.float32


def test_real_out_of_memory_error_suggests_settings():
    error_info = (
        r"with train\.batch_size 64 and train\.accumulate 4; set train\.accumulate to 8, .*lower train\.batch_size"
    )
    with (
        pytest.raises(UserError, match=rf"out of memory {error_info} \(.*allocate memory") as error,
        report_out_of_memory(64, 4),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (MemoryError(), r"\(MemoryError\)"), (MemoryError("Unable to allocate 8 EiB"), "Unable to allocate 8 EiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "Tried to allocate 2 GiB"),
    ],
)  # fmt: skip
def test_out_of_memory_errors_are_reported(error, shown):
    with pytest.raises(UserError, match=rf"set train\.accumulate to 2, .*{shown}"), report_out_of_memory(8, 1):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("no"), UserError("user error"), KeyboardInterrupt()]
)
def test_other_errors_are_not_changed(error):
    with pytest.raises(type(error)) as error_info, report_out_of_memory(8, 1):
        raise error
    assert error_info.value is error


def test_peak_memory_is_in_mebibytes():
    actual = peak_memory_mib(CPU)
    assert actual > 50
    status = Path("/proc/self/status")
    if status.exists():  # Linux reports it here too
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert actual == pytest.approx(int(line.split()[1]) / 1024, rel=0.02)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_single_process_prediction_matches_model(precision):
    model, pixels, calls = create_network(3), random_split(7, 3).images, []
    fabric = create_fabric(CPU, precision)
    actual = predict_distributed(model, pixels, 3, fabric, IMAGENET, lambda: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = predict_logits(model, pixels, 3, CPU, IMAGENET)
    np.testing.assert_array_equal(actual, expected)
    assert actual.shape == (7, 3)
    assert len(calls) == 3
    assert not model.training
    exact = predict_logits(model, pixels, 3, CPU, IMAGENET)
    assert (np.abs(exact - actual).max() > 0) == (precision == "bf16")


@pytest.mark.parametrize(
    ("precision", "variables", "value"),
    [("bf16", {}, "AVX512_CORE_BF16"), ("bf16", {"ONEDNN_MAX_CPU_ISA": "SSE41"}, "SSE41"), ("32", {}, None)],
)
def test_bfloat16_on_cpu_avoids_amx(monkeypatch, precision, variables, value):
    environment = {"PATH": os.environ["PATH"], **variables}
    monkeypatch.setattr(os, "environ", environment)
    create_fabric(CPU, precision)
    assert environment.get("ONEDNN_MAX_CPU_ISA") == value
