"""The device and the processes that a network is trained on, by Lightning Fabric, and what is measured on them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Literal, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from numpy.typing import NDArray
from torch import Tensor, nn

from fadeformer.errors import UserError
from fadeformer.inference import autocast, logits_of
from fadeformer.normalisation import Normalisation

MIXED: dict[torch.dtype, Literal["bf16-mixed", "16-mixed"]] = {
    torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed",
}  # fmt: skip
MIB = 2**20


def make_fabric(
    device: torch.device, precision: torch.dtype, *, devices: int = 1, nodes: int = 1, freezes: bool = False
) -> Fabric:
    """Fabric, launched: alone, or as one of the processes that torchrun has started.

    Args:
        device: cpu or cuda.
        precision: float32, or bfloat16 or float16 for automatic mixed precision.
        devices: processes on each node.
        nodes: machines.
        freezes: whether some weights are frozen for some of the time.
    """
    together = devices * nodes > 1
    fabric = Fabric(
        accelerator=device.type, devices=devices, num_nodes=nodes,
        strategy=DDPStrategy(find_unused_parameters=freezes, forward_sync_buffers=False) if together else "auto",
        plugins=[
            TorchElasticEnvironment() if together else LightningEnvironment(),
            _Mixed(MIXED[precision], device.type) if precision in MIXED else Precision(),
        ],
    )  # fmt: skip
    fabric.launch()
    return fabric


class _Mixed(MixedPrecision):
    """Mixed precision in training as it is when predicting."""

    def forward_context(self) -> AbstractContextManager[None]:
        """What a forward pass runs in."""
        return autocast(torch.device(self.device), self._desired_input_dtype)


def predict_together(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    batch_size: int,
    fabric: Fabric,
    precision: torch.dtype,
    normalisation: Normalisation,
    each: Callable[[], None],
) -> NDArray[np.float64]:
    """Logits of images in their order, (images, outputs), each computed once by one of the processes.

    Args:
        model: on the device; left in evaluation mode.
        pixels: uint8, (images, height, width, channels).
        batch_size: images at once, over all processes.
        fabric: launched.
        precision: float32, bfloat16 or float16.
        normalisation: of the images.
        each: called before each batch.
    """
    # fewer images than processes: each of them looks at all
    world, rank = (fabric.world_size, fabric.global_rank) if len(pixels) >= fabric.world_size else (1, 0)
    size = -(-batch_size // world)
    own = logits_of(model, pixels[rank::world], size, fabric.device, precision, normalisation, each)
    if world == 1:
        return own
    every = torch.zeros((len(pixels), own.shape[1]), dtype=torch.float64, device=fabric.device)
    every[rank::world] = torch.from_numpy(own).to(fabric.device)
    return cast(Tensor, fabric.all_reduce(every, reduce_op="sum")).cpu().numpy()  # all but one of each sum are 0


class Measured:
    """What a step measures, summed over its parts and processes, on its way from the device to the host.

    It is sent before the backward pass and read after the step, so that a GPU is never waited for while it has nothing
    left to do.

    Args:
        rows: of the images that this process has of the batch.
    """

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.rows = rows
        self.losses: list[Tensor] = []
        self.right: list[Tensor] = []

    def add(self, losses: Tensor, right: Tensor) -> None:
        """Notes a part's losses and share of right decisions, both (images,)."""
        self.losses.append(losses)
        self.right.append(right)

    def send(self, fabric: Fabric, stop: int) -> None:
        """Begins to send the sums, and whether a process was asked to stop."""
        losses, right = torch.cat(self.losses), torch.cat(self.right)
        sums = torch.stack([losses.sum(), right.sum(), losses.new_tensor(float(stop))])
        if fabric.world_size > 1:
            sums = fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        self.sums = sums.to("cpu", non_blocking=True)
        self.sent = _event() if fabric.device.type == "cuda" else None
        if self.sent is not None:
            self.sent.record()

    def read(self) -> tuple[float, float, bool]:
        """Sum of the losses, right decisions, and whether a process was asked to stop."""
        if self.sent is not None:
            self.sent.synchronize()
        loss, right, stop = self.sums.tolist()
        return loss, right, bool(stop)

    def suspects(self) -> NDArray[np.int64]:
        """Rows of the images whose loss is not finite, or of all where it is those of another process."""
        wrong = ~torch.cat(self.losses).isfinite().cpu().numpy()
        return self.rows[wrong] if wrong.any() else self.rows


class Meter:
    """Seconds that the device was at work: `with meter:` around what is put to it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.host = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.cuda:
            self.events.append((_event(), _event()))
            self.events[-1][0].record()
        else:
            self.began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.host += time.perf_counter() - self.began

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: float = self.host + sum(began.elapsed_time(ended) for began, ended in self.events) / 1000
        self.host, self.events = 0.0, []
        return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def peak_memory(device: torch.device) -> float:
    """Largest memory so far, MiB: of the GPU since the last call, or else of this process."""
    if device.type == "cuda":
        peak: int = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / MIB
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / MIB if sys.platform == "darwin" else largest / 1024  # macOS counts bytes, Linux KiB


@contextmanager
def within_memory(batch_size: int, accumulate: int) -> Iterator[None]:
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
            f" to {2 * accumulate}: the same batch in smaller parts, the same result but for batch normalisation; or"
            f" lower train.batch_size ({told.splitlines()[0][:160]})"
        ) from error
