"""Batched forward passes in evaluation mode, and the choice of device and precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from fadeformer.data.normalization import Normalization
from fadeformer.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device for `train.device`: `cpu`, `cuda`, or `auto` (CUDA if available).

    Raises:
        UserError: `cuda` is requested but not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str | int, device: torch.device) -> str:
    """Resolve `train.precision` for a device: 32, bf16 or 16.

    `auto` is bf16 on a GPU with native support and 32 elsewhere: bf16 training is slower on a CPU.

    Raises:
        UserError: float16 on a CPU, which computes it slowly or not at all.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "32"
    if name == 16 and device.type == "cpu":
        raise UserError("params.yaml: train.precision is 16, which needs a GPU; set it to bf16, 32 or auto")
    return str(name)


def predict_logits(
    model: nn.Module,
    images: NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    normalization: Normalization,
    on_batch: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Compute the logits of images, in order; in float32 unless the caller has enabled autocast.

    Args:
        model: on `device`; left in evaluation mode.
        images: uint8, (images, height, width, channels).
        batch_size: images per forward pass.
        device: of the model.
        normalization: applied to the images.
        on_batch: callback before each batch.

    Returns:
        Logits, (images, outputs).
    """
    model.eval()
    logits = []
    starts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for start in tqdm(starts, desc="predict", unit="batch", leave=False, disable=None if len(starts) > 1 else True):
            on_batch()
            batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            logits.append(model(normalization(batch)).double().cpu().numpy())
    return np.concatenate(logits)
