"""Fabric's precision, a lack of memory told with a remedy, and what is measured of a step."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fadeformer.devices import Measured, Meter, make_fabric, peak_memory, predict_together, within_memory
from fadeformer.errors import UserError
from fadeformer.inference import logits_of
from fadeformer.normalisation import IMAGENET
from tests.test_training import network, some_images

CPU = torch.device("cpu")


class Noting(nn.Linear):
    """Notes in which type it computes."""

    def forward(self, x):
        found = super().forward(x)
        self.noted = found.dtype
        return found


@pytest.mark.parametrize(("precision", "name"), [(torch.float32, "32-true"), (torch.bfloat16, "bf16-mixed")])
def test_fabric_has_the_precision_that_is_asked_for(precision, name):
    fabric = make_fabric(CPU, precision)
    assert fabric._precision.precision == name
    assert (fabric.world_size, fabric.global_rank, fabric.device) == (1, 0, CPU)
    layer = Noting(3, 2)
    model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    logits = model(torch.randn(4, 3))
    assert (layer.noted, logits.dtype, layer.weight.dtype) == (precision, torch.float32, torch.float32)
    fabric.backward(logits.sum())
    optimizer.step()
    assert layer.weight.grad.dtype == torch.float32


def test_a_real_lack_of_memory_is_told_with_a_remedy():
    told = r"with train\.batch_size 64 and train\.accumulate 4; set train\.accumulate to 8: .*lower train\.batch_size"
    with pytest.raises(UserError, match=rf"out of memory {told} \(.*allocate memory") as error, within_memory(64, 4):
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
def test_any_lack_of_memory_is_told(error, shown):
    with pytest.raises(UserError, match=rf"set train\.accumulate to 2: .*{shown}"), within_memory(8, 1):
        raise error


def test_a_lack_of_pythons_own_memory_is_told():
    with pytest.raises(UserError, match=r"set train\.accumulate to 2"), within_memory(8, 1):
        bytearray(2**62)
    with pytest.raises(UserError, match=r"set train\.accumulate to 2"), within_memory(8, 1):
        np.zeros(2**60, dtype=np.uint8)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("no"), UserError("told already"), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as told, within_memory(8, 1):
        raise error
    assert told.value is error


def test_where_there_is_memory_nothing_is_told():
    with within_memory(8, 1):
        found = torch.zeros(3).sum().item()
    assert found == 0.0


@pytest.mark.parametrize("stop", [0, 15])
def test_what_is_measured_is_summed_over_the_parts_of_a_step(stop):
    measured = Measured(np.array([7, 3, 5]))
    measured.add(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]))
    measured.add(torch.tensor([2.0]), torch.tensor([1.0]))
    measured.send(make_fabric(CPU, torch.float32), stop)
    assert measured.read() == (3.5, 2.0, stop > 0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([1, np.nan, 2, np.inf], [3, 9]), ([np.nan] * 4, [7, 3, 5, 9]), ([1, 2, 3, 4], [7, 3, 5, 9])],
)
def test_suspects_are_the_images_whose_loss_is_not_finite(losses, expected):
    """If none is this process's, all are: the loss is another's."""
    measured = Measured(np.array([7, 3, 5, 9]))
    for part in torch.tensor(losses, dtype=torch.float32).split([1, 3]):
        measured.add(part, torch.zeros(len(part)))
    assert measured.suspects().tolist() == expected


def test_the_meter_measures_seconds():
    meter = Meter(CPU)
    with meter:
        time.sleep(0.05)
    assert 0.05 <= meter.take() < 10


def test_the_meter_leaves_out_what_it_is_not_put_around(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(CPU)
    for _ in range(3):
        with meter:
            now += 2.0
        now += 5.0
    with pytest.raises(ZeroDivisionError), meter:
        now += 2.0 + 1 / 0
    assert meter.take() == 6.0
    assert meter.take() == 0.0


def test_the_memory_of_a_process_is_in_mebibytes():
    found = peak_memory(CPU)
    assert found > 50
    status = Path("/proc/self/status")
    if status.exists():  # as Linux tells it in another place
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        assert found == pytest.approx(int(line.split()[1]) / 1024, rel=0.02)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_alone_a_prediction_is_that_of_the_network(precision):
    model, pixels, calls = network(3), some_images(7, 3).pixels, []
    fabric = make_fabric(CPU, precision)
    found = predict_together(model, pixels, 3, fabric, precision, IMAGENET, lambda: calls.append(1))
    np.testing.assert_array_equal(found, logits_of(model, pixels, 3, CPU, precision, IMAGENET))
    assert found.shape == (7, 3)
    assert len(calls) == 3
    assert not model.training
