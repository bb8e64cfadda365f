"""The areas under a curve, from scores that are sorted once: of images that each weigh so much, many samples at a time.

Counts are whole numbers, so an AUC is exact but for its last division, whatever the order of the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


class RankedScores:
    """One curve's scores in order.

    Args:
        truth: which scores belong to positives, (scores,).
        score: (scores,).
        rows: the image of each score.
    """

    def __init__(self, truth: Truth, score: Floats, rows: NDArray[np.int64]) -> None:
        order = np.argsort(score, kind="stable")
        truth, score, rows = truth[order], score[order], rows[order]
        self.negatives, self.positives = rows[~truth], rows[truth]
        values, self.first = np.unique(score[truth], return_index=True)  # of positives that share a score
        below = np.searchsorted(score[~truth], values, side="left")
        up_to = np.searchsorted(score[~truth], values, side="right")
        # negatives are counted in stretches between two positives, which are few, not one by one
        edges = np.unique(np.concatenate([[0], below, up_to]))
        self.starts = edges[edges < len(self.negatives)]
        self.below, self.up_to = np.searchsorted(edges, below), np.searchsorted(edges, up_to)

    def auc_and_ap(self, weights: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
        """Area under the ROC curve, ties counted half, and average precision, both (samples,)."""
        stretches = np.add.reduceat(np.take(weights, self.negatives, axis=1), self.starts, axis=1)
        negatives = np.zeros((len(weights), len(self.starts) + 1))
        np.cumsum(stretches, axis=1, out=negatives[:, 1:])
        below, all_negatives = negatives[:, self.below], negatives[:, -1:]
        positives = np.take(weights, self.positives, axis=1)
        if len(self.first) < len(self.positives):
            positives = np.add.reduceat(positives, self.first, axis=1)
        positives = positives.astype(np.float64, copy=False)
        up_to = np.cumsum(positives, axis=1)
        all_positives = up_to[:, -1:]
        area = (positives * (below + negatives[:, self.up_to])).sum(axis=1, keepdims=True) / 2
        true = all_positives - up_to + positives  # positives at each threshold or above
        false = all_negatives - below
        precision = np.divide(true, true + false, out=np.zeros_like(true), where=true > 0)
        average = (positives * precision).sum(axis=1, keepdims=True)
        return (area / (all_positives * all_negatives))[:, 0], (average / all_positives)[:, 0]
