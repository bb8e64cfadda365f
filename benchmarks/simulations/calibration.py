"""Calibration of a classifier that was trained on equal class frequencies, and coverage of slope and intercept.

    python benchmarks/simulations/calibration.py scores [--sets 200]
    python benchmarks/simulations/calibration.py coverage [--sets 4000]

`scores`: images of a class have normally distributed features, and the network is the ideal classifier for equally
frequent classes, as `train.sampling: weighted` aims at; in the designs `half` it has learned half of the shift and is
overconfident, as networks are that fit train closely, and in the designs `uniform` it is ideal for the true
frequencies. In each set, train (seven times val) and val are drawn at random, the calibration is fitted as in stage
train, and its scores on 30,000 test images, in which each class has its share, are compared with their labels: first a
table of the mean score of the class for which it is furthest from the frequency, among those with 20 or more val images
on average, and of the rarest class; then one of the decisions.

`coverage`: outcomes are drawn with probability expit(intercept + slope * logit(score)), independently, or for patients
with five images whose scores and outcomes are correlated; share of 95 % intervals that contain the true slope, and the
true intercept of a regression with slope 1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from scipy.stats import norm

from fadeformer.evaluation import predictions
from fadeformer.evaluation.recalibration import recalibration_intervals
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.inference import calibration
from fadeformer.inference.calibration import Calibration
from fadeformer.tasks import TASKS, Task
from fadeformer.training import sampling

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

TEST_IMAGES = 30_000
TRAIN_PER_VAL = 7  # as split.fractions
THRESHOLD = 0.1  # probability of the net benefit
MIN_CLASS_IMAGES = 20  # in val, on average
SEVEN_CLASSES = (0.60, 0.15, 0.10, 0.07, 0.04, 0.027, 0.013)
SEPARATION = {2: 2.15, 7: 2.35}  # distance of the class means of a feature, in standard deviations
SCORE_STD = 1.5  # of the logits, in `coverage`
PATIENT_IMAGES = 5
CORRELATION = 0.5  # of the scores, and of the outcomes, of a patient


@dataclass(frozen=True)
class Design:
    """Population and network: the network's logits have `shift` of the logarithms of the class frequencies."""

    name: str
    frequencies: tuple[float, ...]
    shift: float = 0.0
    overconfidence: float = 1.0
    is_weighted: bool = True

    def sample_labels(self, images: int, random: np.random.Generator) -> Labels:
        """Return the labels of random images, (images, 1)."""
        return random.choice(len(self.frequencies), images, p=np.array(self.frequencies))[:, None]

    def sample_scores(self, labels: Labels, random: np.random.Generator) -> Floats:
        """Return raw scores, (images, classes)."""
        images, classes = len(labels), len(self.frequencies)
        separation = SEPARATION[classes]
        features = random.normal(size=(images, classes)) + separation * (labels == np.arange(classes))
        logits = separation * features + self.shift * np.log(self.frequencies)
        return softmax(self.overconfidence * logits, axis=1)


DESIGNS = [
    Design("two classes, 5 %", (0.95, 0.05)), Design("two classes, 1 %", (0.99, 0.01)),
    Design("seven classes", SEVEN_CLASSES), Design("two classes, 5 %, half", (0.95, 0.05), 0.5, 1.5),
    Design("seven classes, half", SEVEN_CLASSES, 0.5, 1.5),
    Design("seven classes, uniform", SEVEN_CLASSES, 1.0, 1.5, is_weighted=False),
]  # fmt: skip


def fit_temperature(labels: Labels, scores: Floats) -> Calibration:
    """The earlier method: one temperature."""
    log_scores, rows = np.log(scores), np.arange(len(labels))
    result = minimize_scalar(
        lambda log_slope: -log_softmax(np.exp(log_slope) * log_scores, axis=1)[rows, labels[:, 0]].mean(),
        bounds=np.log(calibration.SLOPE_BOUNDS), method="bounded",
    )  # fmt: skip
    return Calibration((float(np.exp(result.x)),), method=calibration.TEMPERATURE)


def fit_as_in_training(design: Design, labels: Labels, scores: Floats, task: Task, random: np.random.Generator):
    """Fit a calibration as stage train does, with the class counts of a random train split."""
    train = design.sample_labels(TRAIN_PER_VAL * len(labels), random)
    how = "weighted" if design.is_weighted else "uniform"
    weights = sampling.training_weights(train, task, how, np.ones(len(design.frequencies)))
    return calibration.fit_calibration(labels, scores, task, training_weights=weights)


def evaluate_scores(design: Design, val_images: int, num_sets: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return a row of the table of scores and one of the table of decisions."""
    task = TASKS["binary-class" if len(design.frequencies) == 2 else "multi-class"]
    random = np.random.default_rng([DESIGNS.index(design), val_images])
    counts = np.round(TEST_IMAGES * np.array(design.frequencies)).astype(int)
    test_labels = np.repeat(np.arange(len(counts)), counts)[:, None]
    test_scores = design.sample_scores(test_labels, random)
    truth = test_labels == np.arange(len(design.frequencies))
    results: dict[str, list] = {}
    for _ in range(num_sets):
        labels = design.sample_labels(val_images, random)
        scores = design.sample_scores(labels, random)
        fitted = fit_as_in_training(design, labels, scores, task, random)
        for name, method in (("before", fit_temperature(labels, scores)), ("now", fitted)):
            values = method(test_scores, task)
            results.setdefault(f"ratios {name}", []).append(values.mean(axis=0) / truth.mean(axis=0))
            results.setdefault(f"errors {name}", []).append(_class_errors(values, test_labels, task))
            results.setdefault(f"benefit {name}", []).append(_net_benefit(values[:, -1], truth[:, -1]))
        results.setdefault("method", []).append(fitted.method)
        rules = {
            "before": task.decide(test_scores), "probable": task.decide(values),
            "now": task.with_decision_weights(fitted.decision_weights).decide(values),
        }  # fmt: skip
        for name, decisions in rules.items():
            recalls = (truth & (decisions == test_labels)).sum(axis=0) / truth.sum(axis=0)
            accuracy = (decisions == test_labels).mean()
            results.setdefault(f"decisions {name}", []).append((accuracy, recalls.mean(), recalls[-1]))
    label = {"design": design.name, "val": f"{val_images:,}"}
    return label | _score_row(design, val_images, results), label | _decision_row(results)


def _class_errors(scores: Floats, labels: Labels, task: Task) -> Floats:
    index = pd.DataFrame({"split": "test", "id": np.arange(len(labels)).astype(str), "group": None})
    classes = tuple(f"class {c}" for c in range(scores.shape[1]))
    return WeightedMetrics(
        predictions.build_predictions(index, labels, scores, task, classes)
    ).class_calibration_errors()


def _net_benefit(score: Floats, truth: NDArray[np.bool_]) -> float:
    """Net benefit at one threshold, as in `operating_points.net_benefit`, which computes 99."""
    predicted = score >= THRESHOLD
    return float((predicted & truth).mean() - THRESHOLD / (1 - THRESHOLD) * (predicted & ~truth).mean())


def _score_row(design: Design, val_images: int, results: dict[str, list]) -> dict[str, str]:
    enough = val_images * np.array(design.frequencies) >= MIN_CLASS_IMAGES
    row = {}
    for name in ("before", "now"):
        ratios = np.array(results[f"ratios {name}"])[:, enough]
        means, errors = ratios.mean(axis=0), ratios.std(axis=0, ddof=1) / np.sqrt(len(ratios))
        worst = int(np.abs(np.log(means)).argmax())
        row[f"furthest class, {name}"] = f"{means[worst]:.3f} ({errors[worst]:.3f})"
    within = (np.abs(ratios - 1) <= 0.1).mean(axis=0)
    row["sets within 10 %"] = f"{100 * within.min():.0f} to {100 * within.max():.0f} %"
    for name in ("before", "now"):
        row[f"rarest class, {name}"] = _mean_and_error(np.array(results[f"ratios {name}"])[:, -1], 2)
    for name in ("before", "now"):
        row[f"its calibration error, {name}"] = _mean_and_error(np.array(results[f"errors {name}"])[:, -1], 4)
    for name in ("before", "now"):
        row[f"its net benefit, {name}"] = _mean_and_error(1000 * np.array(results[f"benefit {name}"]), 2)
    methods = pd.Series(results["method"]).value_counts(normalize=True)
    row["methods"] = ", ".join(f"{name} {100 * share:.0f} %" for name, share in methods.items())
    return row


def _decision_row(results: dict[str, list]) -> dict[str, str]:
    columns = {"before": "uncalibrated", "now": "now", "probable": "most probable class"}
    means = {name: np.array(results[f"decisions {name}"]).mean(axis=0) for name in columns}
    return {
        f"{metric}, {column}": f"{100 * means[name][index]:.1f}"
        for index, metric in enumerate(("accuracy", "balanced accuracy", "recall of the rarest"))
        for name, column in columns.items()
    }


def _mean_and_error(values: Floats, digits: int) -> str:
    return f"{values.mean():.{digits}f} ({values.std(ddof=1) / np.sqrt(len(values)):.{digits}f})"


def _print_table(rows: list[dict[str, str]]) -> None:
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")


def print_scores(num_sets: int) -> None:
    rows = [evaluate_scores(design, images, num_sets) for design in DESIGNS for images in (1000, 2000)]
    print(
        f"{num_sets} sets per row; mean score / frequency, net benefit per 1,000 images; Monte Carlo error in brackets"
    )
    _print_table([scores for scores, _ in rows])
    print("decisions, %: before calibration, now, and by the most probable class after calibration")
    _print_table([decisions for _, decisions in rows])


@dataclass(frozen=True)
class Miscalibration:
    """True intercept and slope of the outcome on the logit of the score, and the mean of the logits."""

    intercept: float
    slope: float
    mean: float

    def true_intercept(self) -> float:
        """Return the intercept of the regression with slope 1."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(101)
        logits, weights = self.mean + SCORE_STD * nodes, weights / weights.sum()
        frequency = weights @ expit(self.intercept + self.slope * logits)
        return float(brentq(lambda value: weights @ expit(value + logits) - frequency, -20, 20))


def with_prevalence(prevalence: float, intercept: float, slope: float) -> Miscalibration:
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    weights = weights / weights.sum()
    mean = brentq(lambda value: weights @ expit(intercept + slope * (value + SCORE_STD * nodes)) - prevalence, -50, 50)
    return Miscalibration(intercept, slope, float(mean))


def sample_outcomes(
    truth: Miscalibration, images: int, is_clustered: bool, random: np.random.Generator
) -> tuple[NDArray[np.bool_], Floats, Labels]:
    """Return outcomes, scores and patients, each (images,)."""
    groups = np.arange(images) // PATIENT_IMAGES if is_clustered else np.arange(images)
    shared = CORRELATION if is_clustered else 0.0
    correlated = (
        np.sqrt(shared) * random.normal(size=(2, images))[:, groups]
        + np.sqrt(1 - shared) * random.normal(size=(2, images))
    )  # fmt: skip
    logits = truth.mean + SCORE_STD * correlated[0]
    outcomes = norm.cdf(correlated[1]) < expit(truth.intercept + truth.slope * logits)
    return outcomes, expit(logits), groups


def coverage_row(prevalence: float, shape: tuple[float, float], images: int, is_clustered: bool, num_sets: int):
    truth = with_prevalence(prevalence, *shape)
    random = np.random.default_rng([round(1000 * prevalence), round(10 * shape[1]), images, is_clustered])
    targets, hits, missing = (truth.slope, truth.true_intercept()), np.zeros(2), np.zeros(2)
    for _ in range(num_sets):
        intervals = recalibration_intervals(*sample_outcomes(truth, images, is_clustered, random), 0.95)
        for index, (target, bounds) in enumerate(zip(targets, intervals, strict=True)):
            missing[index] += bounds is None
            hits[index] += bounds is not None and bounds[0] <= target <= bounds[1]
    shares = hits / (num_sets - missing)
    error = 100 * np.sqrt(shares * (1 - shares) / num_sets)
    return {
        "prevalence": f"{100 * prevalence:g} %", "true slope, intercept": f"{targets[0]:g}, {targets[1]:.2f}",
        "images": f"{images:,}", "per patient": str(PATIENT_IMAGES if is_clustered else 1),
        "slope": f"{100 * shares[0]:.1f} ({error[0]:.1f})", "intercept": f"{100 * shares[1]:.1f} ({error[1]:.1f})",
        "without interval": f"{int(missing.max())}",
    }  # fmt: skip


def print_coverage(num_sets: int) -> None:
    rows = [
        coverage_row(prevalence, shape, images, is_clustered, num_sets)
        for prevalence in (0.05, 0.3)
        for shape in ((0.0, 1.0), (0.5, 0.7))
        for images in (400, 1000, 2000)
        for is_clustered in (False, True)
    ]
    print(f"{num_sets} sets per row; 95 % intervals that contain the true value, %; Monte Carlo error in brackets")
    _print_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["scores", "coverage"])
    parser.add_argument("--sets", type=int, help="200 for scores, 4000 for coverage")
    args = parser.parse_args()
    if args.table == "scores":
        print_scores(args.sets or 200)
    else:
        print_coverage(args.sets or 4000)


if __name__ == "__main__":
    main()
