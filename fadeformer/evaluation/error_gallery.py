"""The test images that a model is most wrong about: those to look at first."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import one_versus_rest

COLUMNS = ("row", "id", "class", "true", "predicted", "score")


def most_confident_errors(predictions: Predictions, count: int) -> pd.DataFrame:
    """The wrong decisions of the highest score, the most confident first; of each image one at most.

    Args:
        predictions: of one split.
        count: images.

    Returns:
        Columns `row` (in the predictions), `id`, `class` (number of the class that was called, or of the finding that
        was called or missed), `true` and `predicted` (in words) and `score` (of what was called, in [0, 1]).
    """
    scores, task, names = predictions.scores, predictions.task, predictions.classes
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    called = one_versus_rest(task.decide(scores), scores.shape[1], task)
    is_wrong = called != truth if task.multi_label else called & ~truth
    sure = np.where(called, scores, 1 - scores) * is_wrong  # images, classes
    worst = sure.argmax(axis=1)
    confidence = sure.max(axis=1)
    rows = [int(row) for row in np.argsort(-confidence, kind="stable")[:count] if confidence[row] > 0]
    found = []
    for row in rows:
        c = int(worst[row])
        if task.multi_label:
            true, said = (names[c], f"no {names[c]}")[:: 1 if truth[row, c] else -1]
        else:
            true, said = names[int(truth[row].argmax())], names[c]
        found.append((row, predictions.frame["id"].iloc[row], c, true, said, float(confidence[row])))
    return pd.DataFrame(found, columns=list(COLUMNS))
