"""Computational cost of a model: parameters, FLOPs, peak memory and throughput of the forward pass.

FLOPs are counted by torch (`torch.utils.flop_counter`) for matrix products and convolutions only. A multiply-add counts
as two, so MACs are half of the FLOPs. Attention is counted as its two products, softmax(Q K^T) and the product with V:
fused kernels, which torch cannot always count, are disabled while counting. Models are counted on the meta device, so
it takes no memory or computation for any batch size.

Peak memory excludes weights and input: on a CPU it is the growth of the resident memory of a new process, on CUDA the
peak of torch's allocator. Throughput is measured in float32 without autocast.
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
SEED = 0  # of the random weights and images


@dataclass(frozen=True)
class ModelCost:
    """Computational cost of a model.

    Attributes:
        num_parameters: number of parameters.
        flops: FLOPs of a forward pass of `batch_size` images; MACs are half of them.
        batch_size: images of `flops` and `peak_memory_bytes`.
        peak_memory_bytes: peak memory of a forward pass of `batch_size` images, without weights and input.
        images_per_second: throughput of the forward pass in batches of `timed_batch_size` images.
        timed_batch_size: images of a batch for `images_per_second`.
    """

    num_parameters: int
    flops: int
    batch_size: int
    peak_memory_bytes: int
    images_per_second: float
    timed_batch_size: int


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, without buffers such as running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, images: Tensor) -> int:
    """Count the FLOPs of a forward pass in evaluation mode.

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
    """Create a model on the meta device, where weights take no memory, from the arguments of `create_model`."""
    with META_DEVICE:
        return create_model(**{**architecture, "pretrained": False})


def random_images(architecture: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    """Return random images of the model's input size, (batch, C, H, W)."""
    side = architecture["image_size"]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(SEED)
    return torch.randn(batch, architecture["in_chans"], side, side, device=device, generator=generator)


def measure_peak_memory(architecture: Mapping[str, Any], batch: int, device: torch.device) -> int:
    """Measure the peak memory of a forward pass in a new process; bytes, without weights and input.

    Args:
        architecture: arguments of `create_model`.
        batch: number of images.
        device: cpu or cuda.

    Raises:
        UserError: device is cpu and the system is not Linux.
    """
    if device.type == "cpu" and not PROC_CLEAR_REFS.exists():
        raise UserError(f"peak memory on a CPU can be measured on Linux only: {PROC_CLEAR_REFS} does not exist")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure_peak_memory_in_process, dict(architecture), batch, device).result()


def _measure_peak_memory_in_process(architecture: dict[str, Any], batch: int, device: torch.device) -> int:
    model = create_model(**{**architecture, "pretrained": False}).to(device).eval()
    images = random_images(architecture, batch, device)
    with torch.inference_mode():
        model(images[:1])  # warm-up: libraries allocate memory on first use
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(images)
            return torch.cuda.max_memory_allocated(device) - before
        PROC_CLEAR_REFS.write_text("5")  # resets VmHWM (man 5 proc)
        before = _resident_bytes("VmRSS")
        model(images)
        return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    """Return the resident memory of this process in bytes: VmRSS is the current value, VmHWM the peak."""
    match = re.search(rf"{field}:\s+(\d+) kB", PROC_STATUS.read_text())
    if match is None:
        raise UserError(f"{PROC_STATUS} has no field {field}; peak memory cannot be measured on this system")
    return 1024 * int(match[1])


def measure_throughput(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Measure the throughput of the forward pass, images per second: median of interleaved rounds, after a warm-up.

    Args:
        models: by name, on the device of the images.
        images: input of all models, (B, C, H, W).
        rounds: number of timed rounds, 1 or more.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
    with torch.inference_mode():
        for round_number in range(rounds + 1):
            for name, model in models.items():
                _synchronize(images.device)
                start = time.perf_counter()
                model(images)
                _synchronize(images.device)
                if round_number:  # round 0 is the warm-up
                    seconds[name].append(time.perf_counter() - start)
    return {name: len(images) / median(times) for name, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # CUDA kernels run asynchronously
        torch.cuda.synchronize(device)


def measure_costs(
    architectures: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int,
    timed_batch_size: int,
    rounds: int,
    device: torch.device,
) -> dict[str, ModelCost]:
    """Measure the costs of models with the same input size.

    Args:
        architectures: arguments of `create_model`, by name.
        batch_size: images of a batch for FLOPs and memory.
        timed_batch_size: images of a batch for throughput.
        rounds: number of timed rounds.
        device: cpu or cuda.

    Raises:
        ValueError: a model cannot be created with these arguments.
        UserError: peak memory cannot be measured on this system.
    """
    torch.manual_seed(SEED)
    meta_models = {name: create_meta_model(architecture) for name, architecture in architectures.items()}
    flops = {
        name: count_flops(model, random_images(architectures[name], batch_size, META_DEVICE))
        for name, model in meta_models.items()
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
            count_parameters(meta_models[name]), flops[name], batch_size, memory[name], speeds[name], timed_batch_size
        )
        for name in architectures
    }
