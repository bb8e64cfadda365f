"""Coverage of 95 % confidence intervals, false alarms of subgroup comparisons, and run time of the evaluation.

    python benchmarks/evaluation.py coverage [--sets 1000] [--images 150] [--resamples 1000]
    python benchmarks/evaluation.py subgroups [--sets 200] [--resamples 500]
    python benchmarks/evaluation.py speed [--images 25596] [--findings 14] [--resamples 2000]

`coverage` samples test sets from a population with known metrics (those of 400,050 images), with fixed class counts as
in the bootstrap, and counts how often each interval contains the true metric: two classes, five grades, four findings,
and two classes of patients with five images each. `subgroups` counts how often a subgroup is flagged as underperforming
without and with a true difference. `speed` times all metrics of a multi-label set of the size of NIH's official test
list with three subgroup columns, and the paired comparison of two models.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from fadeformer.evaluation import predictions, subgroups
from fadeformer.evaluation.intervals import curve_bands, delong
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.summary import confidence_intervals, summarize
from fadeformer.tasks import TASKS

AGE_BANDS = (0, 18, 40, 60, 80)
POPULATION = 400_050  # a multiple of the label patterns
CLASS_FRACTIONS = {"binary-class": [0.6, 0.4], "ordinal-regression": [0.4, 0.15, 0.2, 0.15, 0.1]}
FINDINGS = [0.4, 0.25, 0.2, 0.15]
MULTI_LABEL = "multi-label, binary-class"
PATIENTS = "binary-class, of patients"  # five images each, of which two are positive


def sample_predictions(task: str, images: int, seed: int) -> Predictions:
    """Sample predictions with fixed class counts; findings are independent."""
    random, task_type = np.random.default_rng(seed), TASKS[task.removesuffix(", of patients")]
    group = None
    if task_type.multi_label:
        patterns = (
            np.random.default_rng(0).random((150, len(FINDINGS))) < FINDINGS
        )  # the same label counts in every set
        labels = np.resize(patterns, (images, len(FINDINGS))).astype(np.int64)
        logits = 1.4 * random.normal(size=labels.shape) + 2.2 * labels - 2
    elif task == PATIENTS:
        labels = np.resize([0, 1, 0, 1, 0], images)[:, None].astype(np.int64)
        group = [f"patient {i // 5}" for i in range(images)]
        patient = random.normal(size=(-(-images // 5), 1)).repeat(5, axis=0)[:images]
        logits = np.concatenate(
            [np.zeros((images, 1)), 1.8 * labels - 1 + patient + random.normal(size=(images, 1))], 1
        )
    else:
        fractions = np.array(CLASS_FRACTIONS[task])
        counts = np.round(images * fractions).astype(int)
        labels = np.repeat(np.arange(len(fractions)), counts)[:, None]
        distance = np.abs(labels - np.arange(len(fractions)))
        logits = 1.2 * random.normal(size=distance.shape) - 0.9 * distance
    index = pd.DataFrame({"split": "test", "id": np.arange(len(labels)).astype(str), "group": group})
    classes = tuple(f"class {c}" for c in range(logits.shape[1]))
    return predictions.build_predictions(index, labels, task_type.probabilities(logits), task_type, classes)


def flatten_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return overall metrics and those of the first and last class, by name."""
    classes = list(metrics["per_class"])
    values = dict(metrics["overall"])
    for name in (classes[0], classes[-1]):
        values |= {f"{key}, {name}": value for key, value in metrics["per_class"][name].items()}
    # calibration slope and intercept are for a random class mix, here it is fixed: see simulations/calibration.py
    without = ("support", "prevalence", "mean_score", "calibration_slope", "calibration_intercept")
    return {key: value for key, value in values.items() if not key.startswith(without)}


def interval_coverage(task: str, truth: dict[str, float], images: int, n_resamples: int, seed: int) -> dict[str, float]:
    """Return for one set whether each interval contains the true value; NaN without an interval."""
    sample = sample_predictions(task, images, seed)
    intervals = flatten_metrics(confidence_intervals(sample, n_resamples=n_resamples, seed=seed, confidence=0.95))
    return {
        name: float(bounds[0] <= truth[name] <= bounds[1]) if bounds is not None else float("nan")
        for name, bounds in intervals.items()
    }


def coverage(num_sets: int, images: int, n_resamples: int) -> pd.DataFrame:
    columns = {}
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for task in (*CLASS_FRACTIONS, MULTI_LABEL, PATIENTS):
            truth = flatten_metrics(summarize(sample_predictions(task, POPULATION, 10**6)))
            simulate = partial(interval_coverage, task, truth, images, n_resamples)
            columns[task] = pd.DataFrame(list(workers.map(simulate, range(num_sets), chunksize=20))).mean()
    return pd.DataFrame(columns)


def print_coverage(num_sets: int, images: int, n_resamples: int) -> None:
    table = 100 * coverage(num_sets, images, n_resamples)
    print(f"{num_sets} sets of {images} images, {n_resamples} resamples; 95 % intervals that contain the true value, %")
    print(f"| | {' | '.join(table)} |\n|{' --- |' * (len(table.columns) + 1)}")
    for name, row in table.dropna(how="all").iterrows():
        print(f"| {name} | {' | '.join('' if np.isnan(value) else f'{value:.1f}' for value in row)} |")
    low, high = (100 * bound for bound in wilson_interval(round(0.95 * num_sets), num_sets, 0.99))
    print(f"of {num_sets} sets, the 99 % range for a true coverage of 95 % is {low:.1f} to {high:.1f}")


def sample_with_subgroups(case: str, shift: float, seed: int) -> Predictions:
    """Sample predictions with subgroup columns; scores of diseased women are `shift` standard deviations lower."""
    random = np.random.default_rng(seed)
    images = {"five classes": 400, "two classes": 300, "two classes, patients": 600}[case]
    group = None
    if case == "five classes":
        labels = random.choice(5, images, p=CLASS_FRACTIONS["ordinal-regression"])[:, None]
        logits = 1.2 * random.normal(size=(images, 5)) - 0.9 * np.abs(labels - np.arange(5))
    else:
        labels = (random.random((images, 1)) < 0.3).astype(np.int64)
        logits = np.stack([np.zeros(images), 1.8 * labels[:, 0] - 1.2 + random.normal(size=images)], axis=1)
    subgroup_table = pd.DataFrame(
        {
            "age": random.integers(10, 90, images), "sex": random.choice(["F", "M"], images),
            "site": random.choice(list("abcd"), images, p=[0.4, 0.3, 0.2, 0.1]),
        }
    )  # fmt: skip
    if case == "two classes, patients":
        patient = np.arange(images) // 5
        group, subgroup_table = (
            [f"patient {i}" for i in patient],
            subgroup_table.iloc[patient * 5].reset_index(drop=True),
        )
        logits[:, 1] += random.normal(size=images // 5)[patient]
    logits[(subgroup_table["sex"] == "F").to_numpy() & (labels[:, 0] == 1), 1] -= shift
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": group})
    task = TASKS["multi-class"]
    classes = tuple(f"class {c}" for c in range(logits.shape[1]))
    return predictions.build_predictions(
        index, labels, task.probabilities(logits), task, classes, subgroups=subgroup_table
    )


def flagged(case: str, shift: float, n_resamples: int, seed: int) -> tuple[bool, bool]:
    """Return whether any subgroup, and whether women, are flagged as underperforming."""
    _, comparisons = subgroups.evaluate_subgroups(
        sample_with_subgroups(case, shift, seed), AGE_BANDS, n_resamples=n_resamples, seed=0, confidence=0.95
    )
    rows = subgroups.underperforming(comparisons)
    return bool(rows), any(row["subgroup"] == "F" for row in rows)


def print_subgroups(num_sets: int, n_resamples: int) -> None:
    print(f"{num_sets} sets, {n_resamples} resamples; sets in which a subgroup is flagged as underperforming, %")
    print("| | any | women |\n| --- | --- | --- |")
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for case, shift in (
            ("two classes", 0.0), ("five classes", 0.0), ("two classes, patients", 0.0), ("two classes", 1.0),
        ):  # fmt: skip
            flags = list(workers.map(partial(flagged, case, shift, n_resamples), range(num_sets), chunksize=10))
            name = case if not shift else f"{case}, diseased women lower by {shift:g} SD"
            print(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in np.mean(flags, axis=0))} |")


def print_speed(images: int, findings: int, n_resamples: int) -> None:
    random = np.random.default_rng(0)
    labels = (random.random((images, findings)) < 0.05).astype(np.int64)
    logits = random.normal(size=labels.shape) + 1.5 * labels - 3
    patients = random.integers(images // 9, size=images)
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": patients.astype(str)})
    task = TASKS[MULTI_LABEL]
    subgroup_table = pd.DataFrame(
        {
            "age": random.integers(1, 95, images), "sex": random.choice(["F", "M"], images),
            "view": random.choice(["AP", "PA"], images),
        }
    )  # fmt: skip
    table = predictions.build_predictions(
        index,
        labels,
        task.probabilities(logits),
        task,
        tuple(f"finding {c}" for c in range(findings)),
        subgroups=subgroup_table,
    )
    start = time.perf_counter()
    summarize(table)
    subgroups.evaluate_subgroups(table, AGE_BANDS, n_resamples=n_resamples, seed=0, confidence=0.95)
    curve_bands.compute_bands(table, seed=0, confidence=0.95)
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = f"{images:,} images, {findings} findings, {n_resamples:,} resamples, {os.cpu_count()} cores"
    print(f"{size}: {seconds:.1f} s, {memory:.2f} GiB")
    truth = random.random(20_000) < 0.1
    scores_a, scores_b = (random.normal(size=20_000) + truth for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        delong.auc_difference([truth], [scores_a], [scores_b])
        times.append(time.perf_counter() - start)
    print(f"paired DeLong of two models on 20,000 images: {np.median(times):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["coverage", "subgroups", "speed"])
    parser.add_argument("--sets", type=int, help="1000 for coverage, 200 for subgroups")
    parser.add_argument("--images", type=int, help="150 for coverage, 25596 for speed")
    parser.add_argument("--findings", type=int, default=14)
    parser.add_argument("--resamples", type=int, help="1000 for coverage, 500 for subgroups, 2000 for speed")
    args = parser.parse_args()
    if args.table == "coverage":
        print_coverage(args.sets or 1000, args.images or 150, args.resamples or 1000)
    elif args.table == "subgroups":
        print_subgroups(args.sets or 200, args.resamples or 500)
    else:
        print_speed(args.images or 25_596, args.findings, args.resamples or 2000)


if __name__ == "__main__":
    main()
