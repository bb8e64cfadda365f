"""Do 95 % intervals hold the truth 95 times in 100, and what do all numbers with their intervals cost?

    python benchmarks/evaluation.py coverage [--sets 1000] [--images 150] [--draws 1000]
    python benchmarks/evaluation.py subgroups [--sets 200] [--draws 500]
    python benchmarks/evaluation.py speed [--images 25596] [--findings 14] [--draws 2000]

The first draws sets of images from a population whose measures are known (those of 400,050 images), their labels in
fixed shares, as the bootstrap keeps them, and counts how often each interval holds those measures: two classes, five
grades, four findings, and two classes of patients with five images each. The second counts how often a subgroup is
called worse where none is, and where one is. The third measures all numbers of a multi-label set of the size of NIH's
official test list, with three columns of subgroups, and the paired comparison of two models.
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
KINDS = {"binary-class": [0.6, 0.4], "ordinal-regression": [0.4, 0.15, 0.2, 0.15, 0.1]}
FINDINGS = [0.4, 0.25, 0.2, 0.15]
MULTI_LABEL = "multi-label, binary-class"
PATIENTS = "binary-class, of patients"  # five images each, of which two are positive


def drawn(task: str, images: int, seed: int) -> Predictions:
    """Images of the population, every class in its share; findings by themselves."""
    random, kind = np.random.default_rng(seed), TASKS[task.removesuffix(", of patients")]
    group = None
    if kind.multi_label:
        patterns = np.random.default_rng(0).random((150, len(FINDINGS))) < FINDINGS  # the same mix in every set
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
        shares = np.array(KINDS[task])
        counts = np.round(images * shares).astype(int)
        labels = np.repeat(np.arange(len(shares)), counts)[:, None]
        apart = np.abs(labels - np.arange(len(shares)))
        logits = 1.2 * random.normal(size=apart.shape) - 0.9 * apart
    index = pd.DataFrame({"split": "test", "id": np.arange(len(labels)).astype(str), "group": group})
    classes = tuple(f"class {c}" for c in range(logits.shape[1]))
    return predictions.build_predictions(index, labels, kind.probabilities(logits), kind, classes)


def flat(numbers: dict[str, Any]) -> dict[str, Any]:
    """Overall measures, and those of the first and the last class, by name."""
    classes = list(numbers["per_class"])
    found = dict(numbers["overall"])
    for name in (classes[0], classes[-1]):
        found |= {f"{key}, {name}": value for key, value in numbers["per_class"][name].items()}
    return {key: value for key, value in found.items() if not key.startswith(("support", "prevalence"))}


def holds(task: str, truth: dict[str, float], images: int, draws: int, seed: int) -> dict[str, float]:
    """Of one set: whether each interval holds the truth; NaN where there is none."""
    found = flat(confidence_intervals(drawn(task, images, seed), n_resamples=draws, seed=seed, confidence=0.95))
    return {
        name: float(bounds[0] <= truth[name] <= bounds[1]) if bounds is not None else float("nan")
        for name, bounds in found.items()
    }


def coverage(sets: int, images: int, draws: int) -> pd.DataFrame:
    columns = {}
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for task in (*KINDS, MULTI_LABEL, PATIENTS):
            truth = flat(summarize(drawn(task, POPULATION, 10**6)))
            each = partial(holds, task, truth, images, draws)
            columns[task] = pd.DataFrame(list(workers.map(each, range(sets), chunksize=20))).mean()
    return pd.DataFrame(columns)


def print_coverage(sets: int, images: int, draws: int) -> None:
    table = 100 * coverage(sets, images, draws)
    print(f"{sets} sets of {images} images, {draws} draws; share of 95 % intervals that hold the truth, %")
    print(f"| | {' | '.join(table)} |\n|{' --- |' * (len(table.columns) + 1)}")
    for name, row in table.dropna(how="all").iterrows():
        print(f"| {name} | {' | '.join('' if np.isnan(value) else f'{value:.1f}' for value in row)} |")
    low, high = (100 * bound for bound in wilson_interval(round(0.95 * sets), sets, 0.99))
    print(f"of {sets} sets, 99 in 100 shares of a true 95 % lie in {low:.1f} to {high:.1f}")


def divided(kind: str, shift: float, seed: int) -> Predictions:
    """A set with three columns of subgroups, in which diseased women score lower by some standard deviations."""
    random = np.random.default_rng(seed)
    images = {"five classes": 400, "two classes": 300, "two classes, patients": 600}[kind]
    group = None
    if kind == "five classes":
        labels = random.choice(5, images, p=KINDS["ordinal-regression"])[:, None]
        logits = 1.2 * random.normal(size=(images, 5)) - 0.9 * np.abs(labels - np.arange(5))
    else:
        labels = (random.random((images, 1)) < 0.3).astype(np.int64)
        logits = np.stack([np.zeros(images), 1.8 * labels[:, 0] - 1.2 + random.normal(size=images)], axis=1)
    known = pd.DataFrame(
        {
            "age": random.integers(10, 90, images), "sex": random.choice(["F", "M"], images),
            "site": random.choice(list("abcd"), images, p=[0.4, 0.3, 0.2, 0.1]),
        }
    )  # fmt: skip
    if kind == "two classes, patients":
        patient = np.arange(images) // 5
        group, known = [f"patient {i}" for i in patient], known.iloc[patient * 5].reset_index(drop=True)
        logits[:, 1] += random.normal(size=images // 5)[patient]
    logits[(known["sex"] == "F").to_numpy() & (labels[:, 0] == 1), 1] -= shift
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": group})
    task = TASKS["multi-class"]
    classes = tuple(f"class {c}" for c in range(logits.shape[1]))
    return predictions.build_predictions(index, labels, task.probabilities(logits), task, classes, subgroups=known)


def called_worse(kind: str, shift: float, draws: int, seed: int) -> tuple[bool, bool]:
    """Whether any subgroup, and whether women, are called worse."""
    _, found = subgroups.evaluate_subgroups(
        divided(kind, shift, seed), AGE_BANDS, n_resamples=draws, seed=0, confidence=0.95
    )
    flagged = subgroups.underperforming(found)
    return bool(flagged), any(one["subgroup"] == "F" for one in flagged)


def print_subgroups(sets: int, draws: int) -> None:
    print(f"{sets} sets, {draws} draws; share in which a subgroup is called worse than the whole, %")
    print("| | any | women |\n| --- | --- | --- |")
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for kind, shift in (
            ("two classes", 0.0), ("five classes", 0.0), ("two classes, patients", 0.0), ("two classes", 1.0),
        ):  # fmt: skip
            found = list(workers.map(partial(called_worse, kind, shift, draws), range(sets), chunksize=10))
            name = kind if not shift else f"{kind}, diseased women lower by {shift:g} SD"
            print(f"| {name} | {' | '.join(f'{100 * share:.1f}' for share in np.mean(found, axis=0))} |")


def print_speed(images: int, findings: int, draws: int) -> None:
    random = np.random.default_rng(0)
    labels = (random.random((images, findings)) < 0.05).astype(np.int64)
    logits = random.normal(size=labels.shape) + 1.5 * labels - 3
    patients = random.integers(images // 9, size=images)
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": patients.astype(str)})
    task = TASKS[MULTI_LABEL]
    known = pd.DataFrame(
        {
            "age": random.integers(1, 95, images), "sex": random.choice(["F", "M"], images),
            "view": random.choice(["AP", "PA"], images),
        }
    )  # fmt: skip
    table = predictions.build_predictions(
        index, labels, task.probabilities(logits), task, tuple(f"finding {c}" for c in range(findings)), subgroups=known
    )
    began = time.perf_counter()
    summarize(table)
    subgroups.evaluate_subgroups(table, AGE_BANDS, n_resamples=draws, seed=0, confidence=0.95)
    curve_bands.compute_bands(table, seed=0, confidence=0.95)
    took, memory = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = f"{images:,} images, {findings} findings, {draws:,} draws, {os.cpu_count()} cores"
    print(f"{told}: {took:.1f} s, {memory:.2f} GiB")
    truth = random.random(20_000) < 0.1
    one, other = (random.normal(size=20_000) + truth for _ in range(2))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        delong.auc_difference([truth], [one], [other])
        seconds.append(time.perf_counter() - began)
    print(f"paired DeLong of two models on 20,000 images: {np.median(seconds):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["coverage", "subgroups", "speed"])
    parser.add_argument("--sets", type=int, help="1000 for coverage, 200 for subgroups")
    parser.add_argument("--images", type=int, help="150 for coverage, 25596 for speed")
    parser.add_argument("--findings", type=int, default=14)
    parser.add_argument("--draws", type=int, help="1000 for coverage, 500 for subgroups, 2000 for speed")
    wanted = parser.parse_args()
    if wanted.table == "coverage":
        print_coverage(wanted.sets or 1000, wanted.images or 150, wanted.draws or 1000)
    elif wanted.table == "subgroups":
        print_subgroups(wanted.sets or 200, wanted.draws or 500)
    else:
        print_speed(wanted.images or 25_596, wanted.findings, wanted.draws or 2000)


if __name__ == "__main__":
    main()
