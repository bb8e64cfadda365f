"""Calibration: known temperatures and offsets are recovered, shifted class frequencies are corrected."""

import numpy as np
import pytest
from scipy.optimize import minimize
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
    labels, scores = exclusive(300, 2.0, seed=1)
    truth = labels == np.arange(5)
    frequencies = truth.mean(axis=0)
    relabeled = 1 / (302 * (1 - (frequencies**2).sum()))
    targets = (1 - relabeled) * truth + relabeled * frequencies
    assert (targets * truth).sum() == pytest.approx(300 * 301 / 302)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 20_001))
    losses = [-(targets * log_softmax(slope * np.log(scores), axis=1)).sum(axis=1).mean() for slope in grid]
    fitted = calibration.fit_calibration(labels, scores, CLASSES)
    assert fitted.method == calibration.TEMPERATURE
    assert fitted.slope[0] == pytest.approx(grid[np.argmin(losses)], rel=5e-4)


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
    original = Calibration((0.5,), (1.0, -1.0), calibration.OFFSETS, (0.25, 0.75))
    assert calibration.from_dict(original.to_dict()) == original
    assert calibration.from_dict(IDENTITY.to_dict()) == IDENTITY
    scores = np.random.default_rng(0).random((4, 3))
    assert IDENTITY(scores, CLASSES) is scores


def test_models_of_earlier_versions_are_read():
    read = calibration.from_dict
    assert read({"slope": [1.0], "offset": [0.0]}) == IDENTITY
    assert read({"slope": [0.5], "offset": [0.0]}) == Calibration((0.5,), (0.0,), calibration.TEMPERATURE)
    assert read({"slope": [0.5], "offset": [1.0]}).method == calibration.PLATT


FREQUENCIES = np.array([0.7, 0.2, 0.07, 0.03])


def balanced(images: int, seed: int, *, temperature: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels with `FREQUENCIES`, and the ideal scores for equal ones; `shift` is a part of the right frequencies."""
    random = np.random.default_rng(seed)
    labels = random.choice(4, images, p=FREQUENCIES)[:, None]
    logits = 1.8 * (random.normal(size=(images, 4)) + 1.8 * (labels == np.arange(4)))
    return labels, softmax(temperature * (logits + shift * np.log(FREQUENCIES)), axis=1)


def test_prior_correction_removes_the_training_weights():
    labels, scores = balanced(2000, 0, temperature=1.5)
    fitted = calibration.fit_calibration(labels, scores, CLASSES, training_weights=1 / FREQUENCIES)
    assert fitted.method == calibration.PRIOR_CORRECTION
    assert np.diff(fitted.offset) == pytest.approx(np.diff(np.log(FREQUENCIES)))
    assert 1 / fitted.slope[0] == pytest.approx(1.5, rel=0.1)
    test_labels, test_scores = balanced(100_000, 1, temperature=1.5)
    calibrated, truth = fitted(test_scores, CLASSES), test_labels == np.arange(4)
    assert calibrated.mean(axis=0) == pytest.approx(truth.mean(axis=0), rel=0.1)
    without = calibration.fit_calibration(labels, scores, CLASSES, training_weights=np.ones(4))
    assert without.decision_weights == ()


def test_weighted_training_keeps_its_decisions():
    labels, scores = balanced(500, 0)
    fitted = calibration.fit_calibration(labels, scores, CLASSES, training_weights=1 / FREQUENCIES)
    calibrated, task = fitted(scores, CLASSES), CLASSES.with_decision_weights(fitted.decision_weights)
    assert sum(fitted.decision_weights) == pytest.approx(1)
    assert fitted.decision_weights == pytest.approx(1 / FREQUENCIES / (1 / FREQUENCIES).sum())
    assert np.array_equal(task.decide(calibrated), CLASSES.decide(scores))
    assert not np.array_equal(CLASSES.decide(calibrated), CLASSES.decide(scores))


def test_offsets_are_fitted_where_the_shift_is_unknown():
    """Half of the shift: too little for a temperature, too much for the prior correction."""
    labels, scores = balanced(2000, 0, shift=0.5)
    fitted = calibration.fit_calibration(labels, scores, CLASSES, training_weights=1 / FREQUENCIES)
    assert fitted.method == calibration.OFFSETS
    assert np.diff(fitted.offset) == pytest.approx(np.diff(np.log(FREQUENCIES)) / 2, abs=0.4)
    task = CLASSES.with_decision_weights(fitted.decision_weights)
    assert np.array_equal(task.decide(fitted(scores, CLASSES)), CLASSES.decide(scores))
    test_labels, test_scores = balanced(100_000, 1, shift=0.5)
    frequencies = (test_labels == np.arange(4)).mean(axis=0)
    assert fitted(test_scores, CLASSES).mean(axis=0) == pytest.approx(frequencies, rel=0.15)


def test_offsets_maximize_the_penalized_likelihood():
    labels, scores = balanced(2000, 0, shift=0.5)
    fitted = calibration.fit_calibration(labels, scores, CLASSES, training_weights=1 / FREQUENCIES)
    truth, known = labels == np.arange(4), np.log(FREQUENCIES) - np.log(FREQUENCIES).mean()
    relabeled = 1 / (2002 * (1 - (truth.mean(axis=0) ** 2).sum()))
    targets = (1 - relabeled) * truth + relabeled * truth.mean(axis=0)

    def loss(parameters: np.ndarray) -> float:
        log_probabilities = log_softmax(parameters[0] * np.log(scores) + parameters[1:], axis=1)
        return -(targets * log_probabilities).sum() + ((parameters[1:] - known) ** 2).sum() / 8

    expected = minimize(loss, np.append(1.0, known), method="BFGS").x
    assert [*fitted.slope, *fitted.offset] == pytest.approx(expected, abs=1e-3)
    assert sum(fitted.offset) == pytest.approx(0, abs=1e-6)


def test_absent_class_keeps_a_finite_offset():
    labels, scores = balanced(2000, 0, shift=0.5)
    keep = labels[:, 0] != 3
    fitted = calibration.fit_calibration(labels[keep], scores[keep], CLASSES, training_weights=1 / FREQUENCIES)
    assert fitted.method == calibration.OFFSETS
    assert np.abs(fitted.offset).max() < 5
    one_class = calibration.fit_calibration(np.zeros((5, 1), np.int64), scores[:5], CLASSES)
    assert (one_class.slope, one_class.offset) == ((1.0,), (0.0,))


def test_offsets_are_rare_where_they_are_not_needed():
    """One standard error: offsets replace the right default in few val sets, also small ones."""
    methods = []
    for seed in range(60):
        labels, scores = balanced(200, seed)
        methods.append(calibration.fit_calibration(labels, scores, CLASSES, training_weights=1 / FREQUENCIES).method)
    assert methods.count(calibration.PRIOR_CORRECTION) >= 54


def test_selection_keeps_groups_together():
    """Images of a patient are copies: with copies in other folds, offsets of a small val set would seem to predict."""
    replaced = []
    for groups in (np.arange(60).repeat(10), None):
        methods = []
        for seed in range(20):
            labels, scores = (values.repeat(10, axis=0) for values in balanced(60, seed, shift=1.0))
            methods.append(calibration.fit_calibration(labels, scores, CLASSES, groups=groups).method)
        replaced.append(methods.count(calibration.OFFSETS))
    assert replaced[0] <= 2
    assert replaced[1] > replaced[0]


def test_class_without_training_images_is_not_corrected():
    labels, scores = balanced(300, 0)
    fitted = calibration.fit_calibration(labels, scores, CLASSES, training_weights=np.array([1.0, 2.0, 4.0, 0.0]))
    if fitted.method == calibration.PRIOR_CORRECTION:
        assert fitted.offset[3] == 0
    assert np.isfinite(fitted(scores, CLASSES)).all()


@pytest.mark.parametrize("head", ["auto", "cumulative"])
def test_grades_of_either_head_are_corrected(head):
    """Cumulative heads have no separate offset per class: the correction applies to the grades' probabilities."""
    task = TASKS["ordinal-regression"].with_head(head)
    random = np.random.default_rng(0)
    labels = random.choice(4, 2000, p=FREQUENCIES)[:, None]
    feature = random.normal(size=2000) + 1.5 * labels[:, 0]
    density = np.exp(-0.5 * (feature[:, None] - 1.5 * np.arange(4)) ** 2)
    fitted = calibration.fit_calibration(
        labels, density / density.sum(axis=1, keepdims=True), task, training_weights=1 / FREQUENCIES
    )
    calibrated = fitted(density / density.sum(axis=1, keepdims=True), task)
    frequencies = (labels == np.arange(4)).mean(axis=0)
    assert calibrated.mean(axis=0) == pytest.approx(frequencies, rel=0.1)
