"""Coverage of the intervals of predictive values, under random sampling and at a stated prevalence.

    python benchmarks/simulations/predictive_values.py [--sets 4000]

Two tables of the share of 95 % intervals that contain the true value, with its Monte Carlo standard error.

Random sampling: images, or patients of one to five images (three on average), are a random sample, so that the number
of positives varies. `at the case mix` is the product's interval (`proportion_interval` among the predicted positives or
negatives), `fixed case mix` the earlier one, which takes the number of positives as given.

Stated prevalence: test sets with a fixed number of positives; the predictive values are those at a prevalence of 5 %
(`predictive_value_interval`). The interval at any other prevalence covers in the same sets, as all of them come from
the same interval of the ratio of the two rates.

Scores are normal, and the labels of a patient are those of a common and an own normal variable, so that true values
follow from the marginal rates. Half of the variance of scores and of labels is common to a patient.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fadeformer.evaluation.intervals.proportions import predictive_value_interval, proportion_interval

CONFIDENCE = 0.95
CELLS = ((150, 0.3), (400, 0.1))  # images, prevalence
THRESHOLDS = {"85 % sensitivity, 85 % specificity": (0.85, 0.85), "95 %, 70 %": (0.95, 0.7), "70 %, 95 %": (0.7, 0.95)}
STATED = 0.05
LARGEST_PATIENT = 5  # images
PATIENT_SHARE = 0.5  # of the variance that is common to the images of a patient

Masks = tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]


def patient_normals(random: np.random.Generator, groups: NDArray[np.int64], clustered: bool) -> NDArray[np.float64]:
    """Standard normal numbers, correlated within groups."""
    own = random.normal(size=len(groups))
    if not clustered:
        return own
    common = random.normal(size=groups.max() + 1)[groups]
    return math.sqrt(PATIENT_SHARE) * common + math.sqrt(1 - PATIENT_SHARE) * own


def sample(
    images: int, prevalence: float, rates: tuple[float, float], clustered: bool, fixed: bool, seed: int
) -> Masks:
    """Sample decisions, truth and groups; `rates` are sensitivity and specificity."""
    random = np.random.default_rng(seed)
    mean_size = (1 + LARGEST_PATIENT) / 2
    sizes = random.integers(1, LARGEST_PATIENT + 1, round(images / mean_size)) if clustered else np.ones(images, int)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    latent = patient_normals(random, groups, clustered)
    limit = np.sort(latent)[round(prevalence * len(groups))] if fixed else ndtri(prevalence)
    truth = latent < limit
    limits = np.where(truth, ndtri(rates[0]), ndtri(1 - rates[1]))
    return patient_normals(random, groups, clustered) < limits, truth, groups


def predictive_values(rates: tuple[float, float], prevalence: float) -> tuple[float, float]:
    """True positive and negative predictive value by Bayes' theorem."""
    sensitivity, specificity = rates
    positive = sensitivity * prevalence / (sensitivity * prevalence + (1 - specificity) * (1 - prevalence))
    negative = specificity * (1 - prevalence) / (specificity * (1 - prevalence) + (1 - sensitivity) * prevalence)
    return positive, negative


def covered(interval: tuple[float, ...] | None, value: float) -> float:
    """1 if the last two numbers of the interval enclose the value; NaN without an interval."""
    return math.nan if interval is None else float(interval[-2] <= value <= interval[-1])


def share(flags: list[float]) -> str:
    """Percentage with its standard error; sets without an interval do not count."""
    value, count = np.nanmean(flags), np.isfinite(flags).sum()
    return f"{100 * value:.1f} ({100 * math.sqrt(value * (1 - value) / count):.1f})"


def random_sampling(cell: tuple[int, float], rates: tuple[float, float], clustered: bool, num_sets: int) -> list[str]:
    """Coverage of both intervals of the positive and of the negative predictive value."""
    images, prevalence = cell
    truths, rows = predictive_values(rates, prevalence), []
    for seed in range(num_sets):
        predicted, truth, groups = sample(images, prevalence, rates, clustered, fixed=False, seed=seed)
        row = []
        for decision, actual, value in ((predicted, truth, truths[0]), (~predicted, ~truth, truths[1])):
            observed = float(actual.mean())
            row.append(covered(proportion_interval(actual, decision, groups, CONFIDENCE), value))
            fixed = (
                predictive_value_interval(decision, actual, groups, CONFIDENCE, observed) if 0 < observed < 1 else None
            )
            row.append(covered(fixed, value))
        rows.append(row)
    return [share(list(column)) for column in zip(*rows, strict=True)]


def stated_prevalence(cell: tuple[int, float], rates: tuple[float, float], clustered: bool, num_sets: int) -> list[str]:
    """Coverage of both predictive values at the stated prevalence."""
    images, prevalence = cell
    values, rows = predictive_values(rates, STATED), []
    for seed in range(num_sets):
        predicted, truth, groups = sample(images, prevalence, rates, clustered, fixed=True, seed=seed)
        positive = predictive_value_interval(predicted, truth, groups, CONFIDENCE, STATED)
        negative = predictive_value_interval(~predicted, ~truth, groups, CONFIDENCE, 1 - STATED)
        rows.append((covered(positive, values[0]), covered(negative, values[1])))
    return [share(list(column)) for column in zip(*rows, strict=True)]


def print_table(head: list[str], compute, num_sets: int) -> None:
    print(f"| test set | rates | {' | '.join(head)} |\n|{' --- |' * (len(head) + 2)}")
    for clustered in (False, True):
        for cell in CELLS:
            for name, rates in THRESHOLDS.items():
                kind = f"{cell[0]} images, {100 * cell[1]:g} %" + (", patients" if clustered else "")
                print(f"| {kind} | {name} | {' | '.join(compute(cell, rates, clustered, num_sets))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=4000)
    args = parser.parse_args()
    print(f"{args.sets} sets; 95 % intervals that contain the true value under random sampling, %\n")
    kinds = ("at the case mix", "fixed case mix")
    print_table([f"{value}, {kind}" for value in ("PPV", "NPV") for kind in kinds], random_sampling, args.sets)
    print(f"\n{args.sets} sets; 95 % intervals that contain the true value at a stated prevalence, %\n")
    print_table(["PPV", "NPV"], stated_prevalence, args.sets)


if __name__ == "__main__":
    main()
