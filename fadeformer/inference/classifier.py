"""The trained classifier: pixels to logits, calibrated scores and decisions.

Evaluation, `fadeformer predict`, the served model, the exported graph and the explanations all use this class, so that
an image has one score and one decision. The network always runs in float32, whatever precision it was trained in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from fadeformer.io.atomic import read_json
from fadeformer.models.factory import create_model, features_and_logits, load_weights
from fadeformer.tasks import TASKS, Task

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

BATCH_SIZE = 256  # images that go through the network at once
OPERATING_POINT_NAMES = ("youden", "sensitivity", "specificity")
DEFAULT_THRESHOLD = 0.5  # where an operating point has none
NO_FINDING = "no finding"
SEPARATOR = "; "  # between findings


class ClassifierOutput(NamedTuple):
    """Network outputs for some images.

    Attributes:
        raw: scores before calibration, (images, classes).
        scores: calibrated scores, (images, classes).
        features: inputs of the network's last layer, (images, channels).
    """

    raw_scores: Floats
    scores: Floats
    features: NDArray[np.float32]


@dataclass(frozen=True)
class OperatingPoint:
    """Rule that turns calibrated scores into decisions.

    Attributes:
        classes: names in the order of the scores.
        multi_label: whether an image may have several findings, or none.
        thresholds: score from which a class or finding is positive, by name. Of two exclusive classes only the last one
            has a threshold, and the first is positive where the last is not.
        summary: the rule in words.
    """

    classes: tuple[str, ...]
    multi_label: bool
    thresholds: Mapping[str, float]
    description: str

    @classmethod
    def from_thresholds(
        cls, task: Task, classes: tuple[str, ...], points: Mapping[str, Any] | None, name: str
    ) -> OperatingPoint:
        """Build the rule of one of a model's operating points.

        Args:
            task: of the model.
            classes: names in the order of the scores.
            points: thresholds by operating point and class, as in `operating_points.json`; None for a model without.
            name: of the operating point.

        Raises:
            UserError: the model has no such operating point, or the thresholds are for other classes.
        """
        judged = classes[1:] if len(classes) == 2 and not task.multi_label else classes
        given: dict[str, float | None] = dict.fromkeys(judged)
        if points is not None:
            if name not in points:
                raise UserError(f"operating_point is not one of this model's: {', '.join(sorted(points))}")
            try:
                given = {of: points[name][of] and float(points[name][of]["threshold"]) for of in judged}
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"the operating points are for other classes ({error}); use those of this model's evaluation"
                ) from error
        if not task.multi_label and len(classes) > 2:
            summary = "decided for the most probable class"
        elif points is None:
            summary = "decided at 0.5, since the model has no operating points"
        else:
            lacking = ", ".join(of for of, threshold in given.items() if threshold is None)
            but = f", but at 0.5 for {lacking}, which val or test could not judge" if lacking else ""
            summary = f"decided at the operating point {name}{but}"
        thresholds = {of: DEFAULT_THRESHOLD if threshold is None else threshold for of, threshold in given.items()}
        return cls(classes, task.multi_label, thresholds, summary)

    def is_positive(self, scores: Floats) -> NDArray[np.bool_]:
        """Return whether scores reach their thresholds, (images, classes)."""
        if len(self.thresholds) < len(self.classes):
            last = scores[:, 1] >= self.thresholds[self.classes[1]]
            return np.stack([~last, last], axis=1)
        return np.asarray(scores >= np.array([self.thresholds[name] for name in self.classes]))

    def decide(self, scores: Floats) -> NDArray[np.bool_]:
        """Return the decisions, (images, classes).

        These are the positive findings, the positive one of two classes, or the most probable one of more classes.
        """
        if self.multi_label or len(self.classes) == 2:
            return self.is_positive(scores)
        return np.asarray(scores.argmax(axis=1)[:, None] == np.arange(len(self.classes)))

    def format_decisions(self, scores: Floats) -> list[str]:
        """Return the decisions as text, one per image."""
        names = np.array(self.classes, dtype=object)
        return [SEPARATOR.join(names[row]) or NO_FINDING for row in self.decide(scores)]


class Classifier:
    """Network, normalization, head, calibration and operating points of one model.

    On CUDA this turns TF32 off for the process: cuDNN would otherwise compute convolutions in it.

    Args:
        described: content of `model.json`.
        weights: `best_model.pth`, or safetensors.
        points: thresholds by operating point and class, as in `operating_points.json`; None for a model without.
        device: None for a GPU if there is one, unless the model was trained with `train.device: cpu`.

    Raises:
        ValueError: the weights are damaged or do not fit.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        weights: Path,
        points: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.task = TASKS[described["task"]].with_head(described["head"])
        self.classes: tuple[str, ...] = tuple(described["classes"])
        self.input_config: dict[str, Any] = described["input"]  # image_size, channels and aspect
        self.calibration = calibration.from_dict(described["calibration"])
        self.normalization = Normalization(**{name: tuple(v) for name, v in described["normalize"].items()})
        self.operating_points = points
        self.device = device or choose_device("cpu" if described["params"]["train"]["device"] == "cpu" else "auto")
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        self.model = create_model(**{**described["model"], "pretrained": False})
        load_weights(self.model, weights)
        self.model.to(self.device).eval()

    @classmethod
    def load(cls, files: ModelFiles, device: torch.device | None = None) -> Classifier:
        """Load a model from its files.

        Raises:
            UserError: the weights are damaged, or the file of operating points is none.
        """
        try:
            points = None if files.operating_points is None else read_json(files.operating_points)["points"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{files.operating_points}: is not a file of operating points; use that of the evaluation"
            ) from error
        try:
            return cls(files.metadata, files.weights, points, device)
        except ValueError as error:
            raise UserError(f"{error}; fetch the model again, or train it again") from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of one batch, uint8 (images, side, side, channels) on the device."""
        return features_and_logits(self.model, self.normalization(images))

    def predict(self, pixels: Pixels, batch_size: int = BATCH_SIZE) -> ClassifierOutput:
        """Return scores and features of images of the network's size, (images, side, side, channels)."""
        features, logits = [], []
        starts = range(0, len(pixels), batch_size)
        with torch.inference_mode():
            for start in tqdm(
                starts, desc="predict", unit="batch", leave=False, disable=None if len(starts) > 1 else True
            ):
                images = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(self.device)
                of_batch, outputs = self.forward(images)
                features.append(of_batch.float().cpu().numpy())
                logits.append(outputs.double().cpu().numpy())
        raw = self.task.probabilities(np.concatenate(logits))
        return ClassifierOutput(raw, self.calibration(raw, self.task), np.concatenate(features))

    def predict_proba(self, pixels: Pixels, batch_size: int = BATCH_SIZE) -> Floats:
        """Return calibrated scores, (images, classes)."""
        return self.predict(pixels, batch_size).scores

    def operating_point(self, name: str) -> OperatingPoint:
        """Return the rule of an operating point; raises UserError as `OperatingPoint.of`."""
        return OperatingPoint.from_thresholds(self.task, self.classes, self.operating_points, name)
