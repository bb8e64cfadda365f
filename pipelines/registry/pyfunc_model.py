"""The MLflow pyfunc model. MLflow imports this file as module `pyfunc_model` from the package's own `code/` folder.

The only input is `image`, of type object, so that MLflow accepts every supported image encoding (the bytes of a file,
base64 text, pixels); the model itself validates each image and reports errors (docs/how-to/serve.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from fadeformer.errors import UserError
from fadeformer.inference import model_files
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.pixels import prepare_images

IMAGE_INPUT = "image"
PROBABILITY_PREFIX = "probability."  # column of a class: its calibrated probability
POSITIVE_PREFIX = "positive."  # column of a class: whether it reaches the threshold of the operating point
DECISION_COLUMN = "decision"
# Override with `mlflow.pyfunc.load_model(..., model_config=)`, or for a server as JSON in SERVING_MODEL_CONFIG.
DEFAULT_CONFIG = {
    "max_pixels": 25_000_000,  # of one image: limits the memory that a small compressed file can claim
    "batch_size": 256,  # images per forward pass
}


def model_signature(classes: tuple[str, ...]) -> ModelSignature:
    """Return the signature of inputs and outputs; one row per image."""
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(object), (-1,), IMAGE_INPUT)]),
        outputs=Schema(
            [
                *(ColSpec(DataType.double, f"{PROBABILITY_PREFIX}{name}") for name in classes),
                *(ColSpec(DataType.boolean, f"{POSITIVE_PREFIX}{name}") for name in classes),
                ColSpec(DataType.string, DECISION_COLUMN),
            ]
        ),
        params=ParamSchema([ParamSpec("operating_point", DataType.string, "youden")]),
    )


class PyfuncClassifier:
    """The model object behind `mlflow.pyfunc.load_model`.

    Inference runs on the CPU, so that scores do not depend on the serving machine.

    Args:
        classifier: The classifier of the package.
        max_pixels: Largest number of pixels of an image.
        batch_size: Images per forward pass.
    """

    def __init__(self, classifier: Classifier, max_pixels: int, batch_size: int) -> None:
        self.classifier = classifier
        self.max_pixels = max_pixels
        self.batch_size = batch_size

    def get_raw_model(self) -> Classifier:
        """Return the classifier, for arrays of the model's input size: `get_raw_model().predict_proba(images)`."""
        return self.classifier

    def predict(self, data: dict[str, Any], params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a table of one row per image: probabilities, which of them are positive, and the decision.

        Args:
            data: Images under the key `image`, as `fadeformer.inference.pixels.prepare_images` accepts them.
            params: The name of the operating point under the key `operating_point`; by default `youden`.

        Raises:
            MlflowException: The request is invalid. A server answers with status 400; `reason` is the message.
        """
        try:
            point = self.classifier.operating_point((params or {}).get("operating_point", "youden"))
            images = prepare_images(data[IMAGE_INPUT], **self.classifier.input_config, max_pixels=self.max_pixels)
        except UserError as error:
            raise MlflowException(str(error), BAD_REQUEST, reason=str(error)) from None
        scores = self.classifier.predict_proba(images, self.batch_size)
        positive = point.is_positive(scores)
        return pd.DataFrame(
            {
                **{f"{PROBABILITY_PREFIX}{name}": scores[:, column] for column, name in enumerate(point.classes)},
                **{f"{POSITIVE_PREFIX}{name}": positive[:, column] for column, name in enumerate(point.classes)},
                DECISION_COLUMN: point.format_decisions(scores),
            }
        )


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> PyfuncClassifier:
    """Load the model; MLflow calls this function."""
    settings = {**DEFAULT_CONFIG, **(model_config or {})}
    invalid = [
        name for name, value in settings.items() if name not in DEFAULT_CONFIG or type(value) is not int or value < 1
    ]
    if invalid:
        raise ValueError(
            f"model_config: invalid {', '.join(invalid)}; keys are {' and '.join(DEFAULT_CONFIG)}, values integers > 0"
        )
    files = model_files.find_model_files(Path(data_path), "the package")
    return PyfuncClassifier(Classifier.load(files, torch.device("cpu")), **settings)
