"""The parts of stage evaluate that run the network: scores, features, and explanations."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fadeformer import arrays, case_maps, embedding, mistakes, pointing, predictions, subgroups
from fadeformer.classifier import Classifier
from fadeformer.files import read_json, whole_file, write_json
from pipelines import paths


def predict(batch_size: int, wanted: str | list[str]) -> float:
    """Scores of every image of val and test, as predictions.parquet, and where test images lie by their features.

    Args:
        batch_size: images at a time.
        wanted: `evaluate.subgroups`.

    Returns:
        Seconds that the network took.
    """
    meta = arrays.read_meta(paths.PROCESSED)
    model = classifier()
    splits = {split: arrays.read(paths.PROCESSED, split) for split in ("val", "test")}
    began = time.perf_counter()
    of_val, of_test = (model.predict(of.pixels, batch_size) for of in splits.values())
    seconds = time.perf_counter() - began
    index = pd.concat([of.index for of in splits.values()], ignore_index=True)
    table = predictions.table(
        index,
        np.concatenate([of.labels for of in splits.values()]),
        np.concatenate([of_val.scores, of_test.scores]),
        meta.task,
        meta.classes,
        np.concatenate([of_val.raw, of_test.raw]),
        subgroups.chosen(index.drop(columns=["split", "id", "group"]), wanted),
    )
    with whole_file(paths.PREDICTIONS) as path:
        predictions.write(table, path)
    with whole_file(paths.EMBEDDING) as path:
        embedding.places(of_test.features, splits["test"].index["id"]).to_parquet(path, index=False)
    return seconds


def explain(most: int, seed: int, confidence: float) -> tuple[dict[str, NDArray[np.float64]], float | None]:
    """What the model looked at in its worst mistakes; how far that can be trusted, and where it points, are written.

    Args:
        most: mistakes.
        seed: of the sanity check.
        confidence: of intervals.

    Returns:
        Maps of the mistakes by name, (mistakes, side, side), and the seconds that pointing at boxes took, if there are
        boxes.
    """
    test, images = predictions.read(paths.PREDICTIONS).of("test"), arrays.read(paths.PROCESSED, "test")
    model = classifier()
    wrong = mistakes.most_wrong(test, most)
    looked = case_maps.case_maps(model, wrong, images.pixels, test.scores.argmax(axis=1), seed)
    boxes = arrays.read_boxes(paths.PROCESSED, "test")
    began = time.perf_counter()
    pointed: dict[str, Any] | None = None
    if boxes is not None and looked.numbers["randomisation"]:  # else the network cannot be explained
        pointed = pointing.points_at_boxes(model, boxes, images.index, images.pixels, test.classes, confidence)
    seconds = time.perf_counter() - began if pointed is not None else None
    sentences = [*looked.sentences, *(pointing.sentences(pointed) if pointed is not None else ())]
    write_json(paths.EXPLANATIONS, {**looked.numbers, "pointing": pointed, "sentences": sentences})
    return looked.maps, seconds


def classifier() -> Classifier:
    """The classifier of models/."""
    found = Classifier(read_json(paths.ARCHITECTURE), paths.WEIGHTS)
    torch.use_deterministic_algorithms(True, warn_only=found.device.type == "cuda")
    return found
