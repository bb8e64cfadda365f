"""Calibration slope and intercept of a score, with intervals for independent and for clustered images.

Logistic recalibration (Cox 1958, doi:10.1093/biomet/45.3-4.562) regresses the outcome on the logit of the score. The
slope is 1 for calibrated scores; below 1 they are too extreme, above 1 not extreme enough. The intercept is that of a
regression with slope 1 (calibration in the large): 0 for calibrated scores, below 0 if they are too high on average;
exp(-intercept) is the factor by which the odds are overstated (Van Calster et al. 2019, doi:10.1186/s12916-019-1466-7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit
from scipy.stats import t

from fadeformer.evaluation.intervals.bootstrap import Interval
from fadeformer.tasks import MIN_SCORE

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]

MAX_ITERATIONS = 100
TOLERANCE = 1e-14  # of the Newton decrement: the square of the last step, in standard errors
ROUNDING_ERROR = 1e-12  # of the log likelihood, relative
MIN_STEP = 1e-6  # fraction of a Newton step
MIN_DETERMINANT = 1e-12  # of the information without a group, relative to its diagonal: below, it is singular


class Recalibration(NamedTuple):
    """Calibration slope and intercept of one class or finding, or their intervals.

    Attributes:
        slope: None without positives or negatives, with equal scores, or if a threshold separates positives and
            negatives: no finite slope maximizes the likelihood.
        intercept: None without positives or without negatives.
    """

    slope: Any
    intercept: Any


def recalibrate(truth: Truth, score: Floats) -> Recalibration:
    """Estimate calibration slope and intercept by maximum likelihood.

    Args:
        truth: True for positives, (images,).
        score: in [0, 1], (images,).
    """
    slope, intercept = _fits(truth, score)
    return Recalibration(slope and slope.value, intercept and intercept.value)


def recalibration_intervals(truth: Truth, score: Floats, groups: NDArray[np.int64], confidence: float) -> Recalibration:
    """Compute the intervals of calibration slope and intercept.

    Variances are cluster-robust (Liang and Zeger 1986, doi:10.1093/biomet/73.1.13) with the jackknife correction for
    few groups (CR3; Bell and McCaffrey 2002, Survey Methodology 28:169-181), and the quantiles are those of Student's t
    with one degree of freedom less than the smaller number of groups with positives or with negatives. The class mix is
    random: the intervals cover other images of the same population.

    Args:
        truth: True for positives, (images,).
        score: in [0, 1], (images,).
        groups: group code (patient or lesion) of each image, integers from 0, (images,).
        confidence: level of the intervals, such as 0.95.

    Returns:
        (low, high) each; None without an estimate, or if the positives, or the negatives, are of one group.
    """
    min_groups = min(len(np.unique(groups[rows])) for rows in (truth, ~truth))
    if min_groups < 2:
        return Recalibration(None, None)
    quantile = float(t.ppf((1 + confidence) / 2, min_groups - 1))
    return Recalibration(*(fit and fit.interval(groups, quantile) for fit in _fits(truth, score)))


@dataclass(frozen=True)
class _Fit:
    """One logistic regression; the last coefficient, divided by `scale`, is the estimate."""

    design: Floats  # (images, parameters)
    residuals: Floats  # outcome minus fitted probability, (images,)
    weights: Floats  # variance of the outcomes, (images,)
    coefficients: Floats  # (parameters,)
    scale: float

    @property
    def value(self) -> float:
        return float(self.coefficients[-1] / self.scale)

    def interval(self, groups: NDArray[np.int64], quantile: float) -> Interval:
        """Return the interval of the estimate; None if one group determines it."""
        half_width = quantile * _standard_error(self, groups) / self.scale
        return (self.value - half_width, self.value + half_width) if math.isfinite(half_width) else None


def _fits(truth: Truth, score: Floats) -> tuple[_Fit | None, _Fit | None]:
    """Return the regressions of slope and intercept; None where the likelihood has no maximum."""
    if truth.all() or not truth.any():
        return None, None
    clipped = np.clip(score, MIN_SCORE, 1 - np.finfo(np.float64).epsneg)
    logits = np.log(clipped) - np.log1p(-clipped)
    ones = np.ones((len(truth), 1))
    intercept = _fit(ones, logits, truth, 1.0)
    if _separates(truth, logits):
        return None, intercept
    center, scale = logits.mean(), float(logits.std())
    return _fit(np.column_stack([ones, (logits - center) / scale]), np.zeros(len(truth)), truth, scale), intercept


def _separates(truth: Truth, logits: Floats) -> bool:
    """Return True if a threshold separates positives and negatives, apart from ties at it, or all scores are equal."""
    positive, negative = logits[truth], logits[~truth]
    return bool(positive.min() >= negative.max() or negative.min() >= positive.max())


def _fit(design: Floats, offset: Floats, truth: Truth, scale: float) -> _Fit:
    """Fit a logistic regression by Newton's method with step halving.

    Args:
        design: covariates, (images, parameters); the likelihood must have a maximum.
        offset: fixed part of the linear predictor, (images,).
        truth: outcomes, (images,).
        scale: of the last covariate.
    """

    def log_likelihood(coefficients: Floats) -> float:
        return float(log_expit(signs * (offset + design @ coefficients)).sum())

    coefficients, signs = np.zeros(design.shape[1]), np.where(truth, 1.0, -1.0)
    value = log_likelihood(coefficients)
    for _ in range(MAX_ITERATIONS):
        probabilities = expit(offset + design @ coefficients)
        residuals, weights = truth - probabilities, probabilities * (1 - probabilities)
        gradient = design.T @ residuals
        step = np.linalg.lstsq((design * weights[:, None]).T @ design, gradient, rcond=None)[0]
        decrement, size = float(gradient @ step), 1.0
        if decrement <= TOLERANCE:
            break
        least = value - ROUNDING_ERROR * max(1.0, -value)
        while (proposed := log_likelihood(coefficients + size * step)) < least and size > MIN_STEP:
            size /= 2
        coefficients, value = coefficients + size * step, proposed
    return _Fit(design, residuals, weights, coefficients, scale)


def _standard_error(fit: _Fit, groups: NDArray[np.int64]) -> float:
    """Return the cluster-robust standard error of the last coefficient; NaN if one group determines it."""
    codes, parameters = np.unique(groups, return_inverse=True)[1], fit.design.shape[1]
    scores = np.stack([np.bincount(codes, fit.residuals * column) for column in fit.design.T], axis=1)
    products = (fit.design[:, :, None] * fit.design[:, None, :]).reshape(len(codes), -1).T
    informations = np.stack([np.bincount(codes, fit.weights * column) for column in products], axis=1)
    informations = informations.reshape(-1, parameters, parameters)
    without = informations.sum(axis=0) - informations  # the information of all other groups
    diagonals = np.diagonal(without, axis1=1, axis2=2).prod(axis=1)
    if not (np.linalg.det(without) > MIN_DETERMINANT * diagonals).all():
        return math.nan
    jackknifed = np.linalg.solve(without, scores[:, :, None])[:, -1, 0]  # the coefficient minus that without the group
    return math.sqrt((len(scores) - 1) / len(scores) * float((jackknifed**2).sum()))
