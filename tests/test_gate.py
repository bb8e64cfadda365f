"""Who becomes champion, and why not."""

import numpy as np
import pandas as pd
import pytest

from fadeformer import gate, predictions
from fadeformer.predictions import Predictions
from fadeformer.tasks import TASKS


def judged(quality: float, *, seed: int = 0, images: int = 200, first: int = 0) -> Predictions:
    """Binary predictions whose AUC grows with quality; seed decides the noise, first the ids."""
    random = np.random.default_rng(seed)
    labels = (np.arange(images) % 2)[:, None]
    logits = random.normal(size=(images, 2)) + quality * np.eye(2)[labels[:, 0]]
    index = pd.DataFrame({"split": "test", "id": [f"test/{first + i}" for i in range(images)], "group": None})
    task = TASKS["binary-class"]
    return predictions.table(index, labels, task.probabilities(logits), task, ("normal", "pneumonia"))


GOOD, BETTER, BAD = judged(2.0), judged(3.0), judged(0.2)


@pytest.mark.parametrize(
    ("challenger", "champion", "min_auc", "promoted", "reason"),
    [
        (GOOD, None, 0.8, True, "test AUC at least 0.8: 0.9"),
        (BAD, None, 0.8, False, "test AUC at least 0.8: 0.6"),
        (BETTER, GOOD, 0.8, True, "test AUC not below that of the champion"),
        (GOOD, BETTER, 0.8, False, "test AUC not below that of the champion"),
        (GOOD, GOOD, 0.8, True, "test AUC not below that of the champion"),
        (BETTER, GOOD, 1.0, False, "test AUC at least 1"),
        (
            BETTER,
            judged(2.0, first=1),
            0.8,
            False,
            "judged on other test images; give this model its own promote.model_name",
        ),
        (BETTER, judged(2.0, images=100), 0.8, False, "judged on other test images"),
    ],
)
def test_decision(challenger, champion, min_auc, promoted, reason):
    decision = gate.decide(challenger, champion, min_auc=min_auc)
    assert decision.promoted == promoted
    assert reason in decision.reason


def test_a_test_set_that_cannot_be_judged_promotes_nobody():
    of_one_class = GOOD.frame[GOOD.frame["label"] == 0]
    decision = gate.decide(Predictions(of_one_class, GOOD.task, GOOD.classes), None, min_auc=0.0)
    assert not decision.promoted
    assert decision.auc is None
    assert "undefined" in decision.reason
