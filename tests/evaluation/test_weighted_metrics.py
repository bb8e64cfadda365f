"""Weighted metrics against repeated images; DeLong, bootstrap and proportions against naive implementations."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats
from sklearn import metrics as sk

from fadeformer.evaluation import metrics, predictions, summary
from fadeformer.evaluation.intervals import bootstrap, delong, proportions
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.evaluation.predictions import Predictions
from fadeformer.evaluation.weighted_metrics import WeightedMetrics
from fadeformer.io import formatting
from fadeformer.tasks import TASKS
from tests.evaluation.test_metrics import prediction_strategy, random_predictions

MULTI_LABEL = "multi-label, binary-class"


@given(prediction_strategy, st.integers(0, 1000))
def test_weight_equals_repeating_image(p, seed):
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(p.frame))).astype(float)
    weights[:, 0] += 1
    result = WeightedMetrics(p).compute(weights)
    for sample, counts in enumerate(weights.astype(int)):
        repeated = Predictions(p.frame.loc[p.frame.index.repeat(counts)].reset_index(drop=True), p.task, p.classes)
        truth = metrics.one_versus_rest(repeated.labels, len(p.classes), p.task)
        for c in range(len(p.classes)):
            if truth[:, c].all() or not truth[:, c].any():
                assert not np.isfinite(result.per_class["auc"][sample, c])
                continue
            score = repeated.scores[:, c]
            assert result.per_class["auc"][sample, c] == pytest.approx(sk.roc_auc_score(truth[:, c], score))
            area = sk.average_precision_score(truth[:, c], score)
            assert result.per_class["average_precision"][sample, c] == pytest.approx(area)
        for name in ("accuracy", "loss", "brier"):
            expected = summary.summarize(repeated)["overall"][name]
            assert result.overall[name][sample] == pytest.approx(expected)


@given(prediction_strategy)
def test_training_auc_equals_evaluation_auc_exactly(p):
    assert metrics.auc(p.labels, p.scores, p.task) == summary.summarize(p)["overall"]["auc"]


def test_calibration_error_matches_manual_binning():
    """15 bins at the quantiles 1/15, 2/15, ... hold two of 30 scores each, so another number of bins would differ."""
    p = random_predictions("binary-class", 2, 30, 3)
    order = np.argsort(p.scores[:, 1])
    score, outcome = p.scores[order, 1], p.labels[order, 0]
    bins = np.searchsorted(np.quantile(score, np.arange(1, 15) / 15), score, side="right")
    gaps = [abs((score - outcome)[bins == b].sum()) for b in range(15)]
    assert len(np.unique(bins)) == 15
    assert summary.summarize(p)["overall"]["calibration_error"] == pytest.approx(sum(gaps) / 30)


def naive_delong(truth, scores):
    """Formulas of the paper, evaluated pair by pair."""
    kernel = [np.array([[(p > n) + 0.5 * (p == n) for n in s[~truth]] for p in s[truth]], dtype=float) for s in scores]
    over_negatives, over_positives = ([k.mean(axis=axis) for k in kernel] for axis in (1, 0))
    spread = np.cov(over_negatives) / truth.sum() + np.cov(over_positives) / (~truth).sum()
    return np.array([k.mean() for k in kernel]), spread


@given(st.integers(0, 10_000), st.integers(6, 40), st.booleans())
def test_delong_matches_paper_formula(seed, images, coarse):
    random = np.random.default_rng(seed)
    truth = np.arange(images) % 3 == 0
    scores = [random.normal(size=images) + truth for _ in range(2)]
    scores = [np.round(s) for s in scores] if coarse else scores
    result = delong.estimate_aucs([truth, truth], scores)
    values, covariance = naive_delong(truth, scores)
    np.testing.assert_allclose(result.areas, values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.covariance, covariance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("images_per_group", [1, 3])
def test_delong_matches_group_bootstrap(images_per_group):
    """With 20,000 resamples the relative standard error of a standard deviation is 0.5 %."""
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(150), images_per_group)
    shared = random.normal(size=150)[groups]
    truth = (np.arange(150) % 2 == 0)[groups] if images_per_group > 1 else np.arange(150) % 2 == 0
    score = truth + shared + 0.5 * random.normal(size=len(groups))
    result = delong.estimate_aucs([truth], [score], groups)
    p = random_predictions("binary-class", 2, len(groups), 0)
    p.frame["label"], p.frame["score_1"] = truth.astype(int), score
    weighted = WeightedMetrics(p)
    strata = bootstrap.assign_strata(weighted.truth, groups)
    parts = bootstrap.map_resamples(lambda w: weighted.compute(w).per_class["auc"][:, 1], groups, strata, 20_000, 0)
    # the bootstrap variance lacks the factor n / (n - 1), here with 75 groups per class
    spread = np.concatenate(parts).std() * np.sqrt(75 / 74)
    assert np.sqrt(result.covariance[0, 0]) == pytest.approx(spread, rel=0.03)
    if images_per_group > 1:
        assert np.sqrt(delong.estimate_aucs([truth], [score]).covariance[0, 0]) < 0.8 * spread


def test_degrees_of_freedom_match_brunner_munzel():
    """The Brunner-Munzel test of SciPy, whose relative effect is the AUC, gives the same p-value."""
    random = np.random.default_rng(0)
    truth = np.arange(40) < 9
    score = random.normal(size=40) + truth
    result = delong.estimate_aucs([truth], [score])
    p = stats.brunnermunzel(score[~truth], score[truth]).pvalue
    error = np.sqrt(result.covariance[0, 0])
    assert 2 * stats.t.sf(abs(result.areas[0] - 0.5) / error, result.degrees_of_freedom[0]) == pytest.approx(p)


def test_identical_rankings_have_zero_difference():
    truth, score = np.array([True, False, True, False]), np.array([0.9, 0.4, 0.3, 0.1])
    same = delong.auc_difference([truth], [score], [2 * score])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = delong.auc_difference([truth], [np.array([0.9, 0.4, 0.6, 0.1])], [score])
    assert better.value == 0.25
    assert better.low < 0.25 < better.high


def test_delong_needs_two_groups_per_class():
    truth, score = np.array([True, False, False]), np.array([0.9, 0.5, 0.1])
    result = delong.estimate_aucs([truth], [score])
    assert result.areas == [1.0]
    assert delong.mean_auc_interval(result, [0], 0.95) is None
    with pytest.raises(ValueError, match="positives and negatives"):
        delong.estimate_aucs([np.array([True, True])], [np.array([0.1, 0.2])])
    with pytest.raises(ValueError, match="two groups"):
        delong.auc_difference([truth], [score], [score])


def test_perfect_auc_has_wilson_interval():
    truth = np.arange(40) % 2 == 0
    result = delong.estimate_aucs([truth], [truth.astype(float)])
    low, high = delong.mean_auc_interval(result, [0], 0.95)
    assert (low, high) == wilson_interval(20, 20)
    assert 0.8 < low < 0.9


def test_wilson_matches_published_values():
    """Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3."""
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson_interval(hits, trials) == pytest.approx(expected, abs=5e-5)


def test_resamples_keep_groups_and_classes():
    """Five groups of two images have the first class, six of first image the second, seven of three images neither."""
    groups = np.concatenate([np.repeat(np.arange(5), 2), np.arange(5, 11), np.repeat(np.arange(11, 18), 3)])
    truth = np.zeros((37, 2), dtype=bool)
    truth[0:10:2, 0] = True
    truth[10:16, 1] = True
    strata = bootstrap.assign_strata(truth, groups)
    by_stratum = [strata[:5], strata[5:11], strata[11:]]
    assert [len(np.unique(members)) for members in by_stratum] == [1, 1, 1]
    assert len({members[0] for members in by_stratum}) == 3
    result = bootstrap.bootstrap_weights(groups, strata, 2000, np.random.SeedSequence(0))
    for group in range(18):
        assert (np.ptp(result[:, groups == group], axis=1) == 0).all()
    per_group = result[:, [np.flatnonzero(groups == group)[0] for group in range(18)]]
    for members, count in ((slice(0, 5), 5), (slice(5, 11), 6), (slice(11, 18), 7)):
        assert (per_group[:, members].sum(axis=1) == count).all()
        assert per_group[:, members].var() == pytest.approx(1 - 1 / count, abs=0.05)


@pytest.mark.parametrize(("rare", "middle", "common"), [(1, 7, 9), (7, 2, 9), (7, 9, 3), (1, 2, 1)])
def test_small_strata_are_merged(rare, middle, common):
    labels = np.repeat([2, 1, 0], [rare, middle, common])
    truth = labels[:, None] == np.arange(3)
    truth = np.concatenate(
        [truth, np.eye(3, dtype=bool)[np.repeat([1, 0], [20, 60])]]
    )  # fixes the frequency order of the classes
    groups = np.concatenate([np.arange(len(labels)), np.full(20, len(labels)), np.full(60, len(labels) + 1)])
    counts = np.bincount(bootstrap.assign_strata(truth, groups))
    assert counts.sum() == len(labels) + 2
    assert counts[counts > 0].min() >= min(5, counts.sum())


def naive_proportion_interval(hits, trials, groups):
    """Variance of a ratio over groups (Cochran 1977, 11.8) and the Wilson formula for the effective sample size."""
    names = sorted(set(groups[trials]))
    proportion = hits[trials].mean()
    gaps = [sum((hits[i] - proportion) for i in np.flatnonzero(trials & (groups == name))) for name in names]
    variance = len(names) / (len(names) - 1) * sum(gap**2 for gap in gaps) / trials.sum() ** 2
    effective, z = proportion * (1 - proportion) / variance, stats.t.ppf(0.975, len(names) - 1)
    roots = np.roots([1 + z * z / effective, -(2 * proportion + z * z / effective), proportion**2])
    return tuple(np.sort(roots))


def test_clustered_proportion_uses_effective_sample_size():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 6)
    hits, trials = random.random(20)[groups] > random.random(120), random.random(120) < 0.8
    result = proportions.proportion_interval(hits, trials, groups, 0.95)
    assert result == pytest.approx(naive_proportion_interval(hits, trials, groups))
    wilson = wilson_interval(int((hits & trials).sum()), int(trials.sum()))
    assert result[1] - result[0] > 1.3 * (wilson[1] - wilson[0])
    independent = proportions.proportion_interval(hits, trials, np.arange(120), 0.95)
    assert independent == wilson
    all_images = np.ones(120, dtype=bool)
    low, high = proportions.proportion_interval(all_images, all_images, groups, 0.95)
    assert high == 1
    assert 0.7 < low < wilson_interval(20, 20)[0]
    assert proportions.proportion_interval(all_images, groups == 3, groups, 0.95) is None
    assert proportions.proportion_interval(all_images, ~all_images, groups, 0.95) is None


def test_effective_sample_size_is_limited():
    groups, all_images = np.repeat(np.arange(30), 5), np.ones(150, dtype=bool)
    quantile = stats.t.ppf(0.975, 29)

    def hits_of(*counts):
        """Mask of hits for patients with the given numbers of hits among five images."""
        return np.tile(np.arange(5), 30) < np.resize(counts, 30)[groups]

    varied, equal = hits_of(2, 3, 4, 2, 4), hits_of(2, 3, 4, 3, 3)
    result = proportions.proportion_interval(varied, all_images, groups, 0.95)
    assert result == pytest.approx(naive_proportion_interval(varied, all_images, groups))
    assert (
        proportions.score_interval(0.6, 150, quantile)[0]
        < result[0]
        < proportions.score_interval(0.6, 300, quantile)[0]
    )
    assert proportions.proportion_interval(equal, all_images, groups, 0.95) == proportions.score_interval(
        0.6, 300, quantile
    )
    assert naive_proportion_interval(equal, all_images, groups)[0] > proportions.score_interval(0.6, 300, quantile)[0]


def naive_precision_interval(true, positives, false, negatives):
    """MOVER limits by root finding: (fpr - ratio * tpr)^2 equals the sum of the squared distances to their limits."""
    p0, p1 = false / negatives, true / positives
    (l0, u0), (l1, u1) = wilson_interval(false, negatives), wilson_interval(true, positives)
    low = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (p0 - l0) ** 2 - (x * (u1 - p1)) ** 2, 0, p0 / p1)
    high = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (u0 - p0) ** 2 - (x * (p1 - l1)) ** 2, p0 / p1, 1e6)
    return tuple(1 / (1 + ratio * negatives / positives) for ratio in (high, low))


def masks_from_counts(true, positives, false, negatives):
    """Masks of the predicted and the true positives."""
    predicted = np.arange(positives + negatives) < true
    predicted[positives : positives + false] = True
    return predicted, np.arange(positives + negatives) < positives


@pytest.mark.parametrize("counts", [(12, 15, 9, 135), (40, 60, 20, 90), (3, 50, 30, 60), (59, 60, 1, 90)])
def test_precision_interval_follows_from_both_rates(counts):
    predicted, truth = masks_from_counts(*counts)
    result = proportions.predictive_value_interval(predicted, truth, np.arange(len(truth)), 0.95)
    assert result == pytest.approx(naive_precision_interval(*counts))
    assert result[0] < truth[predicted].mean() < result[1]


def test_extreme_precision_has_one_sided_interval():
    predicted, truth = masks_from_counts(20, 30, 0, 60)
    low, high = proportions.predictive_value_interval(predicted, truth, np.arange(90), 0.95)
    assert (0.75 < low < 0.9, high) == (True, 1)
    predicted, truth = masks_from_counts(0, 30, 10, 60)
    low, high = proportions.predictive_value_interval(predicted, truth, np.arange(90), 0.95)
    assert (low, 0.2 < high < 0.5) == (0, True)
    assert proportions.predictive_value_interval(~predicted & predicted, truth, np.arange(90), 0.95) is None
    assert proportions.predictive_value_interval(predicted, truth | ~truth, np.arange(90), 0.95) is None


def test_few_groups_widen_percentile_interval():
    samples = np.random.default_rng(0).normal(size=20_000)
    many, few = (bootstrap.percentile_interval(samples, groups, 0.95) for groups in (10_000, 8))
    assert many[1] == pytest.approx(stats.norm.ppf(0.975), abs=0.05)
    assert few[1] == pytest.approx(np.sqrt(8 / 7) * stats.t.ppf(0.975, 7), abs=0.15)
    assert bootstrap.percentile_interval(samples, 1, 0.95) is None


def test_half_samples_draw_groups_per_stratum():
    groups, strata = np.repeat(np.arange(9), 2), np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    weights = bootstrap.half_sample_weights(groups, strata, 400, seed=0)
    assert set(np.unique(weights)) == {0.0, 1.0}
    assert (weights[:, ::2] == weights[:, 1::2]).all()  # both images of a group
    per_group = weights[:, ::2]
    assert (per_group[:, :6].sum(axis=1) == 3).all()
    assert np.bincount(per_group[:, 6:].sum(axis=1).astype(int)).tolist() == [0, 200, 200]
    assert per_group.mean(axis=0) == pytest.approx(np.full(9, 0.5), abs=0.1)


def test_average_precision_interval_is_bias_corrected():
    def log_odds(images: int, seed: int) -> tuple[float, float]:
        """Log odds of the average precision of a rare class and of the center of its interval."""
        random, labels = np.random.default_rng(seed), (np.arange(images) % 10 == 0).astype(np.int64)[:, None]
        score = special.expit(random.normal(size=images) + 1.5 * labels[:, 0])
        index = pd.DataFrame({"split": "test", "id": [str(i) for i in range(images)], "group": None})
        scores = np.stack([1 - score, score], axis=1)
        p = predictions.build_predictions(index, labels, scores, TASKS["binary-class"], ("a", "b"))
        value = summary.summarize(p)["per_class"]["b"]["average_precision"]
        if images > 1000:
            return float(special.logit(value)), np.nan
        bounds = summary.confidence_intervals(p, n_resamples=50, seed=0, confidence=0.95)["per_class"]["b"][
            "average_precision"
        ]
        return float(special.logit(value)), float(special.logit(bounds).mean())

    truth, _ = log_odds(100_000, 0)
    values, centers = np.array([log_odds(200, seed) for seed in range(1, 201)]).T
    bias = values.mean() - truth
    assert bias > 2 * values.std() / np.sqrt(len(values))
    assert abs(centers.mean() - truth) < bias / 2


@pytest.mark.parametrize(("task", "classes"), [("binary-class", 2), ("ordinal-regression", 5), (MULTI_LABEL, 4)])
def test_intervals_contain_values_and_are_stable(task, classes):
    p = random_predictions(task, classes, 300, 1)
    p.frame["group"] = [f"patient {i // 2}" if i < 40 else None for i in range(300)]
    result = summary.summarize(p)
    first, second = (summary.confidence_intervals(p, n_resamples=2000, seed=seed, confidence=0.95) for seed in (0, 1))
    again = summary.confidence_intervals(p, n_resamples=2000, seed=0, confidence=0.95)
    assert first == again
    pairs = [(result["overall"][name], first["overall"][name], second["overall"][name]) for name in result["overall"]]
    for name, values in result["per_class"].items():
        pairs += [
            (values[key], first["per_class"][name][key], second["per_class"][name][key])
            for key in first["per_class"][name]
        ]
    assert first["overall"].pop("calibration_error") is None
    defined = [pair for pair in pairs if pair[1] is not None]
    assert len(defined) > 8
    for value, (low, high), other_bounds in defined:
        assert low <= value <= high
        assert np.abs(np.subtract((low, high), other_bounds)).max() < 0.08 * (high - low)


def test_perfect_metrics_have_no_degenerate_interval():
    p = random_predictions("multi-class", 3, 60, 0)
    p.frame[[f"score_{c}" for c in range(3)]] = np.eye(3)[p.labels[:, 0]]
    result = summary.summarize(p)["overall"]
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)
    for name in ("auc", "accuracy"):
        assert result[name] == 1
        assert bounds["overall"][name][0] < 0.99
    for name in ("balanced_accuracy", "average_precision", "f1"):
        assert result[name] == 1
        assert bounds["overall"][name] is None
    assert bounds["per_class"]["class 0"]["recall"][0] < 0.95


def test_absent_class_has_no_interval():
    p = random_predictions("multi-class", 4, 60, 0, absent=1)
    result = summary.confidence_intervals(p, n_resamples=200, seed=0, confidence=0.95)
    assert result["per_class"]["class 1"]["auc"] is None
    assert result["per_class"]["class 1"]["recall"] is None
    assert result["overall"]["auc"] is not None


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.97123, (0.9512, 0.9834), "0.97 (0.95 to 0.98)"), (0.97123, (0.9702, 0.9731), "0.971 (0.970 to 0.973)"),
        (0.5, None, "0.5000"), (None, None, "undefined"),
    ],
)  # fmt: skip
def test_digits_follow_interval_width(value, interval, text):
    assert formatting.format_with_interval(value, interval) == text
