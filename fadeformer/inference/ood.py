"""Mahalanobis-distance out-of-distribution (OOD) detector on penultimate features.

The training features have one mean per class and a shared covariance S; the distance of an image with features f is the
minimum over the classes c of

    sqrt((f - mean_c)^T S^-1 (f - mean_c))

(Lee et al. 2018, arXiv:1807.03888, equations 1 and 2; penultimate layer only, without input perturbation). Multi-label
tasks have a single mean, over all images. S is shrunk toward a multiple of the identity (Ledoit and Wolf 2004,
doi:10.1016/S0047-259X(03)00096-4), so that it is invertible with fewer images than features.

The threshold is a conformal quantile of the distances on val (Vovk et al. 2005, doi:10.1007/b106715): of images like
those of val, at most `FLAGGED_SHARE` are flagged on average over val splits, however few images val has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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

FLAGGED_SHARE = 0.05  # of in-distribution images, at most, that are flagged as OOD
MIN_VAL_IMAGES = math.ceil(1 / FLAGGED_SHARE) - 1  # with fewer, every finite threshold flags more
MIN_RELATIVE_VARIANCE = 1e-12  # of the largest eigenvalue; directions below it are constant on train and are dropped


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Fitted out-of-distribution detector.

    Attributes:
        whiten: whitening matrix, which maps S to the identity, (features, directions).
        means: whitened class means, or the overall mean, (means, directions).
        threshold: distance above which an image is out-of-distribution; infinite if val has fewer than
            `MIN_VAL_IMAGES` images, too few to choose one.
    """

    whiten: Floats
    means: Floats
    threshold: float

    def distance(self, features: Features) -> Floats:
        """Compute the distance of each image, (images,), from features (images, features)."""
        # torch, because the caller controls its threads: those of numpy would compete with the decoding threads
        whitened = torch.from_numpy(features.astype(np.float64)) @ torch.from_numpy(self.whiten)
        squares = [(whitened - mean).square().sum(dim=1) for mean in torch.from_numpy(self.means)]
        return np.asarray(torch.stack(squares).amin(dim=0).sqrt().numpy())


def fit_detector(train: Features, labels: NDArray[np.int64], task: Task, val: Features) -> OODDetector:
    """Fit means and covariance on train and the threshold on val.

    Val is held out of the covariance: distances of the images used for the fit are too small.

    Args:
        train: features of train, (images, features).
        labels: of train, (images, labels).
        task: classification task.
        val: features of val, (images, features).
    """
    features = train.astype(np.float64)
    classes = np.zeros(len(features), np.int64) if task.multi_label else labels[:, 0]
    means = {c: features[classes == c].mean(axis=0) for c in np.unique(classes)}
    covariance, _ = ledoit_wolf(features - np.stack([means[c] for c in classes]), assume_centered=True)
    variances, directions = eigh(covariance)
    keep = variances > MIN_RELATIVE_VARIANCE * variances.max()
    whiten = directions[:, keep] / np.sqrt(variances[keep])
    detector = OODDetector(np.ascontiguousarray(whiten), np.stack(list(means.values())) @ whiten, np.inf)
    return replace(detector, threshold=conformal_threshold(detector.distance(val)))


def conformal_threshold(distances: Floats) -> float:
    """Return the distance that at most `FLAGGED_SHARE` of further images from the same distribution exceed on average.

    It is the k-th smallest of the n distances with k = ceil((n + 1) (1 - FLAGGED_SHARE)): a further image takes each of
    the n + 1 ranks with the same probability. Infinite if k exceeds n, with fewer than `MIN_VAL_IMAGES` images.

    Args:
        distances: of images that were not used to fit the detector, (images,).
    """
    num_flagged = int(FLAGGED_SHARE * (len(distances) + 1) + 1e-9)  # ranks above the threshold; 1e-9 for rounding
    return float(np.sort(distances)[-num_flagged]) if num_flagged else math.inf


def write(detector: OODDetector, path: Path) -> None:
    """Write the arrays as safetensors; the threshold belongs in `model.json` (`threshold_to_json`)."""
    save_file({"whiten": detector.whiten, "means": detector.means}, path)


def threshold_to_json(detector: OODDetector) -> float | None:
    """Return the threshold, or None if it is infinite: JSON has no infinity."""
    return detector.threshold if math.isfinite(detector.threshold) else None


def read(path: Path, threshold: float | None) -> OODDetector:
    """Read a detector that `write` wrote.

    Args:
        path: of the arrays.
        threshold: from `model.json`, where None stands for infinity.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        arrays = load_file(path)
        return OODDetector(arrays["whiten"], arrays["means"], math.inf if threshold is None else threshold)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); fetch the model again") from error
