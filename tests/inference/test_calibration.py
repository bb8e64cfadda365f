"""Calibration: known temperatures and offsets are recovered, decisions and rankings do not change."""

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
    """Labels drawn from true probabilities, and scores that are overconfident by `temperature`."""
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(images, 5))
    labels = np.array([random.choice(5, p=probabilities) for probabilities in softmax(logits, axis=1)])[:, None]
    return labels, softmax(logits * temperature, axis=1)


def findings(images: int, slope: np.ndarray, offset: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(images, len(slope))) - 1
    labels = (random.random(logits.shape) < expit(logits)).astype(np.int64)
    return labels, expit((logits - offset) / slope)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered_without_changing_decisions(temperature):
    labels, scores = exclusive(8000, temperature)
    fitted = calibration.fit_calibration(labels, scores, CLASSES)
    assert 1 / fitted.slope[0] == pytest.approx(temperature, rel=0.05)
    calibrated = fitted(scores, CLASSES)
    assert calibrated.sum(axis=1) == pytest.approx(1)
    assert np.array_equal(CLASSES.decide(calibrated), CLASSES.decide(scores))
    assert log_loss(labels, calibrated, CLASSES) <= log_loss(labels, scores, CLASSES) + 1e-6


def test_temperature_matches_grid_search():
    labels, scores = exclusive(300, 2.0)
    target = 301 / 302
    targets = np.where(labels == np.arange(5), target, (1 - target) / 4)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 20_001))
    losses = [-(targets * log_softmax(slope * np.log(scores), axis=1)).sum(axis=1).mean() for slope in grid]
    assert calibration.fit_calibration(labels, scores, CLASSES).slope[0] == pytest.approx(
        grid[np.argmin(losses)], rel=5e-4
    )


def test_slopes_and_offsets_are_recovered():
    slope, offset = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.5, 0.0])
    labels, scores = findings(8000, slope, offset)
    fitted = calibration.fit_calibration(labels, scores, FINDINGS)
    assert fitted.slope == pytest.approx(slope, rel=0.1)
    assert fitted.offset == pytest.approx(offset, abs=0.15)
    calibrated = fitted(scores, FINDINGS)
    assert auc(labels, calibrated, FINDINGS) == pytest.approx(auc(labels, scores, FINDINGS), abs=1e-12)


def test_scaling_matches_logistic_regression_on_platt_targets():
    labels, scores = findings(200, np.array([0.5]), np.array([1.0]))
    truth = labels[:, 0].astype(bool)
    positive = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    logits = np.tile(logit(scores), (2, 1))
    outcomes, weight = np.repeat([1, 0], 200), np.concatenate([positive, 1 - positive])
    regression = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logits, outcomes, sample_weight=weight)
    fitted = calibration.fit_calibration(labels, scores, FINDINGS)
    assert (fitted.slope[0], fitted.offset[0]) == pytest.approx(
        (regression.coef_[0, 0], regression.intercept_[0]), rel=1e-4
    )


def test_perfect_val_gives_no_certain_scores():
    labels = np.repeat([0, 1], 50)[:, None]
    scores = np.where(labels == np.arange(2), 0.8, 0.2)
    calibrated = calibration.fit_calibration(labels, scores, TASKS["binary-class"])(scores, TASKS["binary-class"])
    assert calibrated.max() == pytest.approx(101 / 102, abs=1e-4)


def test_unevaluable_finding_stays_uncalibrated_and_finite():
    labels = np.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    scores = np.array([[0.0, 1.0], [0.3, 0.0], [1.0, 0.6], [0.2, 0.7]])
    fitted = calibration.fit_calibration(labels, scores, FINDINGS)
    assert (fitted.slope[0], fitted.offset[0]) == (1.0, 0.0)
    calibrated = fitted(scores, FINDINGS)
    assert np.isfinite(calibrated).all()
    assert calibrated[:, 0] == pytest.approx(scores[:, 0])
    saturated = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.isfinite(Calibration((0.5,), (0.0,))(saturated, TASKS["binary-class"])).all()


def test_calibration_round_trips_and_identity_is_noop():
    original = Calibration((0.5, 2.0), (1.0, -1.0))
    assert calibration.from_dict(original.to_dict()) == original
    scores = np.random.default_rng(0).random((4, 3))
    assert IDENTITY(scores, CLASSES) is scores
