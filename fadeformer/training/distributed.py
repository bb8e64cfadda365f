"""The device and the processes that a network is trained on, by Lightning Fabric."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from numpy.typing import NDArray
from torch import Tensor, nn

from fadeformer.data.normalization import Normalization
from fadeformer.errors import UserError
from fadeformer.inference.forward import predict_logits

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed",
}  # fmt: skip
MIB = 2**20


def create_fabric(
    device: torch.device,
    precision: str = "32",
    *,
    devices: int = 1,
    nodes: int = 1,
    find_unused_parameters: bool = False,
) -> Fabric:
    """Fabric, launched: alone, or as one of the processes that torchrun has started.

    Args:
        device: cpu or cuda.
        precision: 32, or bf16 or 16 for automatic mixed precision.
        devices: processes on each node.
        nodes: machines.
        find_unused_parameters: whether some weights are frozen for some of the time.
    """
    if (device.type, precision) == ("cpu", "bf16"):
        # With AMX, oneDNN's bfloat16 products read past a matrix whose inner size is no multiple of 32, and now and
        # then return NaN (oneDNN issue 5717). oneDNN reads this variable when it first computes.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    together = devices * nodes > 1
    fabric = Fabric(
        accelerator=device.type, devices=devices, num_nodes=nodes, precision=PRECISIONS[precision],
        strategy=DDPStrategy(find_unused_parameters=find_unused_parameters) if together else "auto",
        plugins=[TorchElasticEnvironment() if together else LightningEnvironment()],
    )  # fmt: skip
    fabric.launch()
    return fabric


def predict_distributed(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    batch_size: int,
    fabric: Fabric,
    normalisation: Normalization,
    on_batch: Callable[[], None],
) -> NDArray[np.float64]:
    """Logits of images in their order, (images, outputs), each computed once by one of the processes.

    Args:
        model: on the device; left in evaluation mode.
        pixels: uint8, (images, height, width, channels).
        batch_size: images at once, over all processes.
        fabric: launched.
        normalisation: of the images.
        on_batch: called before each batch.
    """
    # fewer images than processes: each of them looks at all
    world, rank = (fabric.world_size, fabric.global_rank) if len(pixels) >= fabric.world_size else (1, 0)
    size = -(-batch_size // world)
    with fabric.autocast():
        own = predict_logits(model, pixels[rank::world], size, fabric.device, normalisation, on_batch)
    if world == 1:
        return own
    every = torch.zeros((len(pixels), own.shape[1]), dtype=torch.float64, device=fabric.device)
    every[rank::world] = torch.from_numpy(own).to(fabric.device)
    return cast(Tensor, fabric.all_reduce(every, reduce_op="sum")).cpu().numpy()  # all but one of each sum are 0


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, MiB: of the GPU since the last call, or else of this process."""
    if device.type == "cuda":
        peak: int = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / MIB
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / MIB if sys.platform == "darwin" else largest / 1024  # macOS counts bytes, Linux KiB


@contextmanager
def report_out_of_memory(batch_size: int, accumulate: int) -> Iterator[None]:
    """Turns a lack of memory into a message with a remedy.

    Raises:
        UserError: the device, or the machine, has not enough.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        told = str(error) or type(error).__name__  # Python's own MemoryError says nothing
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in told:
            raise
        raise UserError(
            f"out of memory with train.batch_size {batch_size} and train.accumulate {accumulate}; set train.accumulate"
            f" to {2 * accumulate}, which computes the step in smaller parts (batch normalization then sees one part at"
            f" a time), or lower train.batch_size ({told.splitlines()[0][:160]})"
        ) from error
