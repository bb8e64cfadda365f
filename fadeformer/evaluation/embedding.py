"""Two-dimensional PCA projection of penultimate features."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA


def pca_projection(features: NDArray[np.float32], ids: pd.Series) -> pd.DataFrame:
    """Project features on their first two principal components.

    Args:
        features: (images, channels), at least 2 of each.
        ids: image ids, (images,).

    Returns:
        Table with columns id, x, y; `attrs["explained"]` holds the two explained variance ratios.
    """
    values = features.astype(np.float64)
    pca = PCA(2, svd_solver="covariance_eigh" if len(values) > values.shape[1] else "full").fit(values)
    coordinates = pd.DataFrame(pca.transform(values), columns=["x", "y"])
    coordinates.insert(0, "id", ids.to_numpy())
    coordinates.attrs["explained"] = np.nan_to_num(pca.explained_variance_ratio_).tolist()
    return coordinates
