"""ROC AUC and average precision of weighted samples, from scores that are sorted once.

Evaluates many bootstrap resamples at a time. Weights are integers, so an AUC is exact up to its final division and does
not depend on the order of the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


class RankedScores:
    """Sorted scores of one curve.

    Args:
        truth: True for the scores of positives, (scores,).
        score: (scores,).
        rows: image index of each score, (scores,).
    """

    def __init__(self, truth: Truth, score: Floats, rows: NDArray[np.int64]) -> None:
        order = np.argsort(score, kind="stable")
        truth, score, rows = truth[order], score[order], rows[order]
        self.negatives, self.positives = rows[~truth], rows[truth]
        values, self.first = np.unique(score[truth], return_index=True)  # first positive of each distinct score
        below = np.searchsorted(score[~truth], values, side="left")
        up_to = np.searchsorted(score[~truth], values, side="right")
        # negatives are summed in runs between two positives, of which there are few, not one by one
        edges = np.unique(np.concatenate([[0], below, up_to]))
        self.starts = edges[edges < len(self.negatives)]
        self.below, self.up_to = np.searchsorted(edges, below), np.searchsorted(edges, up_to)

    def auc_and_ap(self, weights: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
        """Compute ROC AUC (ties count half) and average precision, both (samples,), for weights (samples, images)."""
        runs = np.add.reduceat(np.take(weights, self.negatives, axis=1), self.starts, axis=1)
        negatives = np.zeros((len(weights), len(self.starts) + 1))
        np.cumsum(runs, axis=1, out=negatives[:, 1:])
        below, all_negatives = negatives[:, self.below], negatives[:, -1:]
        positives = np.take(weights, self.positives, axis=1)
        if len(self.first) < len(self.positives):
            positives = np.add.reduceat(positives, self.first, axis=1)
        positives = positives.astype(np.float64, copy=False)
        up_to = np.cumsum(positives, axis=1)
        all_positives = up_to[:, -1:]
        area = (positives * (below + negatives[:, self.up_to])).sum(axis=1, keepdims=True) / 2
        tp = all_positives - up_to + positives  # true positives at each threshold
        fp = all_negatives - below
        precision = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp > 0)
        precision_sum = (positives * precision).sum(axis=1, keepdims=True)
        return (area / (all_positives * all_negatives))[:, 0], (precision_sum / all_positives)[:, 0]
