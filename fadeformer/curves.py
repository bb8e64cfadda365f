"""Points of ROC and precision-recall curves, those of scikit-learn to the last bit.

scikit-learn itself takes a second or two to load, in each of the three stages that draw or judge; tests compare.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Truth = NDArray[np.bool_]


def roc(truth: Truth, score: Floats, *, corners: bool) -> tuple[Floats, Floats, Floats]:
    """The ROC curve, from (0, 0), where nothing is called positive, to (1, 1).

    Args:
        truth: which images are positive, (images,); some are, and some are not.
        score: (images,).
        corners: whether points between two others on a straight line are left out.

    Returns:
        False positive rate, true positive rate and the score from which on images are called positive, which is
        infinite at first; each (points,).
    """
    false, true, scores = _counted(truth, score)
    if corners and len(false) > 2:
        kept = _ends_and(np.diff(false, 2).astype(bool) | np.diff(true, 2).astype(bool))
        false, true, scores = false[kept], true[kept], scores[kept]
    false, true = np.concatenate([[0.0], false]), np.concatenate([[0.0], true])
    return false / false[-1], true / true[-1], np.concatenate([[np.inf], scores])


def precision_recall(truth: Truth, score: Floats) -> tuple[Floats, Floats]:
    """The precision-recall curve, of each recall the first and the last point alone.

    Args:
        truth: which images are positive, (images,); some are.
        score: (images,).

    Returns:
        Precision, and recall from 1 down to 0, where precision is 1 by convention; each (points,).
    """
    false, true, _ = _counted(truth, score)
    if len(false) > 2:
        steps = np.diff(true).astype(bool)
        kept = _ends_and(steps[:-1] | steps[1:])
        false, true = false[kept], true[kept]
    precision, recall = true / (true + false), true / true[-1]
    return np.concatenate([precision[::-1], [1.0]]), np.concatenate([recall[::-1], [0.0]])


def _counted(truth: Truth, score: Floats) -> tuple[Floats, Floats, Floats]:
    """False and true positives at each score or above, from the highest score to the lowest."""
    order = np.argsort(score, kind="stable")[::-1]
    truth, score = truth[order], score[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # of images that share a score
    true = np.cumsum(truth, dtype=np.float64)[last]
    return 1.0 + last - true, true, score[last]


def _ends_and(between: Truth) -> Truth:
    return np.concatenate([[True], between, [True]])
