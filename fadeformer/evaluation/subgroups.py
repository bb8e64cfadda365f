"""Every measure of every subgroup (age band, sex, view, site, centre), and where a subgroup is worse than the whole.

A subgroup is compared with the whole by measures that do not follow from how common its classes are: AUC, sensitivity
and specificity of each class, and their means over the classes that the subgroup can judge. Both are measured on the
same bootstrap samples, so that the comparison is paired. The largest of all standardised shortfalls in a sample, of its
deviation from what was found, tells what chance alone brings forth among as many comparisons (Westfall and Young 1993,
ISBN 978-0-471-55761-6; the single-step maxT). The spread of a share is at least what the whole's share would give so
few patients: a bootstrap takes none of five for certain.
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
MAX_AUTO_VALUES = 12  # of a column that is taken without being named
MAX_VALUES = 50  # of one that is named
MIN_GROUPS = 20  # patients, lesions or single images in a subgroup that is compared with the whole
MIN_CASES = 10  # positives, and negatives, of what is compared
COMPARED_METRICS = ("auc", "recall", "specificity")


def select_columns(known: pd.DataFrame, wanted: str | Sequence[str]) -> pd.DataFrame:
    """The columns that images are divided by.

    Args:
        known: what is known of the images beside split, id, group and labels.
        wanted: `auto` (age, and every column with 2 to 12 values), or names.

    Raises:
        UserError: a name is of no column, or of one with too many values.
    """
    if wanted == "auto":
        counts = {name: known[name].nunique() for name in known.columns}
        return known[[name for name, n in counts.items() if (name == AGE_COLUMN and n) or 1 < n <= MAX_AUTO_VALUES]]
    for name in wanted:
        if name not in known:
            there = ", ".join(known.columns) or "none"
            raise UserError(f"params.yaml: evaluate.subgroups names {name}, but of these images is known: {there}")
        if name != AGE_COLUMN and (count := known[name].nunique()) > MAX_VALUES:
            raise UserError(f"params.yaml: evaluate.subgroups: {name} has {count} values, too many to be subgroups")
    return known[list(wanted)]


def assign_subgroups(known: pd.DataFrame, age_bands: Sequence[float]) -> dict[str, pd.Series[Any]]:
    """The subgroup of each image, by column; ages in bands, named by their first and last year."""
    found = {}
    for name in known.columns:
        values = known[name]
        if name == AGE_COLUMN:
            values = _assign_age_bands(pd.to_numeric(values, errors="coerce"), age_bands)
        text = values.astype("string").fillna(UNKNOWN)
        order = values.cat.categories if name == AGE_COLUMN else sorted(text[text != UNKNOWN].unique())
        found[str(name)] = text.astype(pd.CategoricalDtype([*map(str, order), UNKNOWN], ordered=True))
    return found


def _assign_age_bands(ages: pd.Series[Any], first: Sequence[float]) -> pd.Series[Any]:
    edges = [-np.inf, *first, np.inf]
    bands = [f"{low:g} to {high - 1:g}" for low, high in itertools.pairwise(first)]
    return pd.cut(ages, edges, right=False, labels=[f"under {first[0]:g}", *bands, f"{first[-1]:g} and over"])


def evaluate_subgroups(
    predictions: Predictions, age_bands: Sequence[float], *, n_resamples: int, seed: int, confidence: float
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """Every number of every subgroup with its interval, and the comparisons with the whole.

    Args:
        predictions: of one split.
        age_bands: first year of each.
        n_resamples: samples of the bootstrap.
        seed: of the bootstrap.
        confidence: of the intervals; a subgroup is worse where p is below 1 less that.

    Returns:
        The intervals of the whole, as `summary.intervals` gives them, from the same samples; and by column and value:
        `images`, `groups`, `overall` and `per_class` (as `summary.summarise`), `intervals`, and `compared`, a list of
        `measure`, `class`, `value`, `whole` (on the same classes), `p` (adjusted for all comparisons), `worse`. A
        subgroup of fewer than 20 patients or lesions is not compared with the whole.
    """
    divisions = assign_subgroups(predictions.subgroups, age_bands)
    cells = [
        (column, str(value), (of == value).to_numpy())
        for column, of in divisions.items()
        for value in of.cat.categories
        if (of == value).any()
    ]
    whole, groups = WeightedMetrics(predictions), bootstrap.encode_groups(predictions.frame["group"])
    parts = [predictions.select_rows(rows) for _, _, rows in cells]
    measures = [WeightedMetrics(part) for part in parts]

    def measure(weights: bootstrap.Weights) -> list[MetricSamples]:
        of_parts = (of.compute(weights[:, rows]) for of, (_, _, rows) in zip(measures, cells, strict=True))
        return [whole.compute(weights), *of_parts]

    stratum = bootstrap.assign_strata(whole.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):  # a sample may have no image of a subgroup
        sampled = bootstrap.map_resamples(measure, groups, stratum, n_resamples, seed)
    of_whole, *of_parts = (summary.concat_samples(some) for some in zip(*sampled, strict=True))
    once = whole.compute(np.ones((1, len(groups))))
    found: dict[str, dict[str, dict[str, Any]]] = {column: {} for column in divisions}
    tests: list[_SubgroupTest] = []
    for (column, value, rows), part, of, samples in zip(cells, parts, measures, of_parts, strict=True):
        of_part = np.unique(groups[rows], return_inverse=True)[1]
        count = int(of_part.max()) + 1
        told = summary.summarize(part)
        bounds = summary.intervals_from_samples(of, predictions.classes, of_part, samples, confidence)
        compared: list[dict[str, Any]] = []
        if count >= MIN_GROUPS and len(part.frame) < len(predictions.frame):
            point = of.compute(np.ones((1, int(rows.sum()))))
            for test in _build_tests(predictions.classes, of, of_part, (point, once), (samples, of_whole)):
                tests.append(test)
                compared.append(test.result)
        found[column][value] = {
            "images": told["images"], "groups": count, "overall": told["overall"], "per_class": told["per_class"],
            "intervals": {"overall": bounds["overall"], "per_class": bounds["per_class"]}, "comparisons": compared,
        }  # fmt: skip
    _adjust_p_values(tests, 1 - confidence)
    return summary.intervals_from_samples(whole, predictions.classes, groups, of_whole, confidence), found


def underperforming(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The comparisons of `compare` in which a subgroup is worse beyond chance, with `column` and `subgroup`."""
    return [
        {"column": column, "subgroup": value, **one}
        for column, values in found.items()
        for value, of in values.items()
        for one in of["comparisons"]
        if one["worse"]
    ]


class _SubgroupTest:
    """A shortfall (whole less subgroup), its samples and the least variance that they have; what is told of it."""

    def __init__(self, measure: str, of_class: str, values: tuple[float, float], samples: Floats, least: float) -> None:
        value, whole = values
        self.shortfall, self.samples, self.min_variance = whole - value, samples, least
        self.result: dict[str, Any] = {
            "metric": measure, "class": of_class, "value": value, "overall": whole, "p": None, "worse": False
        }  # fmt: skip


def _build_tests(
    classes: Sequence[str],
    of: WeightedMetrics,
    groups: NDArray[np.int64],
    points: tuple[MetricSamples, MetricSamples],
    samples: tuple[MetricSamples, MetricSamples],
) -> list[_SubgroupTest]:
    """Of a subgroup; points and samples are its own and those of the whole."""
    cases = {"recall": of.truth, "specificity": ~of.truth}
    enough = {key: truth.sum(axis=0) >= MIN_CASES for key, truth in cases.items()}
    enough["auc"] = enough["recall"] & enough["specificity"]
    shown = [len(classes) - 1] if of.is_exclusive and len(classes) == 2 else list(range(len(classes)))
    found = []
    for key in COMPARED_METRICS:
        inside = [c for c in shown if enough[key][c]]
        if not inside:
            continue
        value, whole = (point.per_class[key][0, inside] for point in points)
        of_part, of_whole = (part.per_class[key][:, inside] for part in samples)
        least = np.zeros(len(inside))
        if key in cases:
            patients = np.array([len(np.unique(groups[cases[key][:, c]])) for c in inside])
            least = whole * (1 - whole) / patients
        for place, c in enumerate(inside):
            values = float(value[place]), float(whole[place])
            found.append(
                _SubgroupTest(key, classes[c], values, of_whole[:, place] - of_part[:, place], float(least[place]))
            )
        if len(inside) > 1:
            means = float(value.mean()), float(whole.mean())
            shortfalls = of_whole.mean(axis=1) - of_part.mean(axis=1)
            found.append(_SubgroupTest(key, ALL_CLASSES, means, shortfalls, float(least.sum() / len(inside) ** 2)))
    return found


def _adjust_p_values(tests: list[_SubgroupTest], level: float) -> None:
    """Sets p and verdict of each test; without a spread, or with too few samples that are defined, it has none."""
    usable = []
    for test in tests:
        defined = np.isfinite(test.samples)
        if defined.mean() < MIN_DEFINED_FRACTION:
            continue
        spread = math.sqrt(max(float(np.var(test.samples[defined], ddof=1)), test.min_variance))
        if spread > 0:
            deviation = np.where(defined, (test.samples - test.shortfall) / spread, -np.inf)
            usable.append((test, test.shortfall / spread, deviation))
    if not usable:
        return
    largest: Floats = np.stack([deviation for _, _, deviation in usable]).max(axis=0)  # of each sample
    for test, standardised, _ in usable:
        test.result["p"] = float((1 + (largest >= standardised).sum()) / (1 + len(largest)))
        test.result["worse"] = test.result["p"] < level
