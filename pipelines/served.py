"""The model as MLflow serves it. MLflow imports this file, as module `served`, from the package's own folder.

The package's one input is called `image` and is of type object: MLflow lets through what an image may be (a file's
bytes, base64 text, pixels), and the model itself tells what is wrong with one (docs/serving.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from fadeformer.errors import UserError
from fadeformer.scoring import DECISION, POSITIVE, PROBABILITY, Scorer

IMAGE = "image"
# May be given anew to `mlflow.pyfunc.load_model(..., model_config=)`, or as JSON in SERVING_MODEL_CONFIG to a server.
CONFIG = {
    "max_pixels": 25_000_000,  # of one image, so that a small file cannot fill the memory
    "batch_size": 256,  # images that go through the network at once
}


def signature(classes: tuple[str, ...]) -> ModelSignature:
    """What goes in and comes out, one row per image."""
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(object), (-1,), IMAGE)]),
        outputs=Schema(
            [
                *(ColSpec(DataType.double, f"{PROBABILITY}{name}") for name in classes),
                *(ColSpec(DataType.boolean, f"{POSITIVE}{name}", required=False) for name in classes),
                ColSpec(DataType.string, DECISION, required=False),
            ]
        ),
        params=ParamSchema([ParamSpec("operating_point", DataType.string, "youden")]),
    )


class Served:
    """What `mlflow.pyfunc.load_model` hands requests to.

    Attributes:
        scorer: for those who have arrays that fit: `load_model(...).get_raw_model().scores(pixels)`.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def get_raw_model(self) -> Scorer:
        """What MLflow's `get_raw_model` gives."""
        return self.scorer

    def predict(self, data: dict[str, Any], params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A table of one row per image.

        Args:
            data: under `image`, what `Scorer.pixels` takes.
            params: `operating_point`, by name.

        Raises:
            MlflowException: the request is at fault, which a server answers with status 400; `reason` says why.
        """
        try:
            return pd.DataFrame(self.scorer.columns(data[IMAGE], (params or {}).get("operating_point", "youden")))
        except UserError as error:
            raise MlflowException(str(error), BAD_REQUEST, reason=str(error)) from None


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> Served:
    """What MLflow calls to load the model."""
    settings = {**CONFIG, **(model_config or {})}
    wrong = [name for name, value in settings.items() if name not in CONFIG or type(value) is not int or value < 1]
    if wrong:
        raise ValueError(f"model_config: {', '.join(wrong)}: only {' and '.join(CONFIG)}, whole numbers above 0")
    return Served(Scorer(Path(data_path), **settings))
