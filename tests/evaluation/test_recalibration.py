"""Calibration slope and intercept: definitions, limits, and intervals for independent and clustered images."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from fadeformer.evaluation.recalibration import recalibrate, recalibration_intervals


def sample(images: int, seed: int, *, intercept: float = 0.0, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(-1.5, 1.5, images)
    return random.random(images) < expit(intercept + slope * logits), expit(logits)


def test_slope_is_that_of_logistic_regression():
    truth, score = sample(400, 0, intercept=0.5, slope=0.6)
    regression = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit(score)[:, None], truth)
    assert recalibrate(truth, score).slope == pytest.approx(regression.coef_[0, 0], rel=1e-5)


def test_intercept_is_of_regression_with_slope_one():
    truth, score = sample(400, 0, intercept=-1.0, slope=0.6)
    expected = brentq(lambda value: (expit(value + logit(score)) - truth).sum(), -10, 10)
    assert recalibrate(truth, score).intercept == pytest.approx(expected, abs=1e-8)


def test_calibrated_scores_have_slope_one():
    truth, score = sample(200_000, 0)
    fitted = recalibrate(truth, score)
    assert fitted.slope == pytest.approx(1, abs=0.02)
    assert fitted.intercept == pytest.approx(0, abs=0.02)
    overstated = expit(logit(score) + np.log(4))
    assert np.exp(-recalibrate(truth, overstated).intercept) == pytest.approx(4, rel=0.03)
    assert recalibrate(truth, expit(2 * logit(score))).slope == pytest.approx(0.5, rel=0.02)


def test_other_class_of_two_mirrors_the_intercept():
    truth, score = sample(300, 1, intercept=0.4)
    first, second = recalibrate(truth, score), recalibrate(~truth, 1 - score)
    assert second.slope == pytest.approx(first.slope, rel=1e-6)
    assert second.intercept == pytest.approx(-first.intercept, rel=1e-6)
    groups = np.arange(300)
    first, second = (recalibration_intervals(t, s, groups, 0.95) for t, s in ((truth, score), (~truth, 1 - score)))
    assert second.slope == pytest.approx(first.slope, rel=1e-6)
    assert second.intercept == pytest.approx((-first.intercept[1], -first.intercept[0]), rel=1e-6)


def test_undefined_estimates_are_none():
    score, groups = np.array([0.1, 0.2, 0.3, 0.8]), np.arange(4)
    for truth in (np.zeros(4, bool), np.ones(4, bool)):
        assert recalibrate(truth, score) == (None, None)
        assert recalibration_intervals(truth, score, groups, 0.95) == (None, None)
    separated = np.array([False, False, True, True])
    assert recalibrate(separated, score).slope is None
    assert np.isfinite(recalibrate(separated, score).intercept)
    assert recalibrate(separated, np.full(4, 0.5)).slope is None
    assert recalibrate(~separated, score).slope is None


def test_certain_scores_give_finite_estimates():
    truth, score = np.array([False, True, True, False, True]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    assert np.isfinite(recalibrate(truth, score)).all()


def test_positives_of_one_patient_have_no_interval():
    truth, score = sample(60, 0)
    groups = np.where(truth, 0, np.arange(60) + 1)
    assert recalibration_intervals(truth, score, groups, 0.95) == (None, None)


def test_repeated_images_do_not_narrow_intervals():
    truth, score = sample(200, 0)
    single = recalibration_intervals(truth, score, np.arange(200), 0.95)
    repeated = recalibration_intervals(truth.repeat(4), score.repeat(4), np.arange(200).repeat(4), 0.95)
    for first, second in zip(single, repeated, strict=True):
        assert second == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("per_patient", [1, 4])
def test_intervals_cover_the_truth(per_patient):
    """200 sets: 95 % intervals contain the truth in 180 to 198 of them, with 99.8 % probability."""
    hits = np.zeros(2)
    for seed in range(200):
        truth, score = sample(200, seed)
        groups = np.arange(200).repeat(per_patient)
        intervals = recalibration_intervals(truth.repeat(per_patient), score.repeat(per_patient), groups, 0.95)
        hits += [low <= value <= high for value, (low, high) in zip((1.0, 0.0), intervals, strict=True)]
    assert (hits >= 180).all()
    assert (hits <= 198).all()
