"""Predictions to numbers with their uncertainty, as nested plain values.

A class or finding without positives or without negatives is left out of means, and named. Macro precision, recall and
F1 are those of scikit-learn with what is undefined counted as 0, as the published results have them. No number is ever
a NaN: what is undefined is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, logit

from fadeformer import delong, resampling
from fadeformer.measures import Measured, Measures
from fadeformer.predictions import Predictions
from fadeformer.proportions import share_interval
from fadeformer.resampling import Interval


def summarise(predictions: Predictions) -> dict[str, Any]:
    """Every number of some predictions.

    Returns:
        `images`, `overall`, `per_class` by class name, and `not_judged`: the classes that lack positives or negatives.
    """
    measures = Measures(predictions)
    found = measures.of(np.ones((1, len(predictions.frame))))
    support = measures.truth.sum(axis=0)
    per_class = {
        name: {
            "support": int(support[c]),
            "prevalence": float(support[c] / len(measures.truth)),
            **{key: _plain(values[0, c]) for key, values in found.per_class.items()},
        }
        for c, name in enumerate(predictions.classes)
    }
    return {
        "images": len(measures.truth),
        "overall": {key: _plain(values[0]) for key, values in found.overall.items()},
        "per_class": per_class,
        "not_judged": [name for name, values in per_class.items() if values["auc"] is None],
    }


def intervals(predictions: Predictions, *, draws: int, seed: int, confidence: float) -> dict[str, Any]:
    """The interval of every number of `summarise`.

    AUCs have DeLong's, proportions Wilson's, all else that of a bootstrap that draws patients or lesions whole, class
    by class: its percentiles; for average precisions, which are too high in samples that repeat images, its spread on
    the scale of log odds (Boyd et al. 2013, doi:10.1007/978-3-642-40994-3_29). The calibration error has none: it is
    too high in every sample, by more than its spread (docs/evaluation.md).

    Args:
        predictions: of one split.
        draws: samples of the bootstrap.
        seed: of the bootstrap.
        confidence: such as 0.95.

    Returns:
        `groups`, how many patients or lesions there are, and `overall` and `per_class` with (low, high), or None where
        there is none, as of a perfect number by bootstrap, whose samples are all alike.
    """
    measures = Measures(predictions)
    groups = resampling.group_numbers(predictions.frame["group"])
    stratum = resampling.strata(measures.truth, groups)
    count = len(stratum)
    parts = resampling.over_samples(measures.of, groups, stratum, draws, seed)
    point = measures.of(np.ones((1, len(groups))))
    overall = {
        name: _bootstrapped(name, float(point.overall[name][0]), _joined(parts, "overall", name), count, confidence)
        for name in parts[0].overall
    }
    per_class: dict[str, dict[str, Interval]] = {name: {} for name in predictions.classes}
    for key in parts[0].per_class:
        samples = _joined(parts, "per_class", key)
        for c, name in enumerate(predictions.classes):
            value = float(point.per_class[key][0, c])
            per_class[name][key] = _bootstrapped(key, value, samples[:, c], count, confidence)
    if measures.exclusive:
        every = np.ones(len(groups), dtype=bool)
        overall["accuracy"] = share_interval(measures.right.astype(bool), every, groups, confidence)
    for c, name in enumerate(predictions.classes):
        truth, decided = measures.truth[:, c], measures.decided[:, c]
        shares = {"recall": (decided, truth), "specificity": (~decided, ~truth), "precision": (truth, decided)}
        for key, (hits, trials) in shares.items():
            per_class[name][key] = share_interval(hits, trials, groups, confidence)
        per_class[name]["auc"] = None
    judged = np.flatnonzero(measures.judged)
    overall["auc"] = None
    if len(judged):
        found = delong.aucs([measures.truth[:, c] for c in judged], [measures.scores[:, c] for c in judged], groups)
        for place, row in enumerate(judged):
            per_class[predictions.classes[row]]["auc"] = delong.interval(found, [place], confidence)
        exclusive_two = measures.exclusive and len(predictions.classes) == 2
        averaged = [len(judged) - 1] if exclusive_two else list(range(len(judged)))
        overall["auc"] = delong.interval(found, averaged, confidence)
    return {"groups": count, "overall": overall, "per_class": per_class}


def told(value: float | None, interval: Interval) -> str:
    """A number with its interval, to the digits that its width allows: 0.97 (0.95 to 0.98)."""
    if value is None:
        return "undefined"
    if interval is None:
        return f"{value:.4f}"
    width = interval[1] - interval[0]
    digits = 4 if width < 0.001 else max(2, math.ceil(-math.log10(width)))
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def published_results(test: Mapping[str, Any], history: pd.DataFrame, config: Mapping[str, Any]) -> dict[str, Any]:
    """The published `results.json`, by its keys.

    Args:
        test: of `summarise`.
        history: one row per epoch.
        config: what the run was made with.
    """
    names = ("loss", "accuracy", "precision", "recall", "f1", "auc")
    columns = {
        "train_losses": "train_loss", "val_losses": "val_loss",
        "train_accuracies": "train_accuracy", "val_accuracies": "val_accuracy",
    }  # fmt: skip
    return {
        **{f"test_{name}": test["overall"][name] for name in names},
        **{key: history[column].tolist() for key, column in columns.items()},
        "config": config,
    }


def _joined(parts: list[Measured], kind: str, name: str) -> NDArray[np.float64]:
    return np.concatenate([getattr(part, kind)[name] for part in parts])


def _bootstrapped(name: str, value: float, samples: NDArray[np.float64], groups: int, confidence: float) -> Interval:
    bounds = resampling.percentiles(samples, groups, confidence)
    if bounds is None or name == "calibration_error" or np.ptp(samples[np.isfinite(samples)]) == 0:
        return None
    if name.startswith("average_precision") and 0 < value < 1:
        inside = samples[(samples > 0) & (samples < 1)]
        half = resampling.quantile(groups, confidence) * logit(inside).std(ddof=1) if len(inside) > 1 else math.inf
        return float(expit(logit(value) - half)), float(expit(logit(value) + half))
    return bounds


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
