"""What the present champion says of the test images that a challenger is judged on."""

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
from pipelines.registry import package as packaged
from pipelines.registry import versions
from pipelines.registry.versions import ModelVersion


def champion_predictions(champion: ModelVersion, test: Predictions) -> Predictions:
    """The champion's predictions: those it was judged by, or where the test images are others now, new ones.

    Args:
        champion: the version.
        test: the challenger's predictions.

    Raises:
        UserError: its files are gone, or cannot be used any more.
    """
    kept = versions.load_test_predictions(champion)
    if kept.task.name != test.task.name or kept.classes != test.classes or kept.fingerprint() == test.fingerprint():
        return kept  # of other classes no comparison is possible, which the gate tells
    import torch  # takes seconds to import, and only this case needs it

    from fadeformer.inference.classifier import Classifier

    told = f"champion {champion.name} version {champion.number}"
    print(f"the test images are not those that {told} was judged on: it predicts them now")
    package = packaged.find_data_folder(packaged.fetch_package(f"models:/{champion.name}/{champion.number}"))
    try:
        classifier = Classifier.load(model_files.find_model_files(package, told), torch.device("cpu"))
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{told} cannot predict the new test images: its package cannot be loaded ({type(error).__name__}:"
            f" {error}); give this model its own promote.model_name, or roll back to another champion"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        pixels, index = _load_test_images(classifier.input_config, Path(folder))
        scores = classifier.predict_proba(pixels)
    rows = index.set_index("id").index.get_indexer(pd.Index(test.frame["id"]))
    return predictions.build_predictions(test.frame, test.labels, scores[rows], test.task, test.classes)


def _load_test_images(wanted: dict[str, object], folder: Path) -> tuple[NDArray[np.uint8], pd.DataFrame]:
    """The test images as a champion sees them, decoded anew where this run's arrays are of another kind; and rows."""
    meta, split = arrays.read_metadata(paths.PROCESSED), arrays.load_split(paths.PROCESSED, "test")
    if wanted == {"image_size": meta.image_size, "channels": meta.channels, "aspect": meta.aspect}:
        return split.images, split.index
    rows = pd.read_parquet(paths.MANIFEST)
    rows = rows[rows["split"] == "test"].reset_index(drop=True)
    return preprocess.decode_to_memmap(rows, paths.RAW, folder / "test.npy", **wanted), rows  # type: ignore[arg-type]
