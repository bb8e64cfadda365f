"""Champion predictions on the challenger's test set."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data import arrays, preprocess
from fadeformer.errors import UserError
from fadeformer.evaluation import predictions
from fadeformer.evaluation.predictions import Predictions
from fadeformer.inference import model_files
from pipelines import paths
from pipelines.registry import package, versions
from pipelines.registry.versions import ModelVersion


def champion_predictions(champion: ModelVersion, test: Predictions) -> Predictions:
    """Return the champion's stored predictions, or run inference with it if the test images have changed since.

    Args:
        champion: The champion's version.
        test: The challenger's predictions.

    Raises:
        UserError: The champion's files are missing or cannot be loaded.
    """
    stored = versions.load_test_predictions(champion)
    same_classes = stored.task.name == test.task.name and stored.classes == test.classes
    if not same_classes or stored.fingerprint() == test.fingerprint():
        return stored  # with other classes there is no comparison, which the gate reports
    import torch  # slow to import, and only needed here

    from fadeformer.inference.classifier import Classifier

    name = f"champion {champion.name} version {champion.number}"
    print(f"the test images have changed since {name} was evaluated: running inference with it")
    folder = package.find_data_folder(package.fetch_package(f"models:/{champion.name}/{champion.number}"))
    try:
        classifier = Classifier.load(model_files.find_model_files(folder, name), torch.device("cpu"))
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name} cannot predict the new test images: its package cannot be loaded ({type(error).__name__}:"
            f" {error}); give this model its own promote.model_name, or roll back to another champion"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        images, index = _load_test_images(classifier.input_config, Path(temporary))
        scores = classifier.predict_proba(images)
    rows = index.set_index("id").index.get_indexer(pd.Index(test.frame["id"]))
    return predictions.build_predictions(test.frame, test.labels, scores[rows], test.task, test.classes)


def _load_test_images(input_config: dict[str, object], folder: Path) -> tuple[NDArray[np.uint8], pd.DataFrame]:
    """Return the test images in the champion's input format, decoded again if necessary, and their rows."""
    meta, split = arrays.read_metadata(paths.PROCESSED), arrays.load_split(paths.PROCESSED, "test")
    if input_config == {"image_size": meta.image_size, "channels": meta.channels, "aspect": meta.aspect}:
        return split.images, split.index
    rows = pd.read_parquet(paths.MANIFEST)
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    return preprocess.decode_to_memmap(rows, paths.RAW, folder / "test.npy", **input_config), rows  # type: ignore[arg-type]
