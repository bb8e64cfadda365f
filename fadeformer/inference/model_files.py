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

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"  # of a package
TRAINED = "best_model.pth"  # as training leaves them
FAMILIAR = "unfamiliar.safetensors"
POINTS = "operating_points.json"
REFERENCE = "reference.parquet"


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
    points: Path | None

    @cached_property
    def described(self) -> Mapping[str, Any]:
        """What `model.json` holds."""
        found: Mapping[str, Any] = read_json(self.folder / DESCRIPTION)
        return found

    @property
    def familiar(self) -> Path:
        """Of `fadeformer.inference.ood`."""
        return self.folder / FAMILIAR

    @property
    def reference(self) -> Path:
        """Of `fadeformer.monitoring.reference`; a model of an older version has none."""
        return self.folder / REFERENCE

    def identity(self) -> str:
        """SHA-256 of all that decides what the model says of an image."""
        files = [self.folder / DESCRIPTION, self.weights, self.familiar, *filter(None, [self.points])]
        return hashlib.sha256("".join(checksum(file, "sha256") for file in files).encode()).hexdigest()


def find(folder: Path, called: str, points: Path | None = None) -> ModelFiles:
    """Finds a model's files in a folder, or in its `data/model/`, where a package of MLflow has them.

    Args:
        folder: `models/` of a project, or a model that MLflow brought.
        called: how errors call the model.
        points: a file of operating points that takes the place of the model's own.

    Raises:
        UserError: there is no model, or one that was made before models told of their images and of what they know.
    """
    for place in (folder, folder / "data" / "model"):
        weights = next((place / name for name in (WEIGHTS, TRAINED) if (place / name).is_file()), None)
        if weights is not None and (place / DESCRIPTION).is_file():
            break
    else:
        raise UserError(f"{called}: holds no model ({DESCRIPTION} and {WEIGHTS} or {TRAINED}); run `dvc repro train`")
    if points is not None and not points.is_file():
        raise UserError(f"{points}: no such file; `dvc repro evaluate` makes reports/{POINTS}")
    own = place / POINTS
    found = ModelFiles(place, weights, points or (own if own.is_file() else None))
    missing = [name for name in ("input", "unfamiliar") if name not in found.described]
    if missing or not found.familiar.is_file():
        raise UserError(
            f"{called}: the model was made by an older version of this program and lacks"
            f" {', '.join(missing) or FAMILIAR}; train it again"
        )
    return found
