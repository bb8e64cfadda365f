"""Where images lie by what the classifier sees of them, in the two directions of most spread (principal components)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA


def pca_projection(features: NDArray[np.float32], ids: pd.Series) -> pd.DataFrame:
    """Two coordinates of each image.

    Args:
        features: (images, channels), at least 2 of each.
        ids: of the images.

    Returns:
        Columns id, x, y; `attrs["explained"]` is the share of the variance along each.
    """
    wide = features.astype(np.float64)
    fitted = PCA(2, svd_solver="covariance_eigh" if len(wide) > wide.shape[1] else "full").fit(wide)
    found = pd.DataFrame(fitted.transform(wide), columns=["x", "y"])
    found.insert(0, "id", ids.to_numpy())
    found.attrs["explained"] = np.nan_to_num(fitted.explained_variance_ratio_).tolist()
    return found
