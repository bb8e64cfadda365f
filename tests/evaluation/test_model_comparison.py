"""Means over seeds and paired differences, against independent computations and known true values."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from fadeformer.evaluation import model_comparison, summary
from fadeformer.evaluation.intervals import delong
from fadeformer.evaluation.intervals.bootstrap import bootstrap_weights, encode_groups
from fadeformer.evaluation.model_comparison import METRICS, mean_over_seeds, metric_difference
from fadeformer.evaluation.predictions import Predictions, build_predictions
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.tasks import TASKS

TASK_NAMES = ("binary-class", "multi-class", "multi-label, binary-class")


def predictions(
    task_name: str, labels: np.ndarray, signal: float, random: np.random.Generator, group=None
) -> Predictions:
    """Simulated predictions; `signal` is the strength of the label in the scores."""
    task = TASKS[task_name]
    classes = labels.shape[1] if task.multi_label else int(labels.max()) + 1
    truth = labels if task.multi_label else np.eye(classes)[labels[:, 0]]
    scores = task.probabilities(signal * (2 * truth - 1) + random.normal(size=(len(labels), classes)))
    index = pd.DataFrame({"split": "test", "id": [f"{i:05d}" for i in range(len(labels))], "group": group})
    return build_predictions(index, labels, scores, task, tuple(f"class {c}" for c in range(classes)))


def random_labels(task_name: str, images: int, random: np.random.Generator) -> np.ndarray:
    if TASKS[task_name].multi_label:
        return (random.random((images, 3)) < [0.2, 0.4, 0.6]).astype(np.int64)
    return random.choice(3 if task_name == "multi-class" else 2, size=(images, 1), p=[0.6, 0.4] if task_name == "binary-class" else [0.5, 0.3, 0.2])  # fmt: skip  # noqa: E501


@pytest.fixture(params=TASK_NAMES)
def runs(request) -> dict[str, dict[int, Predictions]]:
    """Two models, three seeds each, on 240 images of 120 patients."""
    random = np.random.default_rng(5)
    labels = random_labels(request.param, 240, random)
    group = [f"patient {i // 2}" for i in range(240)]
    return {
        name: {seed: predictions(request.param, labels, signal, random, group) for seed in range(3)}
        for name, signal in (("good", 0.6), ("bad", 0.4))
    }


@pytest.mark.parametrize("metric", METRICS)
def test_mean_and_std_match_single_runs(runs, metric):
    values = [summary.summarize(run)["overall"][metric] for run in runs["good"].values()]
    result = mean_over_seeds(list(runs["good"].values()), metric)
    assert result.value == pytest.approx(np.mean(values))
    assert result.std == pytest.approx(np.std(values, ddof=1))
    assert result.num_seeds == 3
    assert result.interval[0] < result.value < result.interval[1]


@pytest.mark.parametrize("metric", METRICS)
def test_single_run_interval_matches_evaluation(runs, metric):
    one = runs["good"][0]
    result = mean_over_seeds([one], metric)
    expected = summary.confidence_intervals(one, n_resamples=2000, seed=0, confidence=0.95)["overall"][metric]
    assert result.std is None
    assert result.interval == pytest.approx(expected, abs=1e-12 if metric == "auc" else 0.012)


@pytest.mark.parametrize("metric", METRICS)
def test_variances_match_patient_bootstrap(runs, metric):
    pair = model_comparison.align([*runs["good"].values(), *runs["bad"].values()])
    groups = encode_groups(pair[0].frame["group"])
    strata = np.zeros(groups.max() + 1, dtype=np.int64)
    weights = bootstrap_weights(groups, strata, 1500, np.random.SeedSequence(0))
    samples = np.stack([WeightedMetrics(run).compute(weights).overall[metric] for run in pair])
    contrast = np.repeat([1 / 3, -1 / 3], 3)
    result = metric_difference(runs["good"], runs["bad"], metric)
    assert result.image_se == pytest.approx((contrast @ samples).std(), rel=0.1)
    means = samples[:3].mean(axis=0).std()
    variance = model_comparison._covariance(pair[:3], metric).mean()
    assert variance**0.5 == pytest.approx(means, rel=0.1)


def test_single_run_difference_equals_delong():
    random = np.random.default_rng(1)
    labels = random_labels("binary-class", 150, random)
    first, second = (predictions("binary-class", labels, signal, random) for signal in (0.8, 0.5))
    result = metric_difference({7: first}, {7: second, 8: second}, "auc")
    truth = labels[:, 0] == 1
    expected = delong.estimate_aucs([truth, truth], [first.scores[:, 1], second.scores[:, 1]])
    value, variance = expected.areas @ [1, -1], [1, -1] @ expected.covariance @ [1, -1]
    assert result.value == pytest.approx(value)
    assert result.interval == pytest.approx(norm.interval(0.95, value, variance**0.5))
    assert (result.seed_se, result.num_seeds) == (None, 1)


def test_more_seeds_narrow_interval_repeated_seed_does_not(runs):
    seeds = list(runs["good"].values())
    for metric in METRICS:
        samples = (seeds[:1], seeds, [seeds[0]] * 3)
        single, three, repeated = (mean_over_seeds(sample, metric).interval for sample in samples)
        assert three[1] - three[0] < single[1] - single[0]
        assert repeated == pytest.approx(single, abs=1e-9)


def test_seed_variance_widens_difference_interval():
    random = np.random.default_rng(3)
    labels = random_labels("binary-class", 300, random)
    stable = {seed: predictions("binary-class", labels, 0.6, random) for seed in range(3)}
    unstable = {
        seed: predictions("binary-class", labels, signal, random) for seed, signal in enumerate((0.2, 0.6, 1.0))
    }
    same, varying = metric_difference(stable, stable | {}, "auc"), metric_difference(unstable, stable, "auc")
    assert (same.value, same.image_se, same.seed_se) == (0, 0, 0)
    assert same.interval == (0, 0)
    assert varying.seed_se > 2 * varying.image_se
    # Student's t with two degrees of freedom
    assert varying.interval[1] - varying.interval[0] > 2 * 3 * varying.seed_se


def test_comparison_ignores_image_order(runs):
    shuffled = {
        seed: Predictions(run.frame.sample(frac=1, random_state=seed), run.task, run.classes)
        for seed, run in runs["bad"].items()
    }
    for metric in METRICS:
        expected = metric_difference(runs["good"], runs["bad"], metric)
        result = metric_difference(runs["good"], shuffled, metric)
        assert (result.value, result.image_se) == pytest.approx((expected.value, expected.image_se))


def test_different_images_are_rejected(runs):
    frame = runs["bad"][1].frame.iloc[:-1]
    others = {1: Predictions(frame, runs["bad"][1].task, runs["bad"][1].classes)}
    with pytest.raises(ValueError, match="differ in images"):
        metric_difference(runs["good"], others, "auc")
    with pytest.raises(ValueError, match="no training seed in common"):
        metric_difference(runs["good"], {9: runs["bad"][1]}, "auc")


def test_undefined_metrics_and_perfect_scores_without_interval():
    random = np.random.default_rng(4)
    single_class = predictions("binary-class", np.ones((20, 1), np.int64), 9.0, random)
    assert mean_over_seeds([single_class, single_class], "auc") is None
    assert metric_difference({0: single_class}, {0: single_class}, "auc") is None
    assert mean_over_seeds([single_class], "accuracy").interval is None


def test_intervals_cover_true_value():
    """Two equally good models with varying runs, on images that are hard for both; the true difference is 0."""
    random = np.random.default_rng(0)
    labels = (np.arange(160) % 4 == 0).astype(np.int64)[:, None]
    sides, repeats = 2 * labels[:, 0] - 1, 60
    coverage = dict.fromkeys(METRICS, 0)
    index = pd.DataFrame({"split": "test", "id": [f"{i:05d}" for i in range(160)], "group": None})

    def simulate_model(hard: np.ndarray) -> dict[int, Predictions]:
        own = hard + 0.5 * random.normal(size=160)
        result = {}
        for seed in range(3):
            logit = (1.2 + 0.3 * random.normal()) * sides + own + 0.3 * random.normal(size=160)
            score = 1 / (1 + np.exp(-logit))
            scores = np.stack([1 - score, score], axis=1)
            result[seed] = build_predictions(index, labels, scores, TASKS["binary-class"], ("no", "yes"))
        return result

    for _ in range(repeats):
        hard = random.normal(size=160)
        first, second = simulate_model(hard), simulate_model(hard)
        for metric in METRICS:
            low, high = metric_difference(first, second, metric).interval
            coverage[metric] += low <= 0 <= high
    assert all(0.9 <= count / repeats <= 1 for count in coverage.values()), coverage
