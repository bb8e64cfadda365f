"""Files of a model folder, written by training or downloaded from MLflow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fadeformer.errors import UserError
from fadeformer.io.atomic import checksum, read_json

METADATA_FILE = "model.json"
WEIGHTS_FILE = "weights.safetensors"  # in a model package
TRAINED_WEIGHTS_FILE = "best_model.pth"  # in models/
OOD_FILE = "ood.safetensors"
OPERATING_POINTS_FILE = "operating_points.json"
REFERENCE_FILE = "reference.parquet"


@dataclass(frozen=True)
class ModelFiles:
    """Files of one model.

    Attributes:
        folder: that contains them.
        weights: of the network.
        operating_points: thresholds chosen on val; None if the model has none.
    """

    folder: Path
    weights: Path
    operating_points: Path | None

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Content of `model.json`."""
        metadata: Mapping[str, Any] = read_json(self.folder / METADATA_FILE)
        return metadata

    @property
    def ood(self) -> Path:
        """Statistics of the out-of-distribution detector (`fadeformer.inference.ood`)."""
        return self.folder / OOD_FILE

    @property
    def reference(self) -> Path:
        """Reference data for drift detection (`fadeformer.monitoring.reference`); absent in older models."""
        return self.folder / REFERENCE_FILE

    def fingerprint(self) -> str:
        """Return a SHA-256 over all files that determine the predictions of the model."""
        files = [self.folder / METADATA_FILE, self.weights, self.ood, *filter(None, [self.operating_points])]
        return hashlib.sha256("".join(checksum(file, "sha256") for file in files).encode()).hexdigest()


def find_model_files(folder: Path, name: str, points: Path | None = None) -> ModelFiles:
    """Find the files of a model in a folder, or in its `data/model/` as in an MLflow package.

    Args:
        folder: `models/` of a project, or a downloaded MLflow model.
        name: of the model in error messages.
        points: operating points file to use instead of the one in the model.

    Raises:
        UserError: there is no model, or an older version wrote it, without input size or OOD statistics.
    """
    for location in (folder, folder / "data" / "model"):
        candidates = (location / file for file in (WEIGHTS_FILE, TRAINED_WEIGHTS_FILE))
        weights = next((path for path in candidates if path.is_file()), None)
        if weights is not None and (location / METADATA_FILE).is_file():
            break
    else:
        raise UserError(
            f"{name}: no model found ({METADATA_FILE} and {WEIGHTS_FILE} or {TRAINED_WEIGHTS_FILE});"
            " run `dvc repro train`"
        )
    if points is not None and not points.is_file():
        raise UserError(f"{points}: no such file; run `dvc repro evaluate` to create reports/{OPERATING_POINTS_FILE}")
    default_points = location / OPERATING_POINTS_FILE
    files = ModelFiles(location, weights, points or (default_points if default_points.is_file() else None))
    missing = [key for key in ("input", "ood") if key not in files.metadata]
    if missing or not files.ood.is_file():
        raise UserError(
            f"{name}: the model was written by an older version of this program and lacks"
            f" {', '.join(missing) or OOD_FILE}; train it again"
        )
    return files
