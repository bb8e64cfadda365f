"""Earlier champions as opponents of a challenger: their predictions on its test images, and their training images."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data import arrays, preprocess, training_images
from fadeformer.errors import UserError
from fadeformer.evaluation import predictions
from fadeformer.evaluation.predictions import Predictions
from fadeformer.inference import model_files
from fadeformer.io.atomic import read_json
from fadeformer.promotion.comparison import Opponent
from pipelines import paths
from pipelines.registry import package, versions
from pipelines.registry.versions import ModelVersion


def load_opponent(version: ModelVersion, name: str, test: Predictions) -> Opponent:
    """Load an earlier champion as an opponent on the challenger's test images.

    Its stored predictions are used, or those of the model itself if the test images have changed since.

    Args:
        version: The champion's version.
        name: What messages call it, such as `champion`.
        test: The challenger's predictions.

    Raises:
        UserError: The champion's files are missing or cannot be loaded.
    """
    data = package.find_data_folder(package.fetch_package(f"models:/{version.name}/{version.number}"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stored = predictions.read(versions.download_result(version, paths.PREDICTIONS.name, folder)).select_split(
            "test"
        )
        points = read_json(data / model_files.OPERATING_POINTS_FILE)["points"]
    same_classes = stored.task.name == test.task.name and stored.classes == test.classes
    if same_classes and stored.fingerprint() != test.fingerprint():
        stored = _predict(version, name, data, test)
    recorded = data / training_images.FILE
    return Opponent(name, stored, points, training_images.read(recorded) if recorded.is_file() else None)


def _predict(version: ModelVersion, name: str, data: Path, test: Predictions) -> Predictions:
    """Run inference with a champion on the challenger's test images."""
    import torch  # slow to import, and only needed here

    from fadeformer.inference.classifier import Classifier

    label = f"{name} {version.name} version {version.number}"
    print(f"the test images have changed since {label} was evaluated: running inference with it")
    try:
        classifier = Classifier.load(model_files.find_model_files(data, label), torch.device("cpu"))
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{label} cannot predict the new test images: its package cannot be loaded ({type(error).__name__}:"
            f" {error}); give this model its own promote.model_name, or roll back to another champion"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        images, index = _load_test_images(classifier.input_config, Path(temporary))
        scores = classifier.predict_proba(images)
    rows = index.set_index("id").index.get_indexer(pd.Index(test.frame["id"]))
    return predictions.build_predictions(
        test.frame, test.labels, scores[rows], classifier.task, test.classes, subgroups=test.subgroups
    )


def _load_test_images(input_config: dict[str, object], folder: Path) -> tuple[NDArray[np.uint8], pd.DataFrame]:
    """Return the test images in the champion's input format, decoded again if necessary, and their rows."""
    meta, split = arrays.read_metadata(paths.PROCESSED), arrays.load_split(paths.PROCESSED, "test")
    if input_config == meta.input_config:
        return split.images, split.index
    rows = pd.read_parquet(paths.MANIFEST)
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    return preprocess.decode_to_memmap(rows, paths.RAW, folder / "test.npy", **input_config), rows  # type: ignore[arg-type]
