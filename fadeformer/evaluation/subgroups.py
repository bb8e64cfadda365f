"""Metrics of every subgroup (age band, sex, view, site, center) and tests for worse performance.

A subgroup is compared with all images by metrics that do not depend on prevalence: AUC, sensitivity and specificity of
each class, and their means over the classes that are evaluable in the subgroup. Subgroup and overall values come from
the same bootstrap resamples, so the comparison is paired. P-values are adjusted for all comparisons by the single-step
maxT procedure (Westfall and Young 1993, ISBN 978-0-471-55761-6). The variance of a proportion is at least the binomial
variance of the overall proportion for the number of patients: the bootstrap gives 0 of 5 a variance of zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.errors import UserError
from fadeformer.evaluation import summary
from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.intervals.bootstrap import MIN_DEFINED_FRACTION
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_metrics import MetricSamples, WeightedMetrics

Floats = NDArray[np.float64]

AGE_COLUMN = "age"
UNKNOWN = "unknown"
ALL_CLASSES = "macro average"
MAX_AUTO_VALUES = 12  # distinct values of a column selected by `auto`
MAX_VALUES = 50  # distinct values of a column selected by name
MIN_GROUPS = 20  # patients, lesions or single images in a compared subgroup
MIN_CASES = 10  # positives for sensitivity, negatives for specificity, both for AUC
COMPARED_METRICS = ("auc", "recall", "specificity")


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
    """Compute all metrics of every subgroup with intervals, and compare them with all images.

    Args:
        predictions: of one split.
        age_bands: first year of each age band.
        n_resamples: number of bootstrap resamples.
        seed: of the bootstrap.
        confidence: level of the intervals; a subgroup is worse if p < 1 - confidence.

    Returns:
        The intervals of all images, equal to `summary.confidence_intervals`; and by column and value: `images`,
        `groups`, `overall` and `per_class` (as in `summary.summarize`), `intervals`, and `comparisons`, a list of
        `metric`, `class`, `value`, `overall` (on the same classes), `p` (adjusted for all comparisons) and `worse`.
        Subgroups of fewer than `MIN_GROUPS` patients or lesions are not compared.
    """
    assignments = assign_subgroups(predictions.subgroups, age_bands)
    subgroups = [
        _Subgroup(column, str(value), (assigned == value).to_numpy(), predictions)
        for column, assigned in assignments.items()
        for value in assigned.cat.categories
        if (assigned == value).any()
    ]
    overall, groups = WeightedMetrics(predictions), bootstrap.encode_groups(predictions.frame["group"])

    def compute(weights: bootstrap.Weights) -> list[MetricSamples]:
        return [
            overall.compute(weights),
            *(subgroup.metrics.compute(weights[:, subgroup.rows]) for subgroup in subgroups),
        ]

    strata = bootstrap.assign_strata(overall.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may have no image of a subgroup
        chunks = bootstrap.map_resamples(compute, groups, strata, n_resamples, seed)
    overall_samples, *subgroup_samples = (summary.concat_samples(parts) for parts in zip(*chunks, strict=True))
    overall_point = overall.compute(np.ones((1, len(groups))))
    results: dict[str, dict[str, dict[str, Any]]] = {column: {} for column in assignments}
    tests: list[_SubgroupTest] = []
    for subgroup, samples in zip(subgroups, subgroup_samples, strict=True):
        metrics, rows = subgroup.metrics, subgroup.rows
        subgroup_groups = np.unique(groups[rows], return_inverse=True)[1]
        num_groups = int(subgroup_groups.max()) + 1
        values = summary.summarize(subgroup.predictions)
        bounds = summary.intervals_from_samples(metrics, predictions.classes, subgroup_groups, samples, confidence)
        subgroup_tests: list[_SubgroupTest] = []
        if num_groups >= MIN_GROUPS and len(subgroup.predictions.frame) < len(predictions.frame):
            point = metrics.compute(np.ones((1, int(rows.sum()))))
            subgroup_tests = _build_tests(
                predictions.classes, metrics, subgroup_groups, (point, overall_point), (samples, overall_samples)
            )
        tests += subgroup_tests
        results[subgroup.column][subgroup.value] = {
            "images": values["images"], "groups": num_groups, "overall": values["overall"],
            "per_class": values["per_class"],
            "intervals": {"overall": bounds["overall"], "per_class": bounds["per_class"]},
            "comparisons": [test.result for test in subgroup_tests],
        }  # fmt: skip
    _adjust_p_values(tests, 1 - confidence)
    intervals = summary.intervals_from_samples(overall, predictions.classes, groups, overall_samples, confidence)
    return intervals, results


def underperforming(subgroups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """List the comparisons with a significantly worse subgroup, with `column` and `subgroup` added."""
    return [
        {"column": column, "subgroup": value, **comparison}
        for column, values in subgroups.items()
        for value, subgroup in values.items()
        for comparison in subgroup["comparisons"]
        if comparison["worse"]
    ]


class _SubgroupTest:
    """Test of one shortfall (overall minus subgroup): its resamples, the lower bound of their variance, the result."""

    def __init__(
        self, metric: str, class_name: str, values: tuple[float, float], samples: Floats, min_variance: float
    ) -> None:
        value, overall = values
        self.shortfall, self.samples, self.min_variance = overall - value, samples, min_variance
        self.result: dict[str, Any] = {
            "metric": metric, "class": class_name, "value": value, "overall": overall, "p": None, "worse": False
        }  # fmt: skip


def _build_tests(
    classes: Sequence[str],
    metrics: WeightedMetrics,
    groups: NDArray[np.int64],
    points: tuple[MetricSamples, MetricSamples],
    samples: tuple[MetricSamples, MetricSamples],
) -> list[_SubgroupTest]:
    """Build the tests of one subgroup; points and samples are (subgroup, all images)."""
    cases = {"recall": metrics.truth, "specificity": ~metrics.truth}
    has_enough = {name: truth.sum(axis=0) >= MIN_CASES for name, truth in cases.items()}
    has_enough["auc"] = has_enough["recall"] & has_enough["specificity"]
    candidates = [len(classes) - 1] if metrics.is_exclusive and len(classes) == 2 else list(range(len(classes)))
    tests = []
    for name in COMPARED_METRICS:
        columns = [c for c in candidates if has_enough[name][c]]
        if not columns:
            continue
        value, overall = (point.per_class[name][0, columns] for point in points)
        value_samples, overall_samples = (sample.per_class[name][:, columns] for sample in samples)
        min_variance = np.zeros(len(columns))
        if name in cases:
            patients = np.array([len(np.unique(groups[cases[name][:, c]])) for c in columns])
            min_variance = overall * (1 - overall) / patients
        for i, c in enumerate(columns):
            shortfalls = overall_samples[:, i] - value_samples[:, i]
            point = float(value[i]), float(overall[i])
            tests.append(_SubgroupTest(name, classes[c], point, shortfalls, float(min_variance[i])))
        if len(columns) > 1:
            means = float(value.mean()), float(overall.mean())
            shortfalls = overall_samples.mean(axis=1) - value_samples.mean(axis=1)
            variance_of_mean = float(min_variance.sum() / len(columns) ** 2)
            tests.append(_SubgroupTest(name, ALL_CLASSES, means, shortfalls, variance_of_mean))
    return tests


def _adjust_p_values(tests: list[_SubgroupTest], alpha: float) -> None:
    """Set `p` and `worse` of each test; `p` stays None without variance or with too few defined resamples."""
    usable = []
    for test in tests:
        defined = np.isfinite(test.samples)
        if defined.mean() < MIN_DEFINED_FRACTION:
            continue
        std = math.sqrt(max(float(np.var(test.samples[defined], ddof=1)), test.min_variance))
        if std > 0:
            deviations = np.where(defined, (test.samples - test.shortfall) / std, -np.inf)
            usable.append((test, test.shortfall / std, deviations))
    if not usable:
        return
    largest: Floats = np.stack([deviations for _, _, deviations in usable]).max(axis=0)  # per resample
    for test, standardized, _ in usable:
        test.result["p"] = float((1 + (largest >= standardized).sum()) / (1 + len(largest)))
        test.result["worse"] = test.result["p"] < alpha
