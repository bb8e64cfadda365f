"""Metrics of every subgroup (age band, sex, view, site, center) and comparisons that find worse subgroups.

Intervals come from bootstrap resamples of all images, comparisons from `fadeformer.evaluation.subgroup_comparisons`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.evaluation import summary
from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.subgroup_comparisons import adjust, compare_subgroup
from fadeformer.evaluation.weighted_metrics import MetricSamples, WeightedMetrics

AGE_COLUMN = "age"
UNKNOWN = "unknown"
MAX_AUTO_VALUES = 12  # distinct values of a column selected by `auto`
MAX_VALUES = 50  # distinct values of a column selected by name


def select_columns(metadata: pd.DataFrame, selection: str | Sequence[str]) -> pd.DataFrame:
    """Select the columns that define subgroups.

    Args:
        metadata: columns of the image index other than split, id, group and labels.
        selection: `auto` (age, and every column with 2 to 12 values), or column names.

    Raises:
        UserError: a column does not exist or has too many values.
    """
    if selection == "auto":
        counts = {name: metadata[name].nunique() for name in metadata.columns}
        return metadata[[name for name, n in counts.items() if (name == AGE_COLUMN and n) or 1 < n <= MAX_AUTO_VALUES]]
    for name in selection:
        if name not in metadata:
            available = ", ".join(metadata.columns) or "none"
            raise UserError(f"params.yaml: evaluate.subgroups: unknown column {name}; available: {available}")
        if name != AGE_COLUMN and (count := metadata[name].nunique()) > MAX_VALUES:
            raise UserError(
                f"params.yaml: evaluate.subgroups: {name} has {count} values; at most {MAX_VALUES} are allowed"
            )
    return metadata[list(selection)]


def assign_subgroups(metadata: pd.DataFrame, age_bands: Sequence[float]) -> dict[str, pd.Series[Any]]:
    """Return the subgroup of each image by column; age bands are named by their first and last year."""
    subgroups = {}
    for name in metadata.columns:
        values = metadata[name]
        if name == AGE_COLUMN:
            values = _assign_age_bands(pd.to_numeric(values, errors="coerce"), age_bands)
        text = values.astype("string").fillna(UNKNOWN)
        order = values.cat.categories if name == AGE_COLUMN else sorted(text[text != UNKNOWN].unique())
        subgroups[str(name)] = text.astype(pd.CategoricalDtype([*map(str, order), UNKNOWN], ordered=True))
    return subgroups


def _assign_age_bands(ages: pd.Series[Any], starts: Sequence[float]) -> pd.Series[Any]:
    edges = [-np.inf, *starts, np.inf]
    bands = [f"{low:g} to {high - 1:g}" for low, high in itertools.pairwise(starts)]
    return pd.cut(ages, edges, right=False, labels=[f"under {starts[0]:g}", *bands, f"{starts[-1]:g} and over"])


class _Subgroup:
    """One subgroup: its column, value, rows (a mask of all images), predictions and metrics."""

    def __init__(self, column: str, value: str, rows: NDArray[np.bool_], predictions: Predictions) -> None:
        self.column, self.value, self.rows = column, value, rows
        self.predictions = predictions.select_rows(rows)
        self.metrics = WeightedMetrics(self.predictions)


def evaluate_subgroups(
    predictions: Predictions, age_bands: Sequence[float], *, n_resamples: int, seed: int, confidence: float
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """Compute all metrics of every subgroup with intervals, and compare them with all other images.

    Args:
        predictions: of one split.
        age_bands: first year of each age band.
        n_resamples: number of bootstrap resamples of the intervals.
        seed: of the bootstrap and of the adjustment of p-values.
        confidence: level of the intervals; a subgroup is worse if p < 1 - confidence.

    Returns:
        The intervals of all images, equal to `summary.confidence_intervals`; and by column and value: `images`,
        `groups`, `overall` and `per_class` (as in `summary.summarize`), `intervals`, and `comparisons` (see
        `subgroup_comparisons.adjust`), which are empty with too few patients or lesions in the subgroup or outside it.
    """
    assignments = assign_subgroups(predictions.subgroups, age_bands)
    subgroups = [
        _Subgroup(column, str(value), (assigned == value).to_numpy(), predictions)
        for column, assigned in assignments.items()
        for value in assigned.cat.categories
        if (assigned == value).any()
    ]
    overall, groups = WeightedMetrics(predictions), bootstrap.encode_groups(predictions.frame["group"])
    overall_samples, subgroup_samples = _resample(overall, subgroups, groups, n_resamples, seed)
    comparisons = [compare_subgroup(overall, predictions.classes, groups, subgroup.rows) for subgroup in subgroups]
    adjusted = iter(adjust(list(itertools.chain.from_iterable(comparisons)), 1 - confidence, seed))
    results: dict[str, dict[str, dict[str, Any]]] = {column: {} for column in assignments}
    for subgroup, samples, own_comparisons in zip(subgroups, subgroup_samples, comparisons, strict=True):
        values, codes = (
            summary.summarize(subgroup.predictions),
            np.unique(groups[subgroup.rows], return_inverse=True)[1],
        )
        bounds = summary.intervals_from_samples(subgroup.metrics, predictions.classes, codes, samples, confidence)
        results[subgroup.column][subgroup.value] = {
            "images": values["images"], "groups": bounds["groups"], "overall": values["overall"],
            "per_class": values["per_class"],
            "intervals": {"overall": bounds["overall"], "per_class": bounds["per_class"]},
            "comparisons": list(itertools.islice(adjusted, len(own_comparisons))),
        }  # fmt: skip
    intervals = summary.intervals_from_samples(overall, predictions.classes, groups, overall_samples, confidence)
    return intervals, results


def _resample(
    overall: WeightedMetrics, subgroups: Sequence[_Subgroup], groups: NDArray[np.int64], n_resamples: int, seed: int
) -> tuple[MetricSamples, list[MetricSamples]]:
    """Compute the bootstrap samples of all metrics, of all images and of each subgroup, from the same resamples."""

    def compute(weights: bootstrap.Weights) -> list[MetricSamples]:
        return [
            overall.compute(weights),
            *(subgroup.metrics.compute(weights[:, subgroup.rows]) for subgroup in subgroups),
        ]

    strata = bootstrap.assign_strata(overall.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may have no image of a subgroup
        chunks = bootstrap.map_resamples(compute, groups, strata, n_resamples, seed)
    overall_samples, *subgroup_samples = (summary.concat_samples(parts) for parts in zip(*chunks, strict=True))
    return overall_samples, subgroup_samples


def underperforming(subgroups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """List the comparisons with a significantly worse subgroup, with `column` and `subgroup` added."""
    return [
        {"column": column, "subgroup": value, **comparison}
        for column, values in subgroups.items()
        for value, subgroup in values.items()
        for comparison in subgroup["comparisons"]
        if comparison["worse"]
    ]
