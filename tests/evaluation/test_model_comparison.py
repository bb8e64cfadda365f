"""Means over seeds and paired differences, held against other ways to the same numbers and against known truths."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.evaluation import model_comparison, summary
from fadeformer.evaluation.intervals import delong
from fadeformer.evaluation.intervals.bootstrap import bootstrap_weights, encode_groups
from fadeformer.evaluation.model_comparison import METRICS, mean_over_seeds, metric_difference
from fadeformer.evaluation.predictions import Predictions, build_predictions
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.tasks import TASKS

KINDS = ("binary-class", "multi-class", "multi-label, binary-class")


def predictions(kind: str, labels: np.ndarray, signal: float, random: np.random.Generator, group=None) -> Predictions:
    """Scores that know the label by so much."""
    task = TASKS[kind]
    classes = labels.shape[1] if task.multi_label else int(labels.max()) + 1
    truth = labels if task.multi_label else np.eye(classes)[labels[:, 0]]
    scores = task.probabilities(signal * (2 * truth - 1) + random.normal(size=(len(labels), classes)))
    index = pd.DataFrame({"split": "test", "id": [f"{i:05d}" for i in range(len(labels))], "group": group})
    return build_predictions(index, labels, scores, task, tuple(f"class {c}" for c in range(classes)))


def labels_of(kind: str, images: int, random: np.random.Generator) -> np.ndarray:
    if TASKS[kind].multi_label:
        return (random.random((images, 3)) < [0.2, 0.4, 0.6]).astype(np.int64)
    return random.choice(3 if kind == "multi-class" else 2, size=(images, 1), p=[0.6, 0.4] if kind == "binary-class" else [0.5, 0.3, 0.2])  # fmt: skip  # noqa: E501


@pytest.fixture(params=KINDS)
def trainings(request) -> dict[str, dict[int, Predictions]]:
    """Two networks, three seeds each, on 240 images of 120 patients."""
    random = np.random.default_rng(5)
    labels = labels_of(request.param, 240, random)
    group = [f"patient {i // 2}" for i in range(240)]
    return {
        name: {seed: predictions(request.param, labels, signal, random, group) for seed in range(3)}
        for name, signal in (("good", 0.6), ("bad", 0.4))
    }


@pytest.mark.parametrize("measure", METRICS)
def test_the_mean_and_the_spread_are_those_of_each_trainings_number(trainings, measure):
    values = [summary.summarize(each)["overall"][measure] for each in trainings["good"].values()]
    found = mean_over_seeds(list(trainings["good"].values()), measure)
    assert found.value == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.num_seeds == 3
    assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.parametrize("measure", METRICS)
def test_of_one_training_the_interval_is_that_of_its_evaluation(trainings, measure):
    one = trainings["good"][0]
    found = mean_over_seeds([one], measure)
    known = summary.confidence_intervals(one, n_resamples=2000, seed=0, confidence=0.95)["overall"][measure]
    assert found.std is None
    assert found.interval == pytest.approx(known, abs=1e-12 if measure == "auc" else 0.012)


@pytest.mark.parametrize("measure", METRICS)
def test_variances_are_those_of_a_bootstrap_of_patients(trainings, measure):
    both = model_comparison.align([*trainings["good"].values(), *trainings["bad"].values()])
    groups = encode_groups(both[0].frame["group"])
    stratum = np.zeros(groups.max() + 1, dtype=np.int64)
    drawn = bootstrap_weights(groups, stratum, 1500, np.random.SeedSequence(0))
    samples = np.stack([WeightedMetrics(each).compute(drawn).overall[measure] for each in both])
    contrast = np.repeat([1 / 3, -1 / 3], 3)
    found = metric_difference(trainings["good"], trainings["bad"], measure)
    assert found.image_se == pytest.approx((contrast @ samples).std(), rel=0.1)
    means = samples[:3].mean(axis=0).std()
    variance = model_comparison._covariance(both[:3], measure).mean()
    assert variance**0.5 == pytest.approx(means, rel=0.1)


def test_the_difference_of_single_trainings_is_delongs():
    random = np.random.default_rng(1)
    labels = labels_of("binary-class", 150, random)
    first, second = (predictions("binary-class", labels, signal, random) for signal in (0.8, 0.5))
    found = metric_difference({7: first}, {7: second, 8: second}, "auc")
    known = delong.auc_difference([labels[:, 0] == 1], [first.scores[:, 1]], [second.scores[:, 1]])
    assert found.value == pytest.approx(known.value)
    assert found.interval == pytest.approx((known.low, known.high))
    assert (found.seed_se, found.num_seeds) == (None, 1)


def test_more_seeds_make_the_mean_surer_and_the_same_seed_again_does_not(trainings):
    seeds = list(trainings["good"].values())
    for measure in METRICS:
        one, three, same = (mean_over_seeds(of, measure).interval for of in (seeds[:1], seeds, [seeds[0]] * 3))
        assert three[1] - three[0] < one[1] - one[0]
        assert same == pytest.approx(one, abs=1e-9)


def test_seeds_that_disagree_widen_a_difference():
    random = np.random.default_rng(3)
    labels = labels_of("binary-class", 300, random)
    calm = {seed: predictions("binary-class", labels, 0.6, random) for seed in range(3)}
    wild = {seed: predictions("binary-class", labels, signal, random) for seed, signal in enumerate((0.2, 0.6, 1.0))}
    quiet, loud = metric_difference(calm, calm | {}, "auc"), metric_difference(wild, calm, "auc")
    assert (quiet.value, quiet.image_se, quiet.seed_se) == (0, 0, 0)
    assert quiet.interval == (0, 0)
    assert loud.seed_se > 2 * loud.image_se
    assert loud.interval[1] - loud.interval[0] > 2 * 3 * loud.seed_se  # Student's t of two degrees of freedom


def test_the_order_of_images_does_not_matter(trainings):
    shuffled = {
        seed: Predictions(each.frame.sample(frac=1, random_state=seed), each.task, each.classes)
        for seed, each in trainings["bad"].items()
    }
    for measure in METRICS:
        known = metric_difference(trainings["good"], trainings["bad"], measure)
        found = metric_difference(trainings["good"], shuffled, measure)
        assert (found.value, found.image_se) == pytest.approx((known.value, known.image_se))


def test_other_images_are_not_compared(trainings):
    frame = trainings["bad"][1].frame.iloc[:-1]
    others = {1: Predictions(frame, trainings["bad"][1].task, trainings["bad"][1].classes)}
    with pytest.raises(ValueError, match="different images"):
        metric_difference(trainings["good"], others, "auc")
    with pytest.raises(ValueError, match="no seed"):
        metric_difference(trainings["good"], {9: trainings["bad"][1]}, "auc")


def test_what_cannot_be_judged_is_undefined_and_what_is_perfect_has_no_interval():
    random = np.random.default_rng(4)
    alike = predictions("binary-class", np.ones((20, 1), np.int64), 9.0, random)
    assert mean_over_seeds([alike, alike], "auc") is None
    assert metric_difference({0: alike}, {0: alike}, "auc") is None
    assert mean_over_seeds([alike], "accuracy").interval is None


def test_intervals_hold_the_truth():
    """Two networks that are equally good, but not each training of them, on images that are hard for both."""
    random = np.random.default_rng(0)
    labels = (np.arange(160) % 4 == 0).astype(np.int64)[:, None]
    sides, repeats = 2 * labels[:, 0] - 1, 60
    held = dict.fromkeys(METRICS, 0)
    index = pd.DataFrame({"split": "test", "id": [f"{i:05d}" for i in range(160)], "group": None})

    def network(hard: np.ndarray) -> dict[int, Predictions]:
        own = hard + 0.5 * random.normal(size=160)
        found = {}
        for seed in range(3):
            logit = (1.2 + 0.3 * random.normal()) * sides + own + 0.3 * random.normal(size=160)
            score = 1 / (1 + np.exp(-logit))
            scores = np.stack([1 - score, score], axis=1)
            found[seed] = build_predictions(index, labels, scores, TASKS["binary-class"], ("no", "yes"))
        return found

    for _ in range(repeats):
        hard = random.normal(size=160)
        first, second = network(hard), network(hard)
        for measure in METRICS:
            low, high = metric_difference(first, second, measure).interval
            held[measure] += low <= 0 <= high
    assert all(0.9 <= count / repeats <= 1 for count in held.values()), held
