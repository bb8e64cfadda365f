"""Find and load a model by its MLflow URI or its folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fadeformer.inference import model_files
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.model_files import ModelFiles

MODEL_HELP = "models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a folder such as models/"


def find_model_files(name: str, points: Path | None = None) -> ModelFiles:
    """Return the files of a model, which are downloaded if necessary.

    Args:
        name: See `MODEL_HELP`.
        points: A file of operating points to use instead of the model's.

    Raises:
        UserError: There is no such model.
        MLflowUnreachable: MLflow cannot be reached.
    """
    folder = Path(name)
    if re.match(r"\w+:/", name):
        from pipelines.registry import package  # MLflow is slow to import, and not needed for a folder

        folder = package.fetch_package(name)
    return model_files.find_model_files(folder, name, points)


def load_classifier(model: ModelFiles) -> Classifier:
    """Load the model onto a GPU if there is one; raises a UserError if its weights are damaged."""
    classifier = Classifier.load(model)
    torch.use_deterministic_algorithms(True, warn_only=classifier.device.type == "cuda")
    return classifier
