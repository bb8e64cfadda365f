"""Pointwise bootstrap confidence bands of ROC and precision-recall curves.

The curve of each resample is evaluated at fixed false positive rates, or fixed sensitivities, and the band is the
interval of these values (vertical averaging, Fawcett 2006, doi:10.1016/j.patrec.2005.10.010).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.metrics import curve_classes
from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import one_versus_rest

Floats = NDArray[np.float64]

NUM_RESAMPLES = 500  # enough for a figure
CURVE_GRID = np.linspace(0, 1, 101)
MAX_THRESHOLDS = 200  # per curve and resample, at positives, and as many at negatives


def compute_bands(predictions: Predictions, *, seed: int, confidence: float) -> pd.DataFrame:
    """Compute the bands of the curves of all evaluable classes.

    Args:
        predictions: of one split.
        seed: of the bootstrap.
        confidence: level of the interval at each point.

    Returns:
        Table with columns class, curve (roc or pr), x (false positive rate or sensitivity), low and high.
    """
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    groups = bootstrap.encode_groups(predictions.frame["group"])
    strata = bootstrap.assign_strata(truth, groups)
    classes = [c for c in curve_classes(predictions) if truth[:, c].any() and not truth[:, c].all()]
    curves = [_Curve(truth[:, c], predictions.scores[:, c]) for c in classes]
    chunks = bootstrap.map_resamples(
        lambda weights: [curve.evaluate(weights) for curve in curves], groups, strata, NUM_RESAMPLES, seed
    )
    tables = [pd.DataFrame({"class": pd.Series(dtype="str"), "curve": "", "x": 0.0, "low": 0.0, "high": 0.0})]
    for index, c in enumerate(classes):
        for kind, name in enumerate(("roc", "pr")):
            values = np.concatenate([chunk[index][kind] for chunk in chunks])
            bounds = [bootstrap.percentile_interval(column, len(strata), confidence) for column in values.T]
            defined = [(x, *bound) for x, bound in zip(CURVE_GRID, bounds, strict=True) if bound is not None]
            rows = pd.DataFrame(defined, columns=["x", "low", "high"], dtype=float)  # none for a very small test set
            tables.append(rows.assign(**{"class": predictions.classes[c], "curve": name}))
    return pd.concat(tables[1:] or tables, ignore_index=True)[["class", "curve", "x", "low", "high"]]


class _Curve:
    """Images sorted by decreasing score, counted between a limited number of thresholds."""

    def __init__(self, truth: NDArray[np.bool_], score: Floats) -> None:
        self.order = np.argsort(-score, kind="stable")
        positive, score = truth[self.order], score[self.order]
        ends = np.flatnonzero(np.append(score[1:] < score[:-1], True))  # the last image of each distinct score
        ranks = [np.flatnonzero(side) for side in (positive, ~positive)]
        candidates = np.concatenate([rank[np.linspace(0, len(rank) - 1, MAX_THRESHOLDS).astype(int)] for rank in ranks])
        thresholds = np.unique(np.append(ends[np.searchsorted(ends, candidates)], len(score) - 1))
        self.starts = np.append(0, thresholds[:-1] + 1)
        self.positive = positive

    def evaluate(self, weights: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
        """Return sensitivity at fixed FPR and precision at fixed sensitivity, both (samples, points)."""
        ordered = np.take(weights, self.order, axis=1)
        tp = np.cumsum(np.add.reduceat(ordered * self.positive, self.starts, axis=1), axis=1, dtype=np.float64)
        fp = np.cumsum(np.add.reduceat(ordered * ~self.positive, self.starts, axis=1), axis=1, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivity, fpr = tp / tp[:, -1:], fp / fp[:, -1:]
            precision = tp / (tp + fp)
        roc, pr = np.full((2, len(weights), len(CURVE_GRID)), np.nan)
        for row, (row_sensitivity, row_fpr) in enumerate(zip(sensitivity, fpr, strict=True)):
            if np.isfinite(row_sensitivity[-1]) and np.isfinite(row_fpr[-1]):
                roc[row] = np.interp(CURVE_GRID, np.append(0, row_fpr), np.append(0, row_sensitivity))
                index = np.searchsorted(row_sensitivity, CURVE_GRID, side="left").clip(max=len(row_sensitivity) - 1)
                pr[row] = precision[row, index]
        return roc, pr


def read(path: Path) -> pd.DataFrame:
    """Read the table of `compute_bands` from a CSV file; class names such as 0 or NA stay text."""
    numbers = ("x", "low", "high")
    types = {"class": str, "curve": str, **dict.fromkeys(numbers, float)}
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=dict.fromkeys(numbers, ""))
