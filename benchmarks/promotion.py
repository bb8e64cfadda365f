"""Error rates of the promotion gate: how often it promotes a model that is worse than the champion, or an equal one.

    python benchmarks/promotion.py [--pairs 1000] [--margin 0.02]

Simulates pairs of models with known AUC (binormal scores of two classes, correlated between the models like those of
two training runs) on test sets of several sizes, and submits each pair to the gate, which only requires
non-inferiority. The rows are test sets; the columns are the true difference to the champion.
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
AUCS = (0.85, 0.95)
PREVALENCE = 0.3
CORRELATION = 0.8  # of the two models' scores within a class
DEFICITS = (-0.5, 0.0, 0.5, 1.0, 2.0)  # true deficit of the challenger, in margins
TASK = TASKS["binary-class"]


def simulate_pair(images: int, auc: float, deficit: float, seed: int) -> tuple[Predictions, Predictions]:
    """Simulate predictions of a challenger and a champion on the same images.

    Args:
        images: images of the test set.
        auc: true AUC of the champion.
        deficit: true AUC of the champion minus that of the challenger.
        seed: seed of both.
    """
    random = np.random.default_rng(seed)
    labels = (np.arange(images) < round(PREVALENCE * images)).astype(np.int64)
    common, *noises = random.normal(size=(3, images))
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": None})
    tables = []
    for true, noise in zip((auc - deficit, auc), noises, strict=True):
        distance = np.sqrt(2) * norm.ppf(true)  # between the means of two normal distributions with that AUC
        score = np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * noise + distance * labels
        scores = TASK.probabilities(np.stack([np.zeros(images), score - distance / 2], axis=1))
        tables.append(predictions.build_predictions(index, labels[:, None], scores, TASK, ("without", "with")))
    return tables[0], tables[1]


def count_promoted(case: tuple[int, float, float], pairs: int, margin: float) -> int:
    """Return the number of challengers that the gate promotes."""
    requirements = PromotionCriteria(
        min_auc=0.0, min_class_auc=None, min_subgroup_auc=None, min_cases=1, max_ece=None, operating_point="youden",
        min_sensitivity=None, margin=margin, min_gain=None,
    )  # fmt: skip
    images, auc, deficit = case
    count = 0
    for seed in range(pairs):
        challenger, champion = simulate_pair(images, auc, deficit * margin, seed)
        summary = {"overall": {"auc": (0.0, 1.0)}, "per_class": {}}  # no minimum is required
        count += gate.decide(
            Challenger(challenger, summary, 0.95, {}, {}, is_data_valid=True), champion, requirements
        ).promoted
    return count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    args = parser.parse_args()
    cases = [(images, auc, deficit) for auc in AUCS for images in args.sizes for deficit in DEFICITS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(partial(count_promoted, pairs=args.pairs, margin=args.margin), cases))
    rates = pd.DataFrame(cases, columns=["test images", "champion's AUC", "deficit"])
    rates["promoted"] = [100 * count / args.pairs for count in counts]
    table = rates.pivot_table(index=["champion's AUC", "test images"], columns="deficit", values="promoted")
    table.columns = [
        f"better by {-deficit:g} margins"
        if deficit < 0
        else "equal"
        if deficit == 0
        else f"worse by {deficit:g} margins"
        for deficit in table.columns
    ]
    print(f"promoted, % of {args.pairs:,} pairs, at a margin of {args.margin:g}")
    print(table.to_string(float_format="{:.1f}".format))
    worst_count = max(count for (_, _, deficit), count in zip(cases, counts, strict=True) if deficit == DEFICITS[-1])
    low, high = wilson_interval(worst_count, args.pairs, 0.95)
    print(
        f"highest rate of those worse by {DEFICITS[-1]:g} margins: {100 * worst_count / args.pairs:.1f} %"
        f" ({100 * low:.1f} to {100 * high:.1f})"
    )


if __name__ == "__main__":
    main()
