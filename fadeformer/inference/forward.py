"""Images through a network in evaluation mode, and the device and precision of a training."""

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
    """`cpu`, `cuda`, or `auto`: cuda if there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(name: str | int, device: torch.device) -> str:
    """Give what `train.precision` stands for on a device: 32, bf16 or 16.

    `auto` is bf16 on a GPU that computes it natively. On a CPU it is 32: bf16 is slower there in training.

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
    pixels: NDArray[np.uint8],
    batch_size: int,
    device: torch.device,
    normalisation: Normalization,
    on_batch: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Run the model over images in their order: in float32, unless the caller has turned autocast on.

    Args:
        model: on `device`; left in evaluation mode.
        pixels: uint8, (images, height, width, channels).
        batch_size: images at once.
        device: where the model is.
        normalisation: of the images.
        on_batch: called before each batch.

    Returns:
        (images, outputs).
    """
    model.eval()
    parts = []
    starts = range(0, len(pixels), batch_size)
    with torch.inference_mode():
        for start in tqdm(starts, desc="predict", unit="batch", leave=False, disable=None if len(starts) > 1 else True):
            on_batch()
            images = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
            parts.append(model(normalisation(images)).double().cpu().numpy())
    return np.concatenate(parts)
