"""Images through a network in evaluation mode, and the device and precision it runs with."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from fadeformer.augment import normalise, to_unit
from fadeformer.errors import UserError


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: cuda if there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`fp32`, `bf16`, or `auto`: bfloat16 where the device computes it natively."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Automatic mixed precision, or nothing for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def logits_of(
    model: nn.Module, pixels: NDArray[np.uint8], batch_size: int, device: torch.device, precision: torch.dtype
) -> NDArray[np.float64]:
    """Runs the model over images in their order.

    Args:
        model: on `device`; left in evaluation mode.
        pixels: uint8, (images, height, width, channels).
        batch_size: images at once.
        device: where the model is.
        precision: float32 or bfloat16.

    Returns:
        (images, classes).
    """
    model.eval()
    parts = []
    starts = range(0, len(pixels), batch_size)
    with torch.inference_mode(), autocast(device, precision):
        for start in tqdm(starts, desc="predict", unit="batch", leave=False, disable=None):
            images = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
            parts.append(model(normalise(to_unit(images))).double().cpu().numpy())
    return np.concatenate(parts)
