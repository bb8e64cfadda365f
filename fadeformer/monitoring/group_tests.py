"""Two-sample permutation tests for images of the same patient, lesion or slide.

Images of a group are correlated; groups are the independent observations: statistics are means over groups,
each of which counts the same, and whole groups are exchanged between the two samples. Statistics are divided by their
standard error over groups, because a permutation test of an unstudentized difference is wrong if the samples have
different variances, such as 50 images per group in one and one in the other (Janssen 1997,
doi:10.1016/S0167-7152(97)00043-6). Several statistics are adjusted jointly by the distribution of their maximum
(Westfall and Young 1993, single-step maxT), which uses their correlation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

NUM_PERMUTATIONS = 999
SEED = 0  # of permutations and folds: the same images give the same result
NUM_QUANTILES = 100  # at which two distribution functions are compared
MAX_COMPONENTS = 50  # principal components of the features in the classifier
GROUPS_PER_COMPONENT = 5  # fewer groups than that would be separated by chance
NUM_FOLDS = 5
MIN_VARIANCE = 1e-12  # of a share; keeps a statistic finite if all groups of a sample are equal
TIE_TOLERANCE = 1e-9  # equal statistics of two permutations differ by rounding


def permute_groups(is_new: NDArray[np.bool_]) -> Floats:
    """Assign groups to the new sample at random.

    Args:
        is_new: whether each group is in the new sample, (groups,).

    Returns:
        The actual assignment and `NUM_PERMUTATIONS` random ones with as many new groups, 0 or 1,
        (1 + permutations, groups).
    """
    rows = np.tile(is_new.astype(np.float64), (NUM_PERMUTATIONS, 1))
    permuted = np.random.default_rng(SEED).permuted(rows, axis=1)
    return np.concatenate([is_new[None].astype(np.float64), permuted])


def group_means(values: NDArray[np.float64 | np.bool_], groups: Codes) -> Floats:
    """Average over the images of each group.

    Args:
        values: (images, columns).
        groups: group code of each image, consecutive from 0, (images,).

    Returns:
        The means, (groups, columns).
    """
    order = np.argsort(groups, kind="stable")
    counts = np.bincount(groups)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.asarray(np.add.reduceat(values[order].astype(np.float64), starts, axis=0) / counts[:, None])


def studentized_ks(values: Floats, groups: Codes, assignments: Floats) -> tuple[Floats, float]:
    """Compare the distribution functions of two samples by their largest difference (Kolmogorov and Smirnov).

    A distribution function is the mean over groups of the share of a group's images at or below a value, at
    `NUM_QUANTILES` quantiles of all images. The difference is divided by its root mean square standard error.

    Args:
        values: of the images, (images,).
        groups: group code of each image, consecutive from 0, (images,).
        assignments: from `permute_groups`, (permutations, groups).

    Returns:
        The statistic of each assignment, (permutations,), and the largest difference for the first one, in [0, 1].
    """
    levels = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    quantiles = np.unique(np.quantile(values, levels, method="inverted_cdf"))
    shares = group_means(values[:, None] <= quantiles, groups)
    counts = assignments[0].sum(), len(shares) - assignments[0].sum()
    sums, squares = assignments @ shares, assignments @ shares**2
    new_mean, new_variance = _mean_and_variance(sums, squares, counts[0])
    mean, variance = _mean_and_variance(shares.sum(axis=0) - sums, (shares**2).sum(axis=0) - squares, counts[1])
    distances = np.abs(new_mean - mean).max(axis=1)
    errors = np.sqrt(np.maximum((new_variance + variance).mean(axis=1), MIN_VARIANCE))
    return distances / errors, float(distances[0])


def classifier_statistics(features: Floats, groups: Codes, assignments: Floats) -> tuple[Floats, Floats]:
    """Separate two samples with a cross-validated linear classifier (Lopez-Paz and Oquab 2017, arXiv:1610.06545).

    Linear discriminant analysis with shrunken covariance (Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4) on
    principal components of the group means; folds consist of whole groups. Components, covariances and folds do not
    depend on the assignment, so that all permutations are fitted at once. The statistic is Welch's t of the scores of
    the groups.

    Args:
        features: (images, features).
        groups: group code of each image, consecutive from 0, (images,).
        assignments: from `permute_groups`, (permutations, groups).

    Returns:
        The statistic of each assignment, (permutations,), and the out-of-fold score of each image for the first one,
        (images,).
    """
    means = group_means(features, groups)
    components = max(1, min(MAX_COMPONENTS, features.shape[1], len(means) // GROUPS_PER_COMPONENT))
    projection = make_pipeline(StandardScaler(), PCA(components, svd_solver="full")).fit(means)
    inputs, images = projection.transform(means), projection.transform(features)
    folds = np.random.default_rng(SEED).permutation(len(means)) % NUM_FOLDS
    scores, image_scores = np.empty_like(assignments), np.empty(len(features))
    for fold in range(NUM_FOLDS):
        train, test = folds != fold, folds == fold
        direction, midpoint = _fit_discriminant(inputs[train], assignments[:, train])
        scores[:, test] = direction @ inputs[test].T - midpoint[:, None]
        image_scores[test[groups]] = images[test[groups]] @ direction[0] - midpoint[0]
    counts = assignments[0].sum(), len(means) - assignments[0].sum()
    new_mean, new_variance = _mean_and_variance(
        (scores * assignments).sum(axis=1), (scores**2 * assignments).sum(axis=1), counts[0]
    )
    others = 1 - assignments
    mean, variance = _mean_and_variance((scores * others).sum(axis=1), (scores**2 * others).sum(axis=1), counts[1])
    return (new_mean - mean) / np.sqrt(np.maximum(new_variance + variance, MIN_VARIANCE)), image_scores


def max_t_p_values(statistics: Sequence[Floats]) -> Floats:
    """Compute p-values that are adjusted for the number of statistics and their correlation.

    Args:
        statistics: of each assignment, one array (permutations,) per test; large values are evidence of a difference.
            The first assignment is the actual one.

    Returns:
        One p-value per test. The probability that any is below a level, if no sample differs, is at most this level.
    """
    table = np.stack(statistics, axis=1)
    spread = table.std(axis=0)
    table = (table - table.mean(axis=0)) / np.where(spread > 0, spread, 1)  # so that each test has the same weight
    return np.asarray((table.max(axis=1)[:, None] >= table[0] - TIE_TOLERANCE).mean(axis=0))


def _mean_and_variance(sums: Floats, squares: Floats, count: float) -> tuple[Floats, Floats]:
    """Mean and its squared standard error from sums over `count` groups."""
    mean = sums / count
    return mean, np.maximum(squares / count - mean**2, 0) / (count - 1)


def _fit_discriminant(inputs: Floats, assignments: Floats) -> tuple[Floats, Floats]:
    """Return the direction, (permutations, inputs), and the score halfway between the samples, (permutations,)."""
    new_counts = assignments.sum(axis=1, keepdims=True)
    sums = assignments @ inputs
    new_mean = sums / np.maximum(new_counts, 1)
    mean = (inputs.sum(axis=0) - sums) / np.maximum(len(inputs) - new_counts, 1)
    inverse = np.linalg.pinv(ledoit_wolf(inputs)[0], hermitian=True)  # 0 for constant inputs
    direction = (new_mean - mean) @ inverse
    return direction, (direction * (new_mean + mean)).sum(axis=1) / 2
