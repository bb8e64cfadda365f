"""Trained classifier: logits, calibrated scores and decisions of images.

Evaluation, `fadeformer predict`, the served model, the exported graph and the explanations all use this class, so an
image gets the same score everywhere. Inference is always float32, whatever precision training used and whatever the
calling process has set: autocast, and a reduced precision of float32 products (`torch.set_float32_matmul_precision`),
would change scores in the third decimal place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fadeformer.data.normalization import Normalization
from fadeformer.errors import UserError
from fadeformer.inference import calibration
from fadeformer.inference.forward import choose_device
from fadeformer.inference.model_files import ModelFiles
from fadeformer.inference.operating_point import OperatingPoint
from fadeformer.io.atomic import read_json
from fadeformer.models.factory import create_model, features_and_logits, load_weights
from fadeformer.models.fade_attention import disable_autocast
from fadeformer.tasks import TASKS

ImageArray = NDArray[np.uint8]
Floats = NDArray[np.float64]

BATCH_SIZE = 256  # images per forward pass


class ClassifierOutput(NamedTuple):
    """Network outputs of a set of images.

    Attributes:
        raw_scores: scores before calibration, (images, classes).
        scores: calibrated scores, (images, classes).
        features: penultimate features, the input of the last layer, (images, channels).
    """

    raw_scores: Floats
    scores: Floats
    features: NDArray[np.float32]


class Classifier:
    """Network with its normalization, head, calibration and operating points.

    This disables TF32 and bfloat16 in products of float32 for the whole process.

    Args:
        metadata: content of `model.json`.
        weights: path of `best_model.pth` or a safetensors file.
        points: thresholds by operating point and class, as in `operating_points.json`; None if the model has none.
        device: None selects a GPU if available, unless the model was trained with `train.device: cpu`.

    Raises:
        ValueError: the weights are damaged or do not match the architecture.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        weights: Path,
        points: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.calibration = calibration.from_dict(metadata["calibration"])
        task = TASKS[metadata["task"]].with_head(metadata["head"])
        self.task = task.with_decision_weights(self.calibration.decision_weights)
        self.classes: tuple[str, ...] = tuple(metadata["classes"])
        self.input_config: dict[str, Any] = metadata["input"]  # image_size, channels, aspect, pixel_range
        self.normalization = Normalization(**{name: tuple(values) for name, values in metadata["normalize"].items()})
        self.operating_points = points
        self.device = device or choose_device("cpu" if metadata["params"]["train"]["device"] == "cpu" else "auto")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # of convolutions, which use it by default
        self.model = create_model(**{**metadata["model"], "pretrained": False})
        load_weights(self.model, weights)
        self.model.to(self.device).eval()

    @classmethod
    def load(cls, files: ModelFiles, device: torch.device | None = None) -> Classifier:
        """Load a model from its files.

        Raises:
            UserError: the weights are damaged, or the operating points file is not valid.
        """
        try:
            points = None if files.operating_points is None else read_json(files.operating_points)["points"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{files.operating_points}: not a valid operating points file; use reports/operating_points.json"
            ) from error
        try:
            return cls(files.metadata, files.weights, points, device)
        except ValueError as error:
            raise UserError(f"{error}; fetch the model again, or train it again") from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of a batch, uint8 (images, side, side, channels) on the device."""
        with disable_autocast(self.device):
            return features_and_logits(self.model, self.normalization(images))

    def predict(self, images: ImageArray, batch_size: int = BATCH_SIZE) -> ClassifierOutput:
        """Return scores and features of uint8 images of the input size, (images, side, side, channels)."""
        features, logits = [], []
        starts = range(0, len(images), batch_size)
        with torch.inference_mode():
            for start in tqdm(
                starts, desc="predict", unit="batch", leave=False, disable=None if len(starts) > 1 else True
            ):
                batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(self.device)
                batch_features, batch_logits = self.forward(batch)
                features.append(batch_features.float().cpu().numpy())
                logits.append(batch_logits.double().cpu().numpy())
        raw_scores = self.task.probabilities(np.concatenate(logits))
        return ClassifierOutput(raw_scores, self.calibration(raw_scores, self.task), np.concatenate(features))

    def predict_proba(self, images: ImageArray, batch_size: int = BATCH_SIZE) -> Floats:
        """Return calibrated scores, (images, classes)."""
        return self.predict(images, batch_size).scores

    def operating_point(self, name: str) -> OperatingPoint:
        """Return the decision rule of an operating point; see `OperatingPoint.from_thresholds` for errors."""
        return OperatingPoint.from_thresholds(self.task, self.classes, self.operating_points, name)
