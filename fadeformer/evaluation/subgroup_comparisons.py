"""Comparison of each subgroup with all other images by metrics that do not depend on prevalence.

AUC, sensitivity and specificity of each class, and their means over the classes that are evaluable on both sides. Each
comparison is a one-sided test by confidence bounds (`fadeformer.evaluation.intervals.shortfall`): DeLong's on the logit
scale for AUCs, exact ones for proportions, both with the effective number of images of patients or lesions. P-values
are adjusted for all comparisons of all subgroups (`fadeformer.evaluation.intervals.multiple_testing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, owens_t

from fadeformer.evaluation.intervals import delong, multiple_testing
from fadeformer.evaluation.intervals.proportions import (
    correlation_matrix,
    estimate_mean_proportion,
    estimate_proportion,
    group_residuals,
    upper_quantile,
)
from fadeformer.evaluation.intervals.shortfall import Estimate, detectable_shortfall, shortfall_p_value
from fadeformer.evaluation.weighted_metrics import WeightedMetrics

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]
Rows = NDArray[np.bool_]

ALL_CLASSES = "macro average"
MIN_GROUPS = 20  # patients, lesions or single images in a compared subgroup, and among the others
MIN_CASES = 10  # of these with positives for sensitivity, with negatives for specificity, with each for AUC
COMPARED_METRICS = ("auc", "recall", "specificity")
MAX_CORRELATED_GROUPS = 20_000  # from which the correlation of the tests is estimated; its standard error is then 0.007


@dataclass(frozen=True)
class MeanAUCEstimate:
    """Mean of some AUCs, with DeLong's bounds.

    Attributes:
        estimates: AUCs of several classes.
        curves: positions of the averaged ones.
        cases: number of positive and of negative images, means over the curves.
    """

    estimates: delong.AUCEstimates
    curves: tuple[int, ...]
    cases: tuple[float, float]

    @cached_property
    def value(self) -> float:
        """Mean of the AUCs."""
        return float(self.estimates.areas[list(self.curves)].mean())

    def tail_bounds(self, tail: float) -> tuple[float, float]:
        """Compute the bounds at a tail probability on each side."""
        return delong.mean_auc_bounds(self.estimates, list(self.curves), tail)

    def planned_bounds(self, value: float, tail: float) -> tuple[float, float]:
        """Compute bounds for another value, on the logit scale.

        The variance changes in proportion to that of an AUC of normal scores (`binormal_variance`).
        """
        if not 0 < value < 1:
            return value, value
        variance, degrees = delong.mean_auc_variance(self.estimates, list(self.curves))
        if 0 < self.value < 1:
            variance *= binormal_variance(value, *self.cases) / binormal_variance(self.value, *self.cases)
        else:
            variance = value * (1 - value) / float(self.estimates.min_groups[list(self.curves)].min())
        return delong.logit_bounds(value, variance, upper_quantile(tail, degrees))


def binormal_variance(area: float, positives: float, negatives: float) -> float:
    """Compute the variance of an AUC of independent normal scores with equal variances.

    Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747, with the probability that two positives outrank one
    negative from the bivariate normal distribution with correlation 1/2, by Owen's T function.
    """
    both = area - 2 * float(owens_t(ndtri(area), 1 / math.sqrt(3)))
    excess = (positives + negatives - 2) * (both - area**2)
    return (area * (1 - area) + excess) / (positives * negatives)


@dataclass(frozen=True)
class Comparison:
    """Comparison of one metric between a subgroup and all other images.

    Attributes:
        metric: one of `COMPARED_METRICS`.
        class_name: class, finding or `ALL_CLASSES`.
        subgroup: estimate of the subgroup.
        others: estimate of all other images.
        errors: contributions of each patient, lesion or single image to the errors of the two, (2, groups).
    """

    metric: str
    class_name: str
    subgroup: Estimate
    others: Estimate
    errors: Floats

    @property
    def correlation(self) -> float:
        """Correlation of the two estimates, by patients or lesions that are in both."""
        return float(correlation_matrix(self.errors)[0, 1])


def compare_subgroup(metrics: WeightedMetrics, classes: Sequence[str], groups: Groups, rows: Rows) -> list[Comparison]:
    """Compare one subgroup with all other images in every metric with enough cases on both sides.

    Args:
        metrics: of all images.
        classes: class names, in the order of the scores.
        groups: group code of each image, consecutive from 0, (images,).
        rows: mask of the images of the subgroup, (images,).
    """
    sides = (rows, ~rows)
    if min(len(np.unique(groups[side])) for side in sides) < MIN_GROUPS:
        return []
    cases = {"recall": metrics.truth, "specificity": ~metrics.truth}
    has_enough = {
        name: np.array(
            [
                min(len(np.unique(groups[truth[:, c] & side])) for side in sides) >= MIN_CASES
                for c in range(len(classes))
            ]
        )
        for name, truth in cases.items()
    }
    has_enough["auc"] = has_enough["recall"] & has_enough["specificity"]
    candidates = [len(classes) - 1] if metrics.is_exclusive and len(classes) == 2 else list(range(len(classes)))
    comparisons = []
    for name in COMPARED_METRICS:
        columns = [c for c in candidates if has_enough[name][c]]
        if not columns:
            continue
        if name == "auc":
            comparisons += _compare_aucs(metrics, classes, groups, sides, columns)
        else:
            hits = metrics.predicted if name == "recall" else ~metrics.predicted
            comparisons += _compare_proportions(name, hits, cases[name], classes, groups, sides, columns)
    return comparisons


def adjust(comparisons: Sequence[Comparison], alpha: float, seed: int) -> list[dict[str, Any]]:
    """Test all comparisons jointly.

    Args:
        comparisons: of all subgroups.
        alpha: probability of any false finding, such as 0.05.
        seed: of the draws of the multivariate normal distribution.

    Returns:
        For each comparison `metric`, `class`, `value`, `others`, `p` (adjusted), `worse`, and `detectable_shortfall`,
        the smallest true shortfall that would be found with a probability of 0.8 at the adjusted level; None if none
        would be.
    """
    if not comparisons:
        return []
    p_values = np.array([shortfall_p_value(c.subgroup, c.others, c.correlation) for c in comparisons])
    tests = multiple_testing.step_down(p_values, _correlate(comparisons, seed), alpha, seed)
    return [
        {
            "metric": c.metric, "class": c.class_name, "value": c.subgroup.value, "others": c.others.value,
            "p": float(p), "worse": bool(p < alpha),
            "detectable_shortfall": detectable_shortfall(c.subgroup, c.others, c.correlation, tests.tail),
        }
        for c, p in zip(comparisons, tests.p_values, strict=True)
    ]  # fmt: skip


def _correlate(comparisons: Sequence[Comparison], seed: int) -> Floats:
    """Return the correlation of the shortfalls, (comparisons, comparisons)."""
    num_groups = comparisons[0].errors.shape[1]
    kept = np.arange(num_groups)
    if num_groups > MAX_CORRELATED_GROUPS:
        kept = np.random.default_rng(seed).choice(num_groups, MAX_CORRELATED_GROUPS, replace=False)
    return correlation_matrix(np.stack([c.errors[1, kept] - c.errors[0, kept] for c in comparisons]))


def _compare_proportions(
    name: str,
    hits: Rows,
    trials: Rows,
    classes: Sequence[str],
    groups: Groups,
    sides: tuple[Rows, Rows],
    columns: Sequence[int],
) -> list[Comparison]:
    """Compare proportions of each class, and their mean; `hits` and `trials` are masks, (images, classes)."""
    masks = [[(hits[:, c], trials[:, c] & side) for c in columns] for side in sides]
    errors = np.array([[group_residuals(*mask, groups) / mask[1].sum() for mask in side] for side in masks])
    comparisons = []
    for i, c in enumerate(columns):
        subgroup, others = (estimate_proportion(*side[i], groups) for side in masks)
        if subgroup is not None and others is not None:
            comparisons.append(Comparison(name, classes[c], subgroup, others, errors[:, i]))
    if len(columns) > 1:
        means = [estimate_mean_proportion(side, groups) for side in masks]
        if means[0] is not None and means[1] is not None:
            comparisons.append(Comparison(name, ALL_CLASSES, means[0], means[1], errors.mean(axis=1)))
    return comparisons


def _compare_aucs(
    metrics: WeightedMetrics, classes: Sequence[str], groups: Groups, sides: tuple[Rows, Rows], columns: Sequence[int]
) -> list[Comparison]:
    """Compare the AUC of each class, and their mean."""
    num_groups = int(groups.max()) + 1
    estimates, cases, errors = [], [], np.empty((2, len(columns), num_groups))
    for side, rows in enumerate(sides):
        truths, scores = ([values[rows, c] for c in columns] for values in (metrics.truth, metrics.scores))
        estimates.append(delong.estimate_aucs(truths, scores, groups[rows]))
        cases.append(np.array([(truth.sum(), (~truth).sum()) for truth in truths]))
        for i, (truth, score) in enumerate(zip(truths, scores, strict=True)):
            errors[side, i] = _auc_errors(truth, score, groups[rows], num_groups)
    curves: list[tuple[str, tuple[int, ...]]] = [(classes[c], (i,)) for i, c in enumerate(columns)]
    if len(columns) > 1:
        curves.append((ALL_CLASSES, tuple(range(len(columns)))))
    comparisons = []
    for name, averaged in curves:
        subgroup, others = (
            MeanAUCEstimate(estimates[side], averaged, tuple(cases[side][list(averaged)].mean(axis=0)))
            for side in range(2)
        )
        comparisons.append(Comparison("auc", name, subgroup, others, errors[:, list(averaged)].mean(axis=1)))
    return comparisons


def _auc_errors(truth: Rows, score: Floats, groups: Groups, num_groups: int) -> Floats:
    """Return the contribution of each group to the error of an AUC, (groups,)."""
    errors = np.empty(len(truth))
    for rows, components in zip((truth, ~truth), delong.structural_components(truth, score), strict=True):
        errors[rows] = (components - components.mean()) / len(components)
    return np.asarray(np.bincount(groups, errors, minlength=num_groups))
