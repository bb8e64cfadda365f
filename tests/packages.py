"""Small untrained models with the files of `train` and `evaluate`, for tests of packages, serving and export."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fadeformer.data import training_images
from fadeformer.data.normalization import Normalization
from fadeformer.inference import model_files, ood
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.model_files import (
    METADATA_FILE,
    OOD_FILE,
    OPERATING_POINTS_FILE,
    REFERENCE_FILE,
    TRAINED_WEIGHTS_FILE,
)
from fadeformer.models.factory import create_model
from fadeformer.monitoring import reference
from pipelines.tracking import store

FADE = {"variant": "published", "num_heads": 4, "dropout": 0.1, "K": 2, "alpha": 0.5, "after_blocks": ["last"]}
OFFSETS = [1.0, 0.5, 0.0, -0.5, -1.0]
KINDS = {  # task, head, classes, calibration
    "binary": ("binary-class", "auto", ["benign", "malignant"], {"slope": [1.3], "offset": [0.0]}),
    "multi-class": (
        "multi-class", "auto", ["a", "b", "c", "d", "e"],
        {
            "slope": [0.7], "offset": OFFSETS, "method": "prior correction",
            "decision_weights": np.exp(np.negative(OFFSETS)).tolist(),
        },
    ),
    "grades": (
        "ordinal-regression", "cumulative", ["none", "mild", "severe"],
        {"slope": [1.2], "offset": [0.5, -0.1, -0.4], "method": "offsets", "decision_weights": []},
    ),
    "findings": (
        "multi-label, binary-class", "auto", ["mass", "nodule"], {"slope": [1.5, 0.8], "offset": [0.3, -0.2]},
    ),
}  # fmt: skip


def write_model(
    folder: Path,
    kind: str = "binary",
    *,
    side: int = 16,
    channels: int = 3,
    aspect: str = "pad",
    backbone: str = "fadevit_nano",
    fade: dict | None = FADE,
    classes: list[str] | None = None,
) -> Path:
    """Write models/ and reports/operating_points.json to a folder and return it.

    At the operating point `sensitivity` everything is positive; at `specificity` no class has a threshold.
    """
    task, head, default_classes, calibration = KINDS[kind]
    if classes is None:
        classes = default_classes
    else:
        calibration = {"slope": [1.0], "offset": [0.0]}
    torch.manual_seed(0)
    network = {
        "backbone": backbone, "num_classes": len(classes) - (head == "cumulative"), "image_size": side,
        "in_chans": channels, "pretrained": False, "dropout": 0.1, "drop_path": 0.0, "fade": fade,
    }  # fmt: skip
    model, inputs = create_model(**network).eval(), images(20, side, channels)
    for weight in model.parameters():  # an untrained network predicts nearly the same for every image
        if weight.ndim:
            weight.data += 0.1 * torch.randn_like(weight)
    with torch.no_grad():
        logits = model(Normalization((0.5,) * channels, (0.25,) * channels)(torch.from_numpy(inputs)))
    model.get_classifier().bias.data -= logits.mean(dim=0)  # so that decisions differ between images
    metadata = {
        "model": network, "task": task, "head": head, "classes": classes, "calibration": calibration,
        "normalize": {"mean": [0.5] * channels, "std": [0.25] * channels}, "precision": "32", "weights": None,
        "params": {"train": {"device": "cpu"}}, "best_epoch": 1, "dataset": "drawn",
        "input": {"image_size": side, "channels": channels, "aspect": aspect},
    }  # fmt: skip
    positive_classes = classes[1:] if kind == "binary" else classes
    (folder / "models").mkdir(parents=True)
    (folder / "reports").mkdir()
    weights = folder / "models" / TRAINED_WEIGHTS_FILE
    torch.save(model.state_dict(), weights)
    classifier = Classifier(metadata, weights)
    _, scores, features = classifier.predict(inputs)
    medians = np.median(scores, axis=0)
    labels = np.zeros((20, len(classes) if kind == "findings" else 1), np.int64)
    detector = ood.fit_detector(features, labels, classifier.task, features)
    ood.write(detector, folder / "models" / OOD_FILE)
    metadata["ood"] = {"threshold": ood.threshold_to_json(detector)}
    distances = detector.distance(features)
    groups = pd.Series([None] * len(inputs))
    reference.build_reference(inputs, scores, distances, features, tuple(classes), inputs, (groups, groups)).to_parquet(
        folder / "models" / REFERENCE_FILE
    )
    seen = pd.DataFrame({"sha256": [f"{n:064x}" for n in range(20)], "split": "train"})
    seen.to_parquet(folder / "models" / training_images.FILE)
    points = {
        "youden": {name: {"threshold": medians[classes.index(name)]} for name in positive_classes},
        "sensitivity": {name: {"threshold": 0.0} for name in positive_classes},
        "specificity": dict.fromkeys(positive_classes),
    }
    (folder / "models" / METADATA_FILE).write_text(json.dumps(metadata))
    (folder / "reports" / OPERATING_POINTS_FILE).write_text(
        json.dumps({"targets": {}, "confidence": 0.95, "points": points})
    )
    return folder


@contextmanager
def project_with_store(folder: Path) -> Iterator[Path]:
    """Create a project with a model and its own MLflow store in `folder`; the `with` block runs in it."""
    previous_uri = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(write_model(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect()
        yield folder
    mlflow.set_tracking_uri(previous_uri)


def load(folder: Path) -> Classifier:
    """Load the classifier and operating points of `write_model`, or of a package."""
    points_file = folder / "reports" / OPERATING_POINTS_FILE
    files = model_files.find_model_files(
        folder / "models" if points_file.exists() else folder,
        "the model",
        points_file if points_file.exists() else None,
    )
    return Classifier.load(files, torch.device("cpu"))


def images(count: int, side: int = 16, channels: int = 3) -> np.ndarray:
    """Return random images of random colors, uint8, (count, side, side, channels)."""
    rng = np.random.default_rng(0)
    return (rng.random((count, side, side, channels)) * rng.random((count, 1, 1, channels)) * 256).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()
