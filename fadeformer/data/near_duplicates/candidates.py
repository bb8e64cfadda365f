"""Candidate pairs: nearest neighbors of rotation-invariant descriptors, with the rotation between the two images.

A shift by a tenth of the image brings other content under the window, so each image is also looked up as seen by
windows that are shifted along the diagonals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors

from fadeformer.data.near_duplicates import spectra

NUM_COMPONENTS = 48  # principal components of the descriptors
REGULARIZATION = 0.05  # of the whitening, fraction of the largest standard deviation
NEIGHBORS = 8  # per image
SHIFTED_NEIGHBORS = 4  # per image and shifted window
WINDOW_SHIFTS = ((0, 0), (3, 3), (3, -3), (-3, 3), (-3, -3))  # pixels of `spectra.SIDE`
MIN_CORRELATION = 0.65  # of the spectra of two images
MAX_CANDIDATES = 8  # compared pairs per image, those that correlate best
EXACT_SEARCH_LIMIT = 10_000  # images; larger sets are searched within clusters
CLUSTER_SIZE = 1_000  # images, mean
SEARCHED_CLUSTERS = 8  # per image
CHUNK = 4_096


def candidate_pairs(images: NDArray[np.uint8]) -> pd.DataFrame:
    """Find pairs of images whose spectra are similar after a rotation or reflection.

    Args:
        images: (n, spectra.SIDE, spectra.SIDE).

    Returns:
        One row per unordered pair: `first`, `second` (positions), `angle` (radians, up to half a turn) and `reflected`.
    """
    if len(images) < 2:
        columns = {"first": np.int64, "second": np.int64, "angle": np.float32, "reflected": np.bool_}
        return pd.DataFrame({name: np.empty(0, dtype) for name, dtype in columns.items()})
    reference = _spectra(images, (0, 0))
    scale = (reference - reference.mean(axis=2, keepdims=True)).std(axis=(0, 2))[:, None] + 1e-6
    whiten = _Whitening(spectra.rotation_invariants(reference))
    transforms = spectra.angular_transform(reference, scale)
    search = _NeighborSearch(whiten(spectra.rotation_invariants(reference)))
    tables: list[pd.DataFrame] = []
    for shift in WINDOW_SHIFTS:
        seen = _spectra(images, shift) if any(shift) else reference
        neighbors = search.nearest(
            whiten(spectra.rotation_invariants(seen)), SHIFTED_NEIGHBORS if any(shift) else NEIGHBORS
        )
        seen_transforms = spectra.angular_transform(seen, scale) if any(shift) else transforms
        tables.extend(_correlated(seen_transforms, transforms, neighbors))
    return _best_of_each_image(pd.concat(tables, ignore_index=True), len(images))


def _spectra(images: NDArray[np.uint8], shift: tuple[int, int]) -> spectra.Floats:
    chunks = (images[start : start + CHUNK].astype(np.float32) for start in range(0, len(images), CHUNK))
    return np.concatenate([spectra.polar_spectra(spectra.shift_window(chunk, shift)) for chunk in chunks])


class _Whitening:
    """Principal components with regularized unit variance; calling it transforms descriptors, (n, components)."""

    def __init__(self, descriptors: spectra.Floats) -> None:
        self.mean = descriptors.mean(axis=0)
        centered = descriptors - self.mean
        variances, components = np.linalg.eigh(centered.T @ centered / len(centered))
        deviations = np.sqrt(np.maximum(variances[::-1][:NUM_COMPONENTS], 0))
        self.projection = components[:, ::-1][:, :NUM_COMPONENTS] / (deviations + REGULARIZATION * deviations[0] + 1e-6)

    def __call__(self, descriptors: spectra.Floats) -> spectra.Floats:
        return np.asarray((descriptors - self.mean) @ self.projection, np.float32)


class _NeighborSearch:
    """Nearest neighbors: exact in small sets, in the clusters nearest to the query in large ones.

    Args:
        database: descriptors of all images, (n, components).
    """

    def __init__(self, database: spectra.Floats) -> None:
        self.database = database
        if len(database) <= EXACT_SEARCH_LIMIT:
            self.centers, labels = database.mean(axis=0, keepdims=True), np.zeros(len(database), np.int64)
        else:
            clusters = MiniBatchKMeans(len(database) // CLUSTER_SIZE, random_state=0, n_init=1, batch_size=CHUNK)
            labels = clusters.fit_predict(database)
            self.centers = clusters.cluster_centers_
        self.members = [np.flatnonzero(labels == number) for number in range(len(self.centers))]

    def nearest(self, queries: spectra.Floats, count: int) -> NDArray[np.int64]:
        """Return the positions of the nearest other images of each image, (n, count); -1 where there are fewer."""
        probes = min(SEARCHED_CLUSTERS, len(self.centers))
        searched = NearestNeighbors(n_neighbors=probes, algorithm="brute").fit(self.centers)
        searched = searched.kneighbors(queries, return_distance=False)
        distance = np.full((len(queries), probes * count), np.inf, np.float32)
        position = np.full(distance.shape, -1)
        for number, members in enumerate(self.members):
            rows, slots = np.nonzero(searched == number)
            available = min(count + 1, len(members))  # one more, because an image may be its own neighbor
            if not len(rows) or available == 0:
                continue
            index = NearestNeighbors(n_neighbors=available, algorithm="brute").fit(self.database[members])
            distances, found = index.kneighbors(queries[rows])
            found = members[found]
            distances[found == rows[:, None]] = np.inf
            order = np.argsort(distances, axis=1, kind="stable")[:, :count]
            columns = slots[:, None] * count + np.arange(order.shape[1])
            distance[rows[:, None], columns] = np.take_along_axis(distances, order, axis=1)
            position[rows[:, None], columns] = np.take_along_axis(found, order, axis=1)
        order = np.argsort(distance, axis=1, kind="stable")[:, :count]
        return np.where(
            np.isfinite(np.take_along_axis(distance, order, axis=1)), np.take_along_axis(position, order, axis=1), -1
        )


def _correlated(
    queries: NDArray[np.complex64], database: NDArray[np.complex64], neighbors: NDArray[np.int64]
) -> Iterator[pd.DataFrame]:
    """Yield tables of the neighbors whose spectra correlate at some rotation or reflection."""
    rows, columns = np.nonzero(neighbors >= 0)
    for start in range(0, len(rows), CHUNK):
        first = rows[start : start + CHUNK]
        second = neighbors[first, columns[start : start + CHUNK]]
        correlation, angle, reflected = spectra.correlate_angles(queries[first], database[second])
        table = pd.DataFrame(
            {"first": first, "second": second, "correlation": correlation, "angle": angle, "reflected": reflected}
        )
        yield table[table["correlation"] > MIN_CORRELATION]


def _best_of_each_image(pairs: pd.DataFrame, count: int) -> pd.DataFrame:
    """Keep each unordered pair once, and of each image the pairs that correlate best."""
    low, high = np.minimum(pairs["first"], pairs["second"]), np.maximum(pairs["first"], pairs["second"])
    pairs = pairs.assign(pair=low * count + high).sort_values(["correlation", "pair"], ascending=False, kind="stable")
    pairs = pairs.drop_duplicates("pair")
    ends = pairs[["first", "second"]].to_numpy().ravel()
    rank = pd.Series(ends).groupby(ends).cumcount().to_numpy().reshape(-1, 2)  # of the pair, for each of its images
    is_best = (rank < MAX_CANDIDATES).any(axis=1)
    return pairs.iloc[np.flatnonzero(is_best)].reset_index(drop=True)
