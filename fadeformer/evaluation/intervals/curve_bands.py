"""How far ROC and precision-recall curves may lie from the truth: pointwise bands from bootstrap samples.

A sample's curve is read at fixed false positive rates, or at fixed sensitivities; the band is the interval of what was
read (Fawcett 2006, doi:10.1016/j.patrec.2005.10.010, calls it vertical averaging).
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

NUM_RESAMPLES = 500  # samples: a band is looked at, not read
CURVE_GRID = np.linspace(0, 1, 101)
MAX_THRESHOLDS = 200  # of a curve in each sample, by positives, and as many by negatives


def compute_bands(predictions: Predictions, *, seed: int, confidence: float) -> pd.DataFrame:
    """Bands of every curve that can be drawn.

    Args:
        predictions: of one split.
        seed: of the bootstrap.
        confidence: of the interval at each point.

    Returns:
        Columns class, curve (roc or pr), x (false positive rate, or sensitivity), low and high.
    """
    truth = one_versus_rest(predictions.labels, len(predictions.classes), predictions.task)
    groups = bootstrap.encode_groups(predictions.frame["group"])
    stratum = bootstrap.assign_strata(truth, groups)
    shown = [c for c in curve_classes(predictions) if truth[:, c].any() and not truth[:, c].all()]
    curves = [_Curve(truth[:, c], predictions.scores[:, c]) for c in shown]
    parts = bootstrap.map_resamples(
        lambda weights: [curve.evaluate(weights) for curve in curves], groups, stratum, NUM_RESAMPLES, seed
    )
    tables = [pd.DataFrame({"class": pd.Series(dtype="str"), "curve": "", "x": 0.0, "low": 0.0, "high": 0.0})]
    for place, c in enumerate(shown):
        for kind, name in enumerate(("roc", "pr")):
            read = np.concatenate([part[place][kind] for part in parts])
            bounds = [bootstrap.percentile_interval(column, len(stratum), confidence) for column in read.T]
            known = [(x, *bound) for x, bound in zip(CURVE_GRID, bounds, strict=True) if bound is not None]
            rows = pd.DataFrame(known, columns=["x", "low", "high"])
            tables.append(rows.assign(**{"class": predictions.classes[c], "curve": name}))
    return pd.concat(tables[1:] or tables, ignore_index=True)[["class", "curve", "x", "low", "high"]]


class _Curve:
    """Images in falling order of score, counted between a few thresholds."""

    def __init__(self, truth: NDArray[np.bool_], score: Floats) -> None:
        self.order = np.argsort(-score, kind="stable")
        positive, falling = truth[self.order], score[self.order]
        ends = np.flatnonzero(np.append(falling[1:] < falling[:-1], True))  # the last image of each score
        ranks = [np.flatnonzero(side) for side in (positive, ~positive)]
        wanted = np.concatenate([rank[np.linspace(0, len(rank) - 1, MAX_THRESHOLDS).astype(int)] for rank in ranks])
        chosen = np.unique(np.append(ends[np.searchsorted(ends, wanted)], len(falling) - 1))
        self.starts = np.append(0, chosen[:-1] + 1)
        self.positive = positive

    def evaluate(self, weights: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
        """Sensitivity by false positive rate, and precision by sensitivity, both (samples, points)."""
        drawn = np.take(weights, self.order, axis=1)
        true = np.cumsum(np.add.reduceat(drawn * self.positive, self.starts, axis=1), axis=1, dtype=np.float64)
        false = np.cumsum(np.add.reduceat(drawn * ~self.positive, self.starts, axis=1), axis=1, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivity, fpr = true / true[:, -1:], false / false[:, -1:]
            precision = true / (true + false)
        roc, pr = np.full((2, len(weights), len(CURVE_GRID)), np.nan)
        for row, (of_true, of_false) in enumerate(zip(sensitivity, fpr, strict=True)):
            if np.isfinite(of_true[-1]) and np.isfinite(of_false[-1]):
                roc[row] = np.interp(CURVE_GRID, np.append(0, of_false), np.append(0, of_true))
                reached = np.searchsorted(of_true, CURVE_GRID, side="left").clip(max=len(of_true) - 1)
                pr[row] = precision[row, reached]
        return roc, pr


def read(path: Path) -> pd.DataFrame:
    """What `bands` gave, from a CSV; classes may be called 0, or NA."""
    numbers = dict.fromkeys(("x", "low", "high"), "")
    return pd.read_csv(path, dtype={"class": str}, keep_default_na=False, na_values=numbers)
