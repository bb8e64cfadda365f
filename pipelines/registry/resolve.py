"""A model by its name in MLflow's registry or by its folder, ready to be used on images of the disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fadeformer.inference import model_files
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.model_files import ModelFiles

MODEL_HELP = "models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a folder as models/"


def find_model_files(name: str, points: Path | None = None) -> ModelFiles:
    """The files of a model, brought here where they are not.

    Args:
        name: as `HELP` tells.
        points: a file of operating points that takes the place of the model's own.

    Raises:
        UserError: there is no such model.
        Unreachable: MLflow is.
    """
    folder = Path(name)
    if re.match(r"\w+:/", name):
        from pipelines.registry import package  # MLflow takes seconds to import, and a folder does without it

        folder = package.fetch_package(name)
    return model_files.find_model_files(folder, name, points)


def load_classifier(model: ModelFiles) -> Classifier:
    """Load the model, onto a GPU if there is one; raises UserError if its weights are damaged."""
    classifier = Classifier.load(model)
    torch.use_deterministic_algorithms(True, warn_only=classifier.device.type == "cuda")
    return classifier
