"""Where images lie by what the classifier sees of them, in the two directions of most spread (principal components)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def places(features: NDArray[np.float32], ids: pd.Series) -> pd.DataFrame:
    """Two coordinates of each image.

    Args:
        features: (images, channels), at least 2 of each.
        ids: of the images.

    Returns:
        Columns id, x, y; `attrs["explained"]` is the share of the variance along each.
    """
    wide = features.astype(np.float64)
    centred = wide - wide.mean(axis=0)
    if len(wide) > wide.shape[1]:
        variance, directions = np.linalg.eigh(centred.T @ centred)
        variance, directions = np.maximum(variance[::-1], 0.0), directions[:, ::-1].T
    else:
        _, deviation, directions = np.linalg.svd(centred, full_matrices=False)
        variance = deviation**2
    directions = directions[:2]
    largest = np.abs(directions).argmax(axis=1)  # either sign is as good: here the largest share is positive
    directions = directions * np.sign(directions[[0, 1], largest])[:, None]
    explained = variance[:2] / variance.sum() if variance.sum() > 0 else np.zeros(2)
    found = pd.DataFrame(centred @ directions.T, columns=["x", "y"])
    found.insert(0, "id", ids.to_numpy())
    found.attrs["explained"] = explained.tolist()
    return found
