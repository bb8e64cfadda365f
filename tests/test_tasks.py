"""Losses, probabilities and decisions of all tasks, compared with torch, torchvision, scipy, scikit-learn and loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from fadeformer.errors import UserError
from fadeformer.evaluation.metrics import log_loss
from fadeformer.tasks import TASKS, Task

LOGITS = arrays(np.float64, (4, 3), elements=st.floats(-700, 700))
MULTI_CLASS, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]
GRADES = TASKS["ordinal-regression"].with_head("cumulative")
ALL_TASKS = [*TASKS.values(), GRADES]
TASK_NAMES = [*TASKS, "cumulative"]
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
UNIT_WEIGHTS = torch.ones(3, dtype=torch.float64)


def random_logits(count: int = 20, outputs: int = 3, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_labels(task: Task, count: int = 20, classes: int = 3, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, *((2, (count, classes)) if task.multi_label else (classes, (count, 1)))))


def make_targets(task: Task, labels: torch.Tensor, smoothing: float = 0.0, classes: int = 3) -> torch.Tensor:
    return task.smooth_targets(task.targets(labels, classes).double(), smoothing)


@given(LOGITS)
def test_probabilities_match_scipy(logits):
    for task in TASKS.values():
        expected = special.expit(logits) if task.multi_label else special.softmax(logits, axis=1)
        np.testing.assert_allclose(task.probabilities(logits), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_training_loss_equals_reported_log_loss(task):
    logits, labels = random_logits(), random_labels(task)
    trained = task.losses(logits, make_targets(task, labels), UNIT_WEIGHTS, 0.0)
    assert trained.shape == (20,)
    reported = log_loss(labels.numpy(), task.probabilities(logits.numpy()), task)
    assert trained.mean().item() == pytest.approx(reported)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["binary-class", "multi-class", "ordinal-regression"])
def test_single_label_losses_match_torch_cross_entropy(name, smoothing):
    """Compare per image: torch's mean reduction divides by the weights, ours by the number of images."""
    task = TASKS[name]
    logits, labels = random_logits(), random_labels(task)
    expected = functional.cross_entropy(
        logits, labels[:, 0], weight=WEIGHTS, label_smoothing=smoothing, reduction="none"
    )
    torch.testing.assert_close(task.losses(logits, make_targets(task, labels, smoothing), WEIGHTS, 0.0), expected)
    soft_targets = random_logits(seed=1).softmax(dim=1)  # as after mixup
    expected = functional.cross_entropy(logits, soft_targets, weight=WEIGHTS, reduction="none")
    torch.testing.assert_close(task.losses(logits, soft_targets, WEIGHTS, 0.0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multi_label_losses_match_torch_binary_cross_entropy(smoothing):
    logits, labels = random_logits(), random_labels(FINDINGS)
    smooth = labels.double() * (1 - smoothing) + smoothing / 2
    expected = functional.binary_cross_entropy_with_logits(logits, smooth, pos_weight=WEIGHTS, reduction="none")
    losses = FINDINGS.losses(logits, make_targets(FINDINGS, labels, smoothing), WEIGHTS, 0.0)
    torch.testing.assert_close(losses, expected.mean(dim=1))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_multi_label_focal_loss_matches_torchvision(gamma):
    logits, labels = random_logits(), random_labels(FINDINGS)
    expected = sigmoid_focal_loss(logits, labels.double(), alpha=-1, gamma=gamma, reduction="none").mean(dim=1)
    torch.testing.assert_close(FINDINGS.losses(logits, make_targets(FINDINGS, labels), UNIT_WEIGHTS, gamma), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_single_label_focal_loss_matches_paper_formula(gamma):
    logits, labels = random_logits(), random_labels(MULTI_CLASS)
    scores = special.softmax(logits.numpy(), axis=1)
    expected = []
    for row, (label,) in enumerate(labels.tolist()):
        likelihood = scores[row, label]
        expected.append(-WEIGHTS[label].item() * (1 - likelihood) ** gamma * np.log(likelihood))
    losses = MULTI_CLASS.losses(logits, make_targets(MULTI_CLASS, labels), WEIGHTS, gamma)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-10)


def threshold_logits(outputs: list[float]) -> list[float]:
    logits = [outputs[0]]
    for output in outputs[1:]:
        logits.append(logits[-1] - float(np.log1p(np.exp(output))))
    return logits


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_cumulative_loss_matches_manual_threshold_losses(gamma):
    logits, labels = random_logits(outputs=3), random_labels(GRADES, classes=4)
    weights = torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=torch.float64)
    expected = []
    for outputs, (grade,) in zip(logits.tolist(), labels.tolist(), strict=True):
        threshold_losses = []
        for threshold, logit in enumerate(threshold_logits(outputs)):
            above = 1 / (1 + np.exp(-logit))
            p = above if grade > threshold else 1 - above
            threshold_losses.append(-((1 - p) ** gamma) * np.log(p))
        expected.append(weights[grade].item() * np.mean(threshold_losses))
    losses = GRADES.losses(logits, make_targets(GRADES, labels, classes=4), weights, gamma)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9)


def test_two_grades_reduce_to_binary_cross_entropy():
    logits, labels = random_logits(outputs=1), random_labels(GRADES, classes=2)
    scores = GRADES.probabilities(logits.numpy())
    np.testing.assert_allclose(scores, np.hstack([special.expit(-logits), special.expit(logits)]), rtol=1e-12)
    losses = GRADES.losses(logits, make_targets(GRADES, labels, classes=2), UNIT_WEIGHTS[:2], 0.0)
    expected = functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")[:, 0]
    torch.testing.assert_close(losses, expected)
    assert losses.mean().item() == pytest.approx(log_loss(labels.numpy(), scores, GRADES))
    correct = GRADES.decide(scores)[:, 0] == labels[:, 0].numpy()
    assert GRADES.correct(logits, labels).tolist() == correct.astype(float).tolist()


@given(arrays(np.float64, (5, 4), elements=st.floats(-20, 20)))
def test_cumulative_probabilities_are_monotonic(logits):
    above = special.expit([threshold_logits(row) for row in logits.tolist()])  # images, thresholds
    assert (np.diff(above, axis=1) <= 0).all()
    scores = GRADES.probabilities(logits)
    np.testing.assert_allclose(scores[:, ::-1].cumsum(axis=1)[:, -2::-1], above, rtol=1e-9)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-11)


@pytest.mark.parametrize("task", ALL_TASKS, ids=TASK_NAMES)
@given(arrays(np.float64, (4, 3), elements=st.floats(-30, 30)), st.integers(0, 1000))
def test_training_accuracy_matches_decisions(task, logits, seed):
    scores = task.probabilities(logits)
    sorted_scores = np.sort(scores, axis=1)
    margin = np.abs(scores - 0.5).min(axis=1) if task.multi_label else sorted_scores[:, -1] - sorted_scores[:, -2]
    is_clear = margin > 1e-9  # near ties depend on rounding
    labels = random_labels(task, 4, scores.shape[1], seed)
    expected = (task.decide(scores) == labels.numpy()).mean(axis=1)
    correct = task.correct(torch.from_numpy(logits), labels).numpy()
    np.testing.assert_allclose(correct[is_clear], expected[is_clear], rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("task", ALL_TASKS, ids=TASK_NAMES)
def test_losses_and_gradients_are_finite_for_extreme_logits(task, gamma):
    values = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0])
    logits = torch.cartesian_prod(values, values, values).requires_grad_()
    classes = 3 + task.num_omitted_outputs
    for label in range(2 if task.multi_label else classes):
        labels = torch.full((len(logits), classes if task.multi_label else 1), label)
        for smoothing in (0.0, 0.1):
            targets = task.smooth_targets(task.targets(labels, classes), smoothing)
            losses = task.losses(logits, targets, torch.ones(classes), gamma)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            assert losses.isfinite().all()
            assert (losses >= 0).all()
            assert gradient.isfinite().all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_class_weights_match_scikit_learn(labels):
    weights = MULTI_CLASS.balanced_weights(np.array(labels)[:, None], 4)
    present = np.unique(labels)
    expected = np.ones(4)
    # scikit-learn uses the number of present classes, we use the number of all classes
    expected[present] = compute_class_weight("balanced", classes=present, y=labels) * len(present) / 4
    np.testing.assert_allclose(weights, expected)


@given(arrays(np.int64, st.tuples(st.integers(1, 20), st.just(3)), elements=st.integers(0, 1)))
def test_finding_weights_are_negatives_over_positives(labels):
    for column, weight in zip(labels.T.tolist(), FINDINGS.balanced_weights(labels, 3), strict=True):
        positives, negatives = column.count(1), column.count(0)
        assert weight == pytest.approx(negatives / positives if positives else 1.0)


def test_cumulative_head_requires_ordinal_task():
    for name, task in TASKS.items():
        assert task.with_head("auto") is task
        if name != "ordinal-regression":
            with pytest.raises(UserError, match=r"model\.head is cumulative, .* but the task is " + name):
                task.with_head("cumulative")
    assert (GRADES.name, GRADES.num_omitted_outputs) == ("ordinal-regression", 1)
