"""Subgroup comparisons: false findings without a worse subgroup, and the share of worse sites that is found.

    python benchmarks/simulations/subgroups.py [--sets 1000] [--power-sets 300] [--old-sets 100]

Test sets of equally large sites, with sex (2 values) and age (five bands) as further columns. The AUC is 0.90 in every
subgroup; in some rows it is lower at one site. `false` counts the sets in which a subgroup is reported as worse that is
not (at most 5 % are allowed), `site` those in which that one site is reported, `by AUC` those in which its AUC is.
`smallest detectable` is the median of `detectable_shortfall` of the AUC of that site; in the last row of a test set the
site is worse by exactly this, so that it should be found by AUC in 80 %. `old` is the earlier procedure: subgroups
against all images, standardized by the bootstrap, single-step maxT. In parentheses the Monte Carlo standard error.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from fadeformer.evaluation import predictions, subgroup_comparisons, subgroups
from fadeformer.evaluation.intervals import bootstrap
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.summary import concat_samples
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.tasks import TASKS

AGE_BANDS = (0, 18, 40, 60, 80)
ALPHA = 0.05
GOOD, BAD = 0.90, 0.66
PREVALENCE = 0.3  # of the second of two classes, or of the second and third of three together
WORSE_SITE = "a"
IMAGES_PER_PATIENT = 5
PATIENT_SHARE = 0.5  # of the variance of a score that is common to the images of a patient
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Design:
    """Kind of test set."""

    name: str
    classes: int
    sites: int
    images: int  # of each site
    in_patients: bool = False


DESIGNS = (
    Design("2 classes, 4 sites of 100", 2, 4, 100),
    Design("2 classes, 3 sites of 100", 2, 3, 100),
    Design("3 classes, 4 sites of 100", 3, 4, 100),
    Design("2 classes, 4 sites of 100, patients of 5 images", 2, 4, 100, in_patients=True),
    Design("2 classes, 4 sites of 200, patients of 5 images", 2, 4, 200, in_patients=True),
)


def separation(design: Design, auc: float) -> float:
    """Distance of the class means, in standard deviations, at which the (mean) AUC has the given value."""
    if design.classes == 2:
        return math.sqrt(2) * float(ndtri(auc))
    random = np.random.default_rng(0)
    labels, noise = random.choice(3, 60_000, p=class_shares(3)), random.normal(size=(60_000, 3))

    def excess(distance: float) -> float:
        logits = distance * np.eye(3)[labels] + noise
        table = build(logits, labels, None, pd.DataFrame(index=np.arange(len(labels))))
        return float(WeightedMetrics(table).compute_areas(np.ones((1, len(labels)))).overall["auc"][0]) - auc

    return brentq(excess, 0.1, 6, xtol=1e-3)


def class_shares(classes: int) -> list[float]:
    return [1 - PREVALENCE, PREVALENCE] if classes == 2 else [1 - PREVALENCE, PREVALENCE / 2, PREVALENCE / 2]


def build(logits: FloatArray, labels: NDArray[np.int64], group: list[str] | None, columns: pd.DataFrame) -> Predictions:
    task = TASKS["multi-class"]
    index = pd.DataFrame({"split": "test", "id": np.arange(len(labels)).astype(str), "group": group})
    classes = tuple(f"class {c}" for c in range(logits.shape[1]))
    return predictions.build_predictions(
        index, labels[:, None], task.probabilities(logits), task, classes, subgroups=columns
    )


def sample(design: Design, distances: tuple[float, float], seed: int) -> Predictions:
    """Sample a test set; `distances` of the class means are those of the worse site and of the others."""
    random, count = np.random.default_rng(seed), design.sites * design.images
    per_patient = IMAGES_PER_PATIENT if design.in_patients else 1
    patients = count // per_patient
    patient = np.arange(count) // per_patient
    site = np.array(list("abcd"))[np.arange(patients) * design.sites // patients]
    columns = pd.DataFrame(
        {"site": site, "sex": random.choice(["F", "M"], patients), "age": random.integers(10, 90, patients)}
    )
    columns = columns.iloc[patient].reset_index(drop=True)
    labels = random.choice(design.classes, count, p=class_shares(design.classes))
    distance = np.where(columns["site"] == WORSE_SITE, *distances)
    noise = random.normal(size=(count, design.classes))
    if design.in_patients:
        common = random.normal(size=(patients, design.classes))[patient]
        noise = math.sqrt(PATIENT_SHARE) * common + math.sqrt(1 - PATIENT_SHARE) * noise
    if design.classes == 2:  # log odds of the classes in the better sites, so that decisions at 0.5 are sensible
        score = distance * (labels - 0.5) + noise[:, 1]
        logits = np.stack([np.zeros(count), distances[1] * score + math.log(PREVALENCE / (1 - PREVALENCE))], axis=1)
    else:
        logits = distance[:, None] * np.eye(design.classes)[labels] + noise
    group = [f"patient {i}" for i in patient] if design.in_patients else None
    return build(logits, labels, group, columns)


def compare(table: Predictions, seed: int) -> list[dict]:
    """Comparisons of all subgroups, with `subgroup` added."""
    metrics, groups = WeightedMetrics(table), bootstrap.encode_groups(table.frame["group"])
    names, comparisons = [], []
    for assigned in subgroups.assign_subgroups(table.subgroups, AGE_BANDS).values():
        for value in assigned.cat.categories:
            rows = (assigned == value).to_numpy()
            if rows.any():
                comparisons.append(subgroup_comparisons.compare_subgroup(metrics, table.classes, groups, rows))
                names += [value] * len(comparisons[-1])
    results = subgroup_comparisons.adjust(list(itertools.chain.from_iterable(comparisons)), ALPHA, seed)
    return [{"subgroup": name, **result} for name, result in zip(names, results, strict=True)]


def compare_old(table: Predictions, seed: int, n_resamples: int) -> list[dict]:
    """The earlier procedure: `overall - subgroup`, standardized by the bootstrap, and the largest of all of them."""
    overall, groups = WeightedMetrics(table), bootstrap.encode_groups(table.frame["group"])
    sides = [
        (value, (assigned == value).to_numpy())
        for assigned in subgroups.assign_subgroups(table.subgroups, AGE_BANDS).values()
        for value in assigned.cat.categories
        if (assigned == value).any()
    ]
    parts = [WeightedMetrics(table.select_rows(rows)) for _, rows in sides]
    strata = bootstrap.assign_strata(overall.truth, groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        chunks = bootstrap.map_resamples(
            lambda w: [overall.compute(w), *(p.compute(w[:, rows]) for p, (_, rows) in zip(parts, sides, strict=True))],
            groups,
            strata,
            n_resamples,
            seed,
        )
    whole, *samples = (concat_samples(part) for part in zip(*chunks, strict=True))
    ones = np.ones((1, len(groups)))
    point = overall.compute(ones)
    tests = []
    for (name, rows), part, sampled in zip(sides, parts, samples, strict=True):
        if len(np.unique(groups[rows])) >= subgroup_comparisons.MIN_GROUPS:
            tests += _old_tests(name, part, groups[rows], (part.compute(ones[:, rows]), point), (sampled, whole))
    usable = []
    for result, shortfall, values, floor in tests:
        defined = np.isfinite(values)
        std = math.sqrt(max(float(np.var(values[defined], ddof=1)), floor)) if defined.mean() >= 0.95 else 0.0
        if std > 0:
            usable.append((result, shortfall / std, np.where(defined, (values - shortfall) / std, -np.inf)))
    largest = np.stack([deviations for _, _, deviations in usable]).max(axis=0)
    return [{**r, "worse": (1 + (largest >= t).sum()) / (1 + len(largest)) < ALPHA} for r, t, _ in usable]


def _old_tests(name, part, groups, points, samples) -> list[tuple[dict, float, FloatArray, float]]:
    classes = part.truth.shape[1]
    candidates, tests = ([1] if classes == 2 else list(range(classes))), []
    positives, negatives = part.truth.sum(axis=0) >= 10, (~part.truth).sum(axis=0) >= 10
    enough = {"recall": positives, "specificity": negatives, "auc": positives & negatives}
    for metric in subgroup_comparisons.COMPARED_METRICS:
        columns = [c for c in candidates if enough[metric][c]]
        if not columns:
            continue
        value, overall = (point.per_class[metric][0, columns] for point in points)
        shortfalls = samples[1].per_class[metric][:, columns] - samples[0].per_class[metric][:, columns]
        floor = np.zeros(len(columns))
        if metric != "auc":
            truth = part.truth if metric == "recall" else ~part.truth
            floor = overall * (1 - overall) / [len(np.unique(groups[truth[:, c]])) for c in columns]
        label = {"subgroup": name, "metric": metric}
        tests += [(label, overall[i] - value[i], shortfalls[:, i], floor[i]) for i in range(len(columns))]
        if len(columns) > 1:
            mean = overall.mean() - value.mean()
            tests.append((label, mean, shortfalls.mean(axis=1), floor.sum() / len(columns) ** 2))
    return tests


def share(flags: list[bool]) -> str:
    """Percentage with its standard error."""
    value = np.mean(flags)
    return f"{100 * value:.1f} ({100 * math.sqrt(value * (1 - value) / len(flags)):.1f})"


def flags(results: list[dict], has_worse_site: bool) -> tuple[bool, bool, bool]:
    """Whether a subgroup is wrongly reported as worse, and whether the site and its AUC are reported."""
    worse = [row for row in results if row["worse"]]
    site = [row for row in worse if row["subgroup"] == WORSE_SITE]
    false = [row for row in worse if not (has_worse_site and row["subgroup"] == WORSE_SITE)]
    return bool(false), bool(site), any(row["metric"] == "auc" for row in site)


def simulate(design: Design, auc: float, num_sets: int, old_sets: int, n_resamples: int) -> tuple[str, float]:
    """Simulate one row; returns its cells and the median smallest detectable shortfall of the AUC of the site."""
    distances = separation(design, auc), separation(design, GOOD)
    found, detectable = [], []
    for seed in range(num_sets):
        results = compare(sample(design, distances, seed), seed)
        found.append(flags(results, auc < GOOD))
        detectable += [
            row["detectable_shortfall"]
            for row in results
            if row["subgroup"] == WORSE_SITE and row["metric"] == "auc" and row["class"] in ("class 1", "macro average")
        ][-1:]
    old = [
        flags(compare_old(sample(design, distances, seed), seed, n_resamples), auc < GOOD) for seed in range(old_sets)
    ]
    limits = [np.inf if value is None else value for value in detectable]
    median = float(np.median(limits)) if limits else math.nan
    cells = [share(list(column)) for column in zip(*found, strict=True)]
    cells += [share(list(column)) for column in list(zip(*old, strict=True))[:2]] if old else ["", ""]
    return f"{median:.2f} | {' | '.join(cells)}", median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="sets without a worse site")
    parser.add_argument("--power-sets", type=int, default=300, help="sets with a worse site")
    parser.add_argument("--old-sets", type=int, default=100, help="sets for the earlier procedure; 0: leave it out")
    parser.add_argument("--resamples", type=int, default=500, help="bootstrap resamples of the earlier procedure")
    parser.add_argument("--designs", type=int, nargs="*", default=list(range(len(DESIGNS))), help="numbers from 0")
    args = parser.parse_args()
    counts = f"{args.sets} sets, {args.power_sets} with a worse site, {args.old_sets} for the earlier procedure"
    print(f"{counts}; sets in which a subgroup is reported, %")
    print("| test set | AUC of the site | smallest detectable | false | site | by AUC | old: false | old: site |")
    print("|" + " --- |" * 8)
    for design in [DESIGNS[i] for i in args.designs]:
        row, median = simulate(design, GOOD, args.sets, args.old_sets, args.resamples)
        print(f"| {design.name} | {GOOD:.2f} | {row} |", flush=True)
        for auc, old_sets in ((BAD, args.old_sets), (GOOD - median, 0)):
            if 0.5 < auc < GOOD:
                row, _ = simulate(design, auc, args.power_sets, old_sets, args.resamples)
                print(f"| {design.name} | {auc:.2f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
