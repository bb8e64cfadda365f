"""The model as MLflow serves it. MLflow imports this file, as module `served`, from the package's own folder.

The package's one input is called `image` and is of type object: MLflow lets through what an image may be (a file's
bytes, base64 text, pixels), and the model itself tells what is wrong with one (docs/how-to/serve.md).
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
PROBABILITY_PREFIX = "probability."  # column of a class's calibrated score
POSITIVE_PREFIX = "positive."  # column of whether it reaches the operating point
DECISION_COLUMN = "decision"
# May be given anew to `mlflow.pyfunc.load_model(..., model_config=)`, or as JSON in SERVING_MODEL_CONFIG to a server.
DEFAULT_CONFIG = {
    "max_pixels": 25_000_000,  # of one image, so that a small file cannot fill the memory
    "batch_size": 256,  # images that go through the network at once
}


def model_signature(classes: tuple[str, ...]) -> ModelSignature:
    """What goes in and comes out, one row per image."""
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
    """What `mlflow.pyfunc.load_model` hands requests to.

    It computes on the CPU, so that its scores do not depend on the machine that serves them.

    Args:
        classifier: of the package.
        max_pixels: of one image.
        batch_size: images that go through the network at once.
    """

    def __init__(self, classifier: Classifier, max_pixels: int, batch_size: int) -> None:
        self.classifier = classifier
        self.max_pixels = max_pixels
        self.batch_size = batch_size

    def get_raw_model(self) -> Classifier:
        """Return the classifier, for arrays of the network's size: `get_raw_model().scores(pixels)`."""
        return self.classifier

    def predict(self, data: dict[str, Any], params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a table of one row per image: probabilities, which of them are positive, and the decision.

        Args:
            data: under `image`, what `fadeformer.inference.pixels.prepare_images` takes.
            params: `operating_point`, by name.

        Raises:
            MlflowException: the request is at fault, which a server answers with status 400; `reason` says why.
        """
        try:
            point = self.classifier.operating_point((params or {}).get("operating_point", "youden"))
            pixels = prepare_images(data[IMAGE_INPUT], **self.classifier.input_config, max_pixels=self.max_pixels)
        except UserError as error:
            raise MlflowException(str(error), BAD_REQUEST, reason=str(error)) from None
        scores = self.classifier.predict_proba(pixels, self.batch_size)
        positive = point.is_positive(scores)
        return pd.DataFrame(
            {
                **{f"{PROBABILITY_PREFIX}{name}": scores[:, place] for place, name in enumerate(point.classes)},
                **{f"{POSITIVE_PREFIX}{name}": positive[:, place] for place, name in enumerate(point.classes)},
                DECISION_COLUMN: point.format_decisions(scores),
            }
        )


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> PyfuncClassifier:
    """What MLflow calls to load the model."""
    settings = {**DEFAULT_CONFIG, **(model_config or {})}
    wrong = [
        name for name, value in settings.items() if name not in DEFAULT_CONFIG or type(value) is not int or value < 1
    ]
    if wrong:
        raise ValueError(
            f"model_config: {', '.join(wrong)}: only {' and '.join(DEFAULT_CONFIG)}, whole numbers above 0"
        )
    files = model_files.find_model_files(Path(data_path), "the package")
    return PyfuncClassifier(Classifier.load(files, torch.device("cpu")), **settings)
