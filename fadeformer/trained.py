"""A trained network with all that turns images into scores: what `models/` holds, wherever it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fadeformer import calibration
from fadeformer.inference import choose_device, logits_of
from fadeformer.models import create_model, load_weights
from fadeformer.normalisation import Normalisation
from fadeformer.tasks import TASKS

Floats = NDArray[np.float64]


class Trained:
    """Network, normalisation, head and calibration.

    Args:
        described: what `model.json` holds.
        weights: `best_model.pth`, or safetensors.
        device: where it runs; None for a GPU, if there is one and training did not keep to the CPU.

    Raises:
        ValueError: the weights are damaged, or do not fit.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        weights: Path,
        device: torch.device | None = None,
    ) -> None:
        device = device or choose_device("cpu" if described["params"]["train"]["device"] == "cpu" else "auto")
        self.task = TASKS[described["task"]].with_head(described["head"])
        self.calibration = calibration.of_description(described["calibration"])
        self.normalisation = Normalisation(**{name: tuple(v) for name, v in described["normalise"].items()})
        self.model = create_model(**{**described["model"], "pretrained": False})
        load_weights(self.model, weights)
        self.model.to(device).eval()
        self.device = device

    def scores(self, pixels: NDArray[np.uint8], batch_size: int) -> Floats:
        """uint8 images (images, side, side, channels) to calibrated scores (images, classes)."""
        return self.calibration(self.raw_scores(pixels, batch_size), self.task)

    def raw_scores(self, pixels: NDArray[np.uint8], batch_size: int) -> Floats:
        """Likewise, before calibration."""
        logits = logits_of(self.model, pixels, batch_size, self.device, self.normalisation)
        return self.task.probabilities(logits)

    @contextmanager
    def listening(self) -> Iterator[Callable[[NDArray[np.uint8]], tuple[Floats, NDArray[np.float32]]]]:
        """Gives a function from one batch of images to calibrated scores and features; threads may call it at once."""
        heard = threading.local()

        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            heard.features = inputs[0].detach().flatten(1).float().cpu().numpy()

        def see(pixels: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.float32]]:
            with torch.inference_mode():
                images = self.normalisation(torch.from_numpy(pixels).to(self.device))
                logits = self.model(images).double().cpu().numpy()
            return self.calibration(self.task.probabilities(logits), self.task), heard.features

        hook = self._classifier().register_forward_pre_hook(keep)
        try:
            yield see
        finally:
            hook.remove()

    def _classifier(self) -> torch.nn.Module:
        head = self.model.get_classifier()  # type: ignore[operator]
        first: torch.nn.Module = head[0] if isinstance(head, tuple) else head  # a tuple of two in distilled networks
        return first

    def raw_scores_and_features(self, pixels: NDArray[np.uint8], batch_size: int) -> tuple[Floats, NDArray[np.float32]]:
        """Scores before calibration, and what the classifier sees of each image, (images, channels)."""
        found: list[NDArray[np.float32]] = []

        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0].flatten(1).float().cpu().numpy())

        hook = self._classifier().register_forward_pre_hook(keep)
        try:
            scores = self.raw_scores(pixels, batch_size)
        finally:
            hook.remove()
        return scores, np.concatenate(found)
