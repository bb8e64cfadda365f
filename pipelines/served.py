"""The model as MLflow serves it: uint8 images in, scores out. MLflow runs this file when it loads the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import set_model

from fadeformer.trained import Trained


class FadeFormer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Weights and architecture from the logged files."""

    def load_context(self, context: Any) -> None:
        """Builds the network on the CPU."""
        described = json.loads(Path(context.artifacts["architecture"]).read_text(encoding="utf-8"))
        self.trained = Trained(described, Path(context.artifacts["weights"]), torch.device("cpu"), precision="32")

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> np.ndarray:
        """Calibrated scores of images.

        Args:
            context: not used.
            model_input: uint8, (images, side, side, channels).
            params: not used.

        Returns:
            (images, classes), each in [0, 1].
        """
        return self.trained.scores(np.asarray(model_input, dtype=np.uint8), 256)


set_model(FadeFormer())
