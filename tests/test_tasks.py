"""Losses, probabilities and decisions of each task against scipy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special

from fadeformer.metrics import log_loss
from fadeformer.tasks import TASKS

LOGITS = arrays(np.float64, (4, 3), elements=st.floats(-700, 700))


@given(LOGITS)
def test_probabilities_are_those_of_scipy(logits):
    for task in TASKS.values():
        expected = special.expit(logits) if task.multi_label else special.softmax(logits, axis=1)
        np.testing.assert_allclose(task.probabilities(logits), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_loss_that_is_trained_is_the_loss_that_is_reported(task):
    random = np.random.default_rng(0)
    logits = random.normal(size=(20, 3))
    labels = random.integers(0, 2, (20, 3)) if task.multi_label else random.integers(0, 3, (20, 1))
    trained = task.loss(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert trained == pytest.approx(log_loss(labels, task.probabilities(logits), task))


def test_one_class_is_decided_for_exclusive_ones_and_any_number_of_findings():
    scores = np.array([[0.2, 0.7, 0.1], [0.5, 0.6, 0.9]])
    assert TASKS["multi-class"].decide(scores).tolist() == [[1], [2]]
    assert TASKS["multi-label, binary-class"].decide(scores).tolist() == [[0, 1, 0], [0, 1, 1]]
