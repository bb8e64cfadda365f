"""How often does the gate promote a model that is truly worse than the champion, and how often an equal one?

    python benchmarks/promotion.py [--pairs 1000] [--margin 0.02]

Draws pairs of models of known AUC (binormal scores of two classes, correlated between the two models as those of two
trainings are) on test sets of several sizes, and puts each before the gate. All it asks for is that the challenger is
not inferior. The rows are test sets; the columns are how much worse than the champion the challenger truly is.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import norm

from fadeformer.evaluation import predictions
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.evaluation.predictions import Predictions
from fadeformer.promotion import gate
from fadeformer.promotion.gate import Challenger, PromotionCriteria
from fadeformer.tasks import TASKS

SIZES = (100, 200, 400, 1000, 2000, 5000)
AREAS = (0.85, 0.95)
PREVALENCE = 0.3
CORRELATION = 0.8  # of the two models' scores within a class
WORSE = (-0.5, 0.0, 0.5, 1.0, 2.0)  # in margins
TASK = TASKS["binary-class"]


def pair(images: int, area: float, worse: float, seed: int) -> tuple[Predictions, Predictions]:
    """A challenger and a champion on the same images.

    Args:
        images: of the test set.
        area: true AUC of the champion.
        worse: how much lower that of the challenger is.
        seed: of both.
    """
    random = np.random.default_rng(seed)
    labels = (np.arange(images) < round(PREVALENCE * images)).astype(np.int64)
    common, *own = random.normal(size=(3, images))
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": None})
    found = []
    for true, noise in zip((area - worse, area), own, strict=True):
        distance = np.sqrt(2) * norm.ppf(true)  # between the means of two normal distributions with that AUC
        score = np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * noise + distance * labels
        scores = TASK.probabilities(np.stack([np.zeros(images), score - distance / 2], axis=1))
        found.append(predictions.build_predictions(index, labels[:, None], scores, TASK, ("without", "with")))
    return found[0], found[1]


def promoted(case: tuple[int, float, float], pairs: int, margin: float) -> int:
    """How many of some challengers the gate lets pass."""
    asked = PromotionCriteria(
        min_auc=0.0, min_class_auc=None, min_subgroup_auc=None, min_cases=1, max_ece=None, operating_point="youden",
        min_sensitivity=None, margin=margin, min_gain=None,
    )  # fmt: skip
    images, area, worse = case
    count = 0
    for seed in range(pairs):
        challenger, champion = pair(images, area, worse * margin, seed)
        known = {"overall": {"auc": (0.0, 1.0)}, "per_class": {}}  # no floor is asked for
        count += gate.decide(Challenger(challenger, known, 0.95, {}, {}, is_data_valid=True), champion, asked).promoted
    return count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    cases = [(images, area, worse) for area in AREAS for images in arguments.sizes for worse in WORSE]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(partial(promoted, pairs=arguments.pairs, margin=arguments.margin), cases))
    rates = pd.DataFrame(cases, columns=["test images", "champion's AUC", "worse"])
    rates["promoted"] = [100 * count / arguments.pairs for count in counts]
    table = rates.pivot_table(index=["champion's AUC", "test images"], columns="worse", values="promoted")
    table.columns = [
        f"better by {-worse:g} margins" if worse < 0 else "equal" if worse == 0 else f"worse by {worse:g} margins"
        for worse in table.columns
    ]
    print(f"promoted, % of {arguments.pairs:,} pairs, at a margin of {arguments.margin:g}")
    print(table.to_string(float_format="{:.1f}".format))
    most = max(count for (_, _, worse), count in zip(cases, counts, strict=True) if worse == WORSE[-1])
    low, high = wilson_interval(most, arguments.pairs, 0.95)
    print(
        f"most of those worse by {WORSE[-1]:g} margins: {100 * most / arguments.pairs:.1f} %"
        f" ({100 * low:.1f} to {100 * high:.1f})"
    )


if __name__ == "__main__":
    main()
