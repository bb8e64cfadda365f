"""Calibration: planted temperatures and offsets are found, decisions or orders stay, perfection on val is no proof."""

import numpy as np
import pytest
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.linear_model import LogisticRegression

from fadeformer.evaluation.metrics import auc, log_loss
from fadeformer.inference import calibration
from fadeformer.inference.calibration import IDENTITY, Calibration
from fadeformer.tasks import TASKS

CLASSES, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]


def exclusive(images: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the true shares, and scores of a network that is overconfident by the temperature."""
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(images, 5))
    labels = np.array([random.choice(5, p=shares) for shares in softmax(logits, axis=1)])[:, None]
    return labels, softmax(logits * temperature, axis=1)


def findings(images: int, slope: np.ndarray, offset: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(images, len(slope))) - 1
    labels = (random.random(logits.shape) < expit(logits)).astype(np.int64)
    return labels, expit((logits - offset) / slope)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_planted_temperature_is_found_and_no_decision_changes(temperature):
    labels, scores = exclusive(8000, temperature)
    found = calibration.fit_calibration(labels, scores, CLASSES)
    assert 1 / found.slope[0] == pytest.approx(temperature, rel=0.05)
    after = found(scores, CLASSES)
    assert after.sum(axis=1) == pytest.approx(1)
    assert np.array_equal(CLASSES.decide(after), CLASSES.decide(scores))
    assert log_loss(labels, after, CLASSES) <= log_loss(labels, scores, CLASSES) + 1e-6


def test_the_temperature_is_the_best_of_a_fine_grid():
    labels, scores = exclusive(300, 2.0)
    right = 301 / 302
    targets = np.where(labels == np.arange(5), right, (1 - right) / 4)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 20_001))
    losses = [-(targets * log_softmax(slope * np.log(scores), axis=1)).sum(axis=1).mean() for slope in grid]
    assert calibration.fit_calibration(labels, scores, CLASSES).slope[0] == pytest.approx(
        grid[np.argmin(losses)], rel=5e-4
    )


def test_planted_slopes_and_offsets_are_found_and_no_order_changes():
    slope, offset = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.5, 0.0])
    labels, scores = findings(8000, slope, offset)
    found = calibration.fit_calibration(labels, scores, FINDINGS)
    assert found.slope == pytest.approx(slope, rel=0.1)
    assert found.offset == pytest.approx(offset, abs=0.15)
    after = found(scores, FINDINGS)
    assert auc(labels, after, FINDINGS) == pytest.approx(auc(labels, scores, FINDINGS), abs=1e-12)


def test_vector_scaling_is_a_logistic_regression_on_platts_targets():
    labels, scores = findings(200, np.array([0.5]), np.array([1.0]))
    truth = labels[:, 0].astype(bool)
    positive = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    logits = np.tile(logit(scores), (2, 1))
    outcome, weight = np.repeat([1, 0], 200), np.concatenate([positive, 1 - positive])
    rival = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits, outcome, sample_weight=weight)
    found = calibration.fit_calibration(labels, scores, FINDINGS)
    assert (found.slope[0], found.offset[0]) == pytest.approx((rival.coef_[0, 0], rival.intercept_[0]), rel=1e-4)


def test_a_val_set_without_a_mistake_does_not_make_certain():
    labels = np.repeat([0, 1], 50)[:, None]
    scores = np.where(labels == np.arange(2), 0.8, 0.2)
    after = calibration.fit_calibration(labels, scores, TASKS["binary-class"])(scores, TASKS["binary-class"])
    assert after.max() == pytest.approx(101 / 102, abs=1e-4)


def test_a_finding_that_val_cannot_judge_stays_as_it_is_and_saturated_scores_stay_finite():
    labels = np.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    scores = np.array([[0.0, 1.0], [0.3, 0.0], [1.0, 0.6], [0.2, 0.7]])
    found = calibration.fit_calibration(labels, scores, FINDINGS)
    assert (found.slope[0], found.offset[0]) == (1.0, 0.0)
    after = found(scores, FINDINGS)
    assert np.isfinite(after).all()
    assert after[:, 0] == pytest.approx(scores[:, 0])
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(Calibration((0.5,), (0.0,))(certain, TASKS["binary-class"])).all()


def test_a_description_gives_the_same_calibration_and_none_changes_nothing():
    one = Calibration((0.5, 2.0), (1.0, -1.0))
    assert calibration.from_dict(one.to_dict()) == one
    scores = np.random.default_rng(0).random((4, 3))
    assert IDENTITY(scores, CLASSES) is scores
