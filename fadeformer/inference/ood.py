"""How far an image lies from all that a network was trained on: the Mahalanobis distance of its features.

Of what the classifier sees of each image of train, every class has a mean and all share one covariance S; the distance
of an image with features f is the smallest over the classes c of

    sqrt((f - mean_c)^T S^-1 (f - mean_c))

(Lee et al. 2018, arXiv:1807.03888, equations 1 and 2; of the last layer alone, without their perturbed inputs). Where
an image may have several findings there is one mean, of all images. S is shrunk towards a multiple of the identity by
as much as Ledoit and Wolf (2004, doi:10.1016/S0047-259X(03)00096-4) ask for, so that it can be inverted where there are
fewer images than features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.linalg import eigh
from sklearn.covariance import ledoit_wolf

from fadeformer.errors import UserError
from fadeformer.tasks import Task

Floats = NDArray[np.float64]
Features = NDArray[np.float32]

# The share of val that counts as familiar. An image that lies further out than these is called unfamiliar, so that of
# images like those of val one in twenty is called so for nothing.
THRESHOLD_QUANTILE = 0.95
MIN_RELATIVE_VARIANCE = (
    1e-12  # variance along a direction, as a share of the largest: below, nothing was seen to vary there
)


@dataclass(frozen=True, eq=False)
class OODDetector:
    """What a network knows.

    Attributes:
        whiten: (features, directions), by which S becomes the identity.
        means: of each class, or of all, whitened, (means, directions).
        limit: the distance above which an image is unfamiliar.
    """

    whiten: Floats
    means: Floats
    threshold: float

    def distance(self, features: Features) -> Floats:
        """What the classifier sees of images, (images, features), to their distances, (images,)."""
        # torch, whose threads are set by who calls: numpy's would compete with those that decode
        seen = torch.from_numpy(features.astype(np.float64)) @ torch.from_numpy(self.whiten)
        apart = [(seen - mean).square().sum(dim=1) for mean in torch.from_numpy(self.means)]
        return np.asarray(torch.stack(apart).amin(dim=0).sqrt().numpy())


def fit_detector(train: Features, labels: NDArray[np.int64], task: Task, val: Features) -> OODDetector:
    """Means and covariance of train, and the limit by val.

    Val has no part in the covariance: of the images that it is fitted to, distances are too small.

    Args:
        train: (images, features).
        labels: of train, (images, labels).
        task: what kind of classification it is.
        val: (images, features).
    """
    wide = train.astype(np.float64)
    kinds = np.zeros(len(wide), np.int64) if task.multi_label else labels[:, 0]
    means = {kind: wide[kinds == kind].mean(axis=0) for kind in np.unique(kinds)}
    covariance, _ = ledoit_wolf(wide - np.stack([means[kind] for kind in kinds]), assume_centered=True)
    variances, directions = eigh(covariance)
    kept = variances > MIN_RELATIVE_VARIANCE * variances.max()
    whiten = directions[:, kept] / np.sqrt(variances[kept])
    fitted = OODDetector(np.ascontiguousarray(whiten), np.stack(list(means.values())) @ whiten, np.inf)
    return OODDetector(fitted.whiten, fitted.means, float(np.quantile(fitted.distance(val), THRESHOLD_QUANTILE)))


def write(familiar: OODDetector, path: Path) -> None:
    """Writes the arrays as safetensors; the limit goes into `model.json`."""
    save_file({"whiten": familiar.whiten, "means": familiar.means}, path)


def read(path: Path, limit: float) -> OODDetector:
    """What `write` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        arrays = load_file(path)
        return OODDetector(arrays["whiten"], arrays["means"], limit)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); fetch the model again") from error
