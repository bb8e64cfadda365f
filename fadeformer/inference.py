"""Images through a network in evaluation mode, and the device and precision it runs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from fadeformer.errors import UserError
from fadeformer.interception import Interception
from fadeformer.normalisation import Normalisation

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: cuda if there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str | int, device: torch.device) -> torch.dtype:
    """What `train.precision` stands for on a device; `auto` is bfloat16 where it computes that natively.

    Raises:
        UserError: float16 on a CPU, which computes it slowly or not at all.
    """
    if name == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    if str(name) == "16" and device.type == "cpu":
        raise UserError("params.yaml: train.precision is 16, which needs a GPU; set it to bf16, 32 or auto")
    return PRECISIONS[str(name)]


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@contextmanager
def autocast(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Automatic mixed precision, or nothing for float32; attention stays in float32 on a CPU."""
    if precision == torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype=precision):
        if device.type == "cpu":
            with _AttentionInFloat32():
                yield
        else:
            yield


class _AttentionInFloat32(Interception):
    """Scaled dot-product attention in float32: in bfloat16 its gradient takes torch far longer on a CPU.

    Forward and backward of the demo's network take 0.5 of the time so (`python benchmarks/training.py attention`).
    """

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the place of torch's attention."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = func(*(part.float() for part in args[:3]), *args[3:], **kwargs)
        return wide.to(torch.get_autocast_dtype("cpu"))


def logits_of(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    normalisation: Normalisation,
    each: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Runs the model over images in their order.

    Args:
        model: on `device`; left in evaluation mode.
        pixels: uint8, (images, height, width, channels).
        batch_size: images at once.
        device: where the model is.
        precision: float32, bfloat16 or float16.
        normalisation: of the images.
        each: called before each batch.

    Returns:
        (images, outputs).
    """
    model.eval()
    parts = []
    starts = range(0, len(pixels), batch_size)
    with torch.inference_mode(), autocast(device, precision):
        for start in tqdm(starts, desc="predict", unit="batch", leave=False, disable=None if len(starts) > 1 else True):
            each()
            images = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
            parts.append(model(normalisation(images)).double().cpu().numpy())
    return np.concatenate(parts)
