"""The model as MLflow serves it: uint8 images in, scores out. MLflow runs this file when it loads the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import set_model

from fadeformer.inference import logits_of
from fadeformer.models import create_model, load_weights
from fadeformer.normalisation import Normalisation
from fadeformer.tasks import TASKS


class FadeFormer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Weights and architecture from the logged files."""

    def load_context(self, context: Any) -> None:
        """Builds the network on the CPU."""
        described = json.loads(Path(context.artifacts["architecture"]).read_text(encoding="utf-8"))
        self.task = TASKS[described["task"]].with_head(described["head"])
        self.normalisation = Normalisation(**described["normalise"])
        self.model = create_model(**{**described["model"], "pretrained": False})
        load_weights(self.model, Path(context.artifacts["weights"]))

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        """Scores of images.

        Args:
            context: not used.
            model_input: uint8, (images, side, side, channels).
            params: not used.

        Returns:
            (images, classes), each in [0, 1].
        """
        images = np.asarray(model_input, dtype=np.uint8)
        logits = logits_of(self.model, images, 256, torch.device("cpu"), torch.float32, self.normalisation)
        return self.task.probabilities(logits)


set_model(FadeFormer())
