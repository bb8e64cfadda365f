"""Devices and processes of training, set up by Lightning Fabric."""

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
    """Create and launch Fabric: for a single process, or for one of the processes that torchrun started.

    Args:
        device: cpu or cuda.
        precision: 32, or bf16 or 16 for automatic mixed precision.
        devices: processes per node.
        nodes: number of machines.
        find_unused_parameters: passed to DDP; needed if some parameters are frozen part of the time.
    """
    if (device.type, precision) == ("cpu", "bf16"):
        # With AMX, oneDNN's bfloat16 matrix products read out of bounds if the inner size is not a multiple of 32, and
        # occasionally return NaN (oneDNN issue 5717). oneDNN reads this variable once, before its first computation.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    is_distributed = devices * nodes > 1
    fabric = Fabric(
        accelerator=device.type, devices=devices, num_nodes=nodes, precision=PRECISIONS[precision],
        strategy=DDPStrategy(find_unused_parameters=find_unused_parameters) if is_distributed else "auto",
        plugins=[TorchElasticEnvironment() if is_distributed else LightningEnvironment()],
    )  # fmt: skip
    fabric.launch()
    return fabric


def predict_distributed(
    model: nn.Module,
    images: NDArray[np.uint8],
    batch_size: int,
    fabric: Fabric,
    normalization: Normalization,
    on_batch: Callable[[], None],
) -> NDArray[np.float64]:
    """Compute the logits of images, (images, outputs), in order; the images are divided among the processes.

    Args:
        model: model on the device; left in evaluation mode.
        images: uint8, (images, height, width, channels).
        batch_size: images of a batch, over all processes.
        fabric: launched Fabric.
        normalization: channel means and standard deviations.
        on_batch: callback before each batch.
    """
    # with fewer images than processes, each process predicts all of them
    world_size, rank = (fabric.world_size, fabric.global_rank) if len(images) >= fabric.world_size else (1, 0)
    local_batch_size = -(-batch_size // world_size)
    with fabric.autocast():
        local = predict_logits(
            model, images[rank::world_size], local_batch_size, fabric.device, normalization, on_batch
        )
    if world_size == 1:
        return local
    logits = torch.zeros((len(images), local.shape[1]), dtype=torch.float64, device=fabric.device)
    logits[rank::world_size] = torch.from_numpy(local).to(fabric.device)
    # an exact gather: each sum has one nonzero term
    return cast(Tensor, fabric.all_reduce(logits, reduce_op="sum")).cpu().numpy()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the GPU since the last call, or without a GPU of this process."""
    if device.type == "cuda":
        peak: int = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / MIB
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss / MIB if sys.platform == "darwin" else max_rss / 1024  # macOS counts bytes, Linux KiB


@contextmanager
def report_out_of_memory(batch_size: int, accumulate: int) -> Iterator[None]:
    """Convert out-of-memory errors to a message with the settings to change.

    Raises:
        UserError: the device or the machine is out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        reason = str(error) or type(error).__name__  # Python's MemoryError has no message
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in reason:
            raise
        raise UserError(
            f"out of memory with train.batch_size {batch_size} and train.accumulate {accumulate}; set train.accumulate"
            f" to {2 * accumulate}, which computes the step in smaller micro-batches (batch normalization then uses the"
            f" statistics of one micro-batch), or lower train.batch_size ({reason.splitlines()[0][:160]})"
        ) from error
