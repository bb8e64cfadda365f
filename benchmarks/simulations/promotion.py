"""Error rates of the promotion gate's comparison with the champion.

    python benchmarks/simulations/promotion.py margin [--sets 2000] [--correlation 0.8]
    python benchmarks/simulations/promotion.py campaigns [--sets 1000]

Scores of two classes are normal, with the given AUC and a given correlation between two models of the same images, as
of two training runs. `margin`: how often a challenger is promoted that is worse than the champion by exactly the margin
(nominal 2.5 %), and one that is equal (the power), by the method of the gate and by DeLong's normal interval, which
other tools use. `campaigns`: how often any of 50 candidates that are no better than the champion is promoted if a gain
is required, and how often one that is better by 0.03, as candidate 1, 5, 20 or 50, for several ways of paying for the
repeated use of the test set.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from fadeformer.evaluation.intervals import delong
from fadeformer.promotion.alpha_spending import confidence_of_candidate

Floats = NDArray[np.float64]

MARGIN, CONFIDENCE, MIN_CASES = 0.02, 0.95, 20
AUCS = (0.8, 0.9, 0.97, 0.99)
POSITIVES = (5, 10, 20, 50, 100, 200)
CLUSTER_SIZES = (1, 5)  # images per patient
CLUSTER_CORRELATION = 0.5  # between images of one patient
CANDIDATES = 50
CAMPAIGN_IMAGES, CAMPAIGN_POSITIVES, CAMPAIGN_AUC, GAIN = 400, 120, 0.9, 0.03
POSITIONS = (1, 5, 20, 50)  # of a better candidate in a campaign
RULES = {
    "none": lambda k: CONFIDENCE,
    "alpha / (k (k + 1))": lambda k: confidence_of_candidate(CONFIDENCE, k),
    "alpha / 2^k": lambda k: 1 - 2 * (1 - CONFIDENCE) / 2.0**k,
    "alpha / 50": lambda k: 1 - 2 * (1 - CONFIDENCE) / CANDIDATES,
}


@dataclass(frozen=True)
class Design:
    """Test images of one cell of the table.

    Attributes:
        positives: images with the class.
        negatives: images without it.
        cluster_size: images per patient, all with the same label.
        correlation: of two models' scores within a class.
    """

    positives: int
    negatives: int
    cluster_size: int = 1
    correlation: float = 0.8

    @property
    def truth(self) -> NDArray[np.bool_]:
        return np.arange(self.positives + self.negatives) < self.positives

    @property
    def groups(self) -> NDArray[np.int64]:
        patients = math.ceil(self.positives / self.cluster_size)
        return np.r_[
            np.arange(self.positives) // self.cluster_size, patients + np.arange(self.negatives) // self.cluster_size
        ]

    def draw_noise(self, random: np.random.Generator) -> Floats:
        """Draw standard normal noise, correlated within patients, (images,)."""
        share = CLUSTER_CORRELATION if self.cluster_size > 1 else 0.0
        groups = self.groups
        return math.sqrt(share) * random.normal(size=groups.max() + 1)[groups] + math.sqrt(1 - share) * random.normal(
            size=len(groups)
        )

    def draw_scores(self, common: Floats, auc: float, random: np.random.Generator) -> Floats:
        """Draw the scores of one model with a true AUC, (images,)."""
        noise = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * self.draw_noise(random)
        return noise + math.sqrt(2) * norm.ppf(auc) * self.truth


def count_promoted(case: tuple[Design, float, float], sets: int) -> tuple[int, int]:
    """Return how many challengers are promoted by the gate's interval, and by DeLong's normal interval."""
    design, auc, deficit = case
    random = np.random.default_rng([design.positives, design.cluster_size, round(100 * auc), round(1000 * deficit)])
    truth, groups = design.truth, design.groups
    quantile = norm.ppf((1 + CONFIDENCE) / 2)
    by_gate = by_delong = 0
    for _ in range(sets):
        common = design.draw_noise(random)
        scores = [design.draw_scores(common, area, random) for area in (auc - deficit, auc)]
        by_gate += delong.auc_difference([truth], scores[:1], scores[1:], groups, CONFIDENCE).low >= -MARGIN
        estimates = delong.estimate_aucs([truth, truth], scores, groups)
        error = math.sqrt(max(0.0, np.array([1, -1]) @ estimates.covariance @ np.array([1, -1])))
        by_delong += estimates.areas[0] - estimates.areas[1] - quantile * error >= -MARGIN
    return int(by_gate), int(by_delong)


def margin_table(sets: int, correlation: float) -> pd.DataFrame:
    """Return the error rates at the margin and the power, percent, one row per design and AUC."""
    designs = [
        Design(positives, max(100, 4 * positives), size, correlation)
        for size in CLUSTER_SIZES for positives in POSITIVES if positives >= 2 * size
    ]  # fmt: skip
    cases = [(design, auc, deficit) for design in designs for auc in AUCS for deficit in (MARGIN, 0.0)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(partial(count_promoted, sets=sets), cases))
    rows = []
    for (design, auc, _), worse, equal in zip(cases[::2], counts[::2], counts[1::2], strict=True):
        patients = design.positives // design.cluster_size
        rows.append({
            "images per patient": design.cluster_size, "positive images": design.positives,
            "positive patients": patients, "AUC": auc, "judged": "yes" if patients >= MIN_CASES else "no",
            "worse by the margin": 100 * worse[0] / sets, "equal": 100 * equal[0] / sets,
            "DeLong: worse by the margin": 100 * worse[1] / sets, "DeLong: equal": 100 * equal[1] / sets,
        })  # fmt: skip
    return pd.DataFrame(rows)


def run_campaign(seed: int) -> dict[str, list[bool]]:
    """Return, by rule, whether any equal candidate is promoted, and a better one at each of POSITIONS."""
    random = np.random.default_rng([7, seed])
    design = Design(CAMPAIGN_POSITIVES, CAMPAIGN_IMAGES - CAMPAIGN_POSITIVES)
    truth, common = design.truth, design.draw_noise(random)
    champion = design.draw_scores(common, CAMPAIGN_AUC, random)

    def lower_bound(candidate: Floats, k: int, rule: str) -> float:
        return delong.auc_difference([truth], [candidate], [champion], None, RULES[rule](k)).low

    def candidates() -> Iterator[tuple[int, Floats]]:
        return ((k, design.draw_scores(common, CAMPAIGN_AUC, random)) for k in range(1, CANDIDATES + 1))

    equal = list(candidates())
    better = design.draw_scores(common, CAMPAIGN_AUC + GAIN, random)
    return {
        rule: [
            any(lower_bound(scores, k, rule) > 0 for k, scores in equal),
            *(lower_bound(better, k, rule) > 0 for k in POSITIONS),
        ]
        for rule in RULES
    }


def campaign_table(sets: int) -> pd.DataFrame:
    """Return the share of campaigns, percent, in which a candidate is promoted, one row per rule."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        campaigns = list(pool.map(run_campaign, range(sets), chunksize=10))
    columns = [f"any of {CANDIDATES} equal", *(f"a better one, candidate {k}" for k in POSITIONS)]
    rates = {rule: 100 * np.mean([campaign[rule] for campaign in campaigns], axis=0) for rule in RULES}
    return pd.DataFrame.from_dict(rates, orient="index", columns=columns).rename_axis("rule").reset_index()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["margin", "campaigns"])
    parser.add_argument("--sets", type=int, help="2000 test sets, or 1000 campaigns")
    parser.add_argument("--correlation", type=float, default=0.8)
    args = parser.parse_args()
    sets = args.sets or (2000 if args.table == "margin" else 1000)
    table = margin_table(sets, args.correlation) if args.table == "margin" else campaign_table(sets)
    print(table.to_markdown(index=False, floatfmt=[".2f" if column == "AUC" else ".1f" for column in table]))
    error = 100 * math.sqrt(0.025 * 0.975 / sets)
    print(f"{sets:,} per cell; Monte Carlo standard error of a rate of 2.5 %: {error:.2f} %")


if __name__ == "__main__":
    main()
