"""What a network costs: parameters, floating-point operations, memory and speed of its forward pass.

FLOPs are torch's own count (`torch.utils.flop_counter`), of matrix products and convolutions alone. A multiply-add is
two of them, so that MACs are half of the FLOPs. Attention is counted as its two products, softmax(Q K^T) and that times
V: a fused kernel, of which torch does not always know the cost, is taken apart while it counts. On the meta device
nothing is computed and nothing takes memory, whatever the batch.

Memory is what the pass holds at most beyond weights and input: on a CPU how far the resident memory of a fresh process
grows, on CUDA what torch's allocator hands out. Speed is that of float32 without autocast.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fadeformer.errors import UserError
from fadeformer.models.factory import create_model

PROC_STATUS, PROC_CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
META_DEVICE = torch.device("meta")
SEED = 0  # of the weights and the images whose forward pass is timed


@dataclass(frozen=True)
class ModelCost:
    """What one network costs.

    Attributes:
        parameters: that are learned.
        flops: of a forward pass of `batch` images; MACs are half of them.
        batch: images whose operations and memory are told.
        memory: bytes beyond weights and input, at most, in the forward pass of `batch` images.
        speed: images per second, forward, `timed_batch` at once.
        timed_batch: images.
    """

    num_parameters: int
    flops: int
    batch_size: int
    peak_memory_bytes: int
    images_per_second: float
    timed_batch_size: int


def count_parameters(model: nn.Module) -> int:
    """How many numbers a network learns; running statistics are none of them."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of a forward pass, in evaluation mode.

    Args:
        model: on the device of the images, which may be `meta`.
        images: (B, C, H, W).
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images)
    finally:
        model.train(training)
    return int(counter.get_total_flops())


def create_meta_model(architecture: Mapping[str, Any]) -> nn.Module:
    """A network without memory for its weights, by the arguments of `create_model`."""
    with META_DEVICE:
        return create_model(**{**architecture, "pretrained": False})


def random_images(architecture: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    """Images that such a network takes, (batch, C, H, W) of noise."""
    side = architecture["image_size"]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(SEED)
    return torch.randn(batch, architecture["in_chans"], side, side, device=device, generator=generator)


def measure_peak_memory(architecture: Mapping[str, Any], batch: int, device: torch.device) -> int:
    """Bytes that a forward pass holds at most beyond weights and input, in a process of its own.

    Args:
        architecture: arguments of `create_model`.
        batch: images.
        device: cpu or cuda.

    Raises:
        UserError: on a CPU, where the system does not tell the peak of a process (only Linux does).
    """
    if device.type == "cpu" and not PROC_CLEAR_REFS.exists():
        raise UserError("the peak memory of a process is read from /proc, which only Linux has; measure it there")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure_peak_memory_in_process, dict(architecture), batch, device).result()


def _measure_peak_memory_in_process(architecture: dict[str, Any], batch: int, device: torch.device) -> int:
    model = create_model(**{**architecture, "pretrained": False}).to(device).eval()
    images = random_images(architecture, batch, device)
    with torch.inference_mode():
        model(images[:1])  # what the libraries take at their first use
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(images)
            return torch.cuda.max_memory_allocated(device) - before
        PROC_CLEAR_REFS.write_text("5")  # the peak counts from here on (Linux, man 5 proc)
        before = _resident_bytes("VmRSS")
        model(images)
        return _resident_bytes("VmHWM") - before


def _resident_bytes(line: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    found = re.search(rf"{line}:\s+(\d+) kB", PROC_STATUS.read_text())
    if found is None:
        raise UserError(f"{PROC_STATUS} has no line {line}; the peak memory of a process cannot be read on this system")
    return 1024 * int(found[1])


def measure_throughput(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Speed of the forward pass, the median of rounds in which every network has its turn, after one to warm up.

    Args:
        models: by name, on the device of the images.
        images: (B, C, H, W) that all of them take.
        rounds: 1 or more.
    """
    took: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, model in models.items():
                _synchronize(images.device)
                began = time.perf_counter()
                model(images)
                _synchronize(images.device)
                if number:
                    took[name].append(time.perf_counter() - began)
    return {name: len(images) / median(seconds) for name, seconds in took.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # which computes while Python goes on
        torch.cuda.synchronize(device)


def measure_costs(
    architectures: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int,
    timed_batch_size: int,
    rounds: int,
    device: torch.device,
) -> dict[str, ModelCost]:
    """Costs of some networks that take the same images.

    Args:
        architectures: arguments of `create_model`, by name.
        batch_size: images of which operations and memory are told.
        timed_batch_size: images of which the speed is told.
        rounds: of the clock.
        device: cpu or cuda.

    Raises:
        ValueError: a network cannot be built as asked.
        UserError: peak memory cannot be measured here.
    """
    torch.manual_seed(SEED)
    meta = {name: create_meta_model(architecture) for name, architecture in architectures.items()}
    counted = {
        name: count_flops(meta[name], random_images(architectures[name], batch_size, META_DEVICE)) for name in meta
    }
    memory = {
        name: measure_peak_memory(architecture, batch_size, device) for name, architecture in architectures.items()
    }
    models = {
        name: create_model(**{**architecture, "pretrained": False}).to(device)
        for name, architecture in architectures.items()
    }
    first = next(iter(architectures.values()))
    speeds = measure_throughput(models, random_images(first, timed_batch_size, device), rounds)
    return {
        name: ModelCost(
            count_parameters(meta[name]), counted[name], batch_size, memory[name], speeds[name], timed_batch_size
        )
        for name in architectures
    }
