"""A model as a folder of files, whether training left it or MLflow brought it: which file is what."""

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
WEIGHTS_FILE = "weights.safetensors"  # of a package
TRAINED_WEIGHTS_FILE = "best_model.pth"  # as training leaves them
OOD_FILE = "ood.safetensors"
OPERATING_POINTS_FILE = "operating_points.json"
REFERENCE_FILE = "reference.parquet"


@dataclass(frozen=True)
class ModelFiles:
    """Files of one model.

    Attributes:
        folder: which holds them.
        weights: of the network.
        points: thresholds chosen on val; None where the model carries none.
    """

    folder: Path
    weights: Path
    operating_points: Path | None

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What `model.json` holds."""
        found: Mapping[str, Any] = read_json(self.folder / METADATA_FILE)
        return found

    @property
    def ood(self) -> Path:
        """Of `fadeformer.inference.ood`."""
        return self.folder / OOD_FILE

    @property
    def reference(self) -> Path:
        """Of `fadeformer.monitoring.reference`; a model of an older version has none."""
        return self.folder / REFERENCE_FILE

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what the model says of an image."""
        files = [self.folder / METADATA_FILE, self.weights, self.ood, *filter(None, [self.operating_points])]
        return hashlib.sha256("".join(checksum(file, "sha256") for file in files).encode()).hexdigest()


def find_model_files(folder: Path, called: str, points: Path | None = None) -> ModelFiles:
    """Finds a model's files in a folder, or in its `data/model/`, where a package of MLflow has them.

    Args:
        folder: `models/` of a project, or a model that MLflow brought.
        called: how errors call the model.
        points: a file of operating points that takes the place of the model's own.

    Raises:
        UserError: there is no model, or one that was made before models told of their images and of what they know.
    """
    for place in (folder, folder / "data" / "model"):
        weights = next(
            (place / name for name in (WEIGHTS_FILE, TRAINED_WEIGHTS_FILE) if (place / name).is_file()), None
        )
        if weights is not None and (place / METADATA_FILE).is_file():
            break
    else:
        raise UserError(
            f"{called}: holds no model ({METADATA_FILE} and {WEIGHTS_FILE} or {TRAINED_WEIGHTS_FILE}); run `dvc repro train`"
        )
    if points is not None and not points.is_file():
        raise UserError(f"{points}: no such file; `dvc repro evaluate` makes reports/{OPERATING_POINTS_FILE}")
    own = place / OPERATING_POINTS_FILE
    found = ModelFiles(place, weights, points or (own if own.is_file() else None))
    missing = [name for name in ("input", "ood") if name not in found.metadata]
    if missing or not found.ood.is_file():
        raise UserError(
            f"{called}: the model was made by an older version of this program and lacks"
            f" {', '.join(missing) or OOD_FILE}; train it again"
        )
    return found
