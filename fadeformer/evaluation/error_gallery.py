"""Error gallery: the most confident wrong decisions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import one_versus_rest

COLUMNS = ("row", "id", "class", "true", "predicted", "score")


def most_confident_errors(predictions: Predictions, count: int) -> pd.DataFrame:
    """List the wrong decisions by decreasing confidence, at most one per image.

    Args:
        predictions: of one split.
        count: maximum number of images.

    Returns:
        Table with columns `row` (in the predictions), `id`, `class` (index of the predicted class, or of the wrongly
        decided finding), `true` and `predicted` (names) and `score` (of the decision, in [0, 1]).
    """
    scores, task, names = predictions.scores, predictions.task, predictions.classes
    truth = one_versus_rest(predictions.labels, scores.shape[1], task)
    decisions = one_versus_rest(task.decide(scores), scores.shape[1], task)
    is_wrong = decisions != truth if task.multi_label else decisions & ~truth
    confidences = np.where(decisions, scores, 1 - scores) * is_wrong  # images, classes
    worst_class = confidences.argmax(axis=1)
    confidence = confidences.max(axis=1)
    rows = [int(row) for row in np.argsort(-confidence, kind="stable")[:count] if confidence[row] > 0]
    errors = []
    for row in rows:
        c = int(worst_class[row])
        if task.multi_label:
            true, predicted = (names[c], f"no {names[c]}")[:: 1 if truth[row, c] else -1]
        else:
            true, predicted = names[int(truth[row].argmax())], names[c]
        errors.append((row, predictions.frame["id"].iloc[row], c, true, predicted, float(confidence[row])))
    table = pd.DataFrame(errors, columns=list(COLUMNS))
    return table.astype({"row": np.int64, "class": np.int64, "score": np.float64})  # also if there are no errors
