"""Wilson, clustered and predictive value intervals against published values and naive implementations."""

import numpy as np
import pytest
from scipy import optimize, stats

from fadeformer.evaluation.intervals import proportions
from fadeformer.evaluation.intervals.proportions import wilson_interval


def test_wilson_matches_published_values():
    """Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3."""
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson_interval(hits, trials) == pytest.approx(expected, abs=5e-5)


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
    limited = proportions.score_interval(0.6, 300, quantile)
    assert proportions.proportion_interval(equal, all_images, groups, 0.95) == pytest.approx(limited)
    assert naive_proportion_interval(equal, all_images, groups)[0] > proportions.score_interval(0.6, 300, quantile)[0]


def naive_predictive_value_interval(true, positives, false, negatives, prevalence):
    """MOVER limits by root finding: (fpr - ratio * tpr)^2 equals the sum of the squared distances to their limits."""
    p0, p1 = false / negatives, true / positives
    (l0, u0), (l1, u1) = wilson_interval(false, negatives), wilson_interval(true, positives)
    low = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (p0 - l0) ** 2 - (x * (u1 - p1)) ** 2, 0, p0 / p1)
    high = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (u0 - p0) ** 2 - (x * (p1 - l1)) ** 2, p0 / p1, 1e6)
    return tuple(1 / (1 + ratio * (1 - prevalence) / prevalence) for ratio in (p0 / p1, high, low))


def masks_from_counts(true, positives, false, negatives):
    """Masks of the predicted and the true positives."""
    predicted = np.arange(positives + negatives) < true
    predicted[positives : positives + false] = True
    return predicted, np.arange(positives + negatives) < positives


@pytest.mark.parametrize("counts", [(12, 15, 9, 135), (40, 60, 20, 90), (3, 50, 30, 60), (59, 60, 1, 90)])
@pytest.mark.parametrize("prevalence", [0.01, 0.3, 0.9])
def test_predictive_value_follows_from_both_rates(counts, prevalence):
    predicted, truth = masks_from_counts(*counts)
    result = proportions.predictive_value_interval(predicted, truth, np.arange(len(truth)), 0.95, prevalence)
    assert result == pytest.approx(naive_predictive_value_interval(*counts, prevalence))
    assert result[1] < result[0] < result[2]


def test_predictive_value_at_observed_prevalence_is_precision():
    predicted, truth = masks_from_counts(40, 60, 20, 90)
    value, _, _ = proportions.predictive_value_interval(predicted, truth, np.arange(150), 0.95, 60 / 150)
    assert value == pytest.approx(truth[predicted].mean())
    value, _, _ = proportions.predictive_value_interval(~predicted, ~truth, np.arange(150), 0.95, 90 / 150)
    assert value == pytest.approx(1 - truth[~predicted].mean())


def test_extreme_predictive_value_has_one_sided_interval():
    predicted, truth = masks_from_counts(20, 30, 0, 60)
    value, low, high = proportions.predictive_value_interval(predicted, truth, np.arange(90), 0.95, 1 / 3)
    assert (value, 0.75 < low < 0.9, high) == (1, True, 1)
    predicted, truth = masks_from_counts(0, 30, 10, 60)
    value, low, high = proportions.predictive_value_interval(predicted, truth, np.arange(90), 0.95, 1 / 3)
    assert (value, low, 0.2 < high < 0.5) == (0, 0, True)
    none_predicted, all_positive = ~predicted & predicted, truth | ~truth
    assert proportions.predictive_value_interval(none_predicted, truth, np.arange(90), 0.95, 1 / 3) is None
    assert proportions.predictive_value_interval(predicted, all_positive, np.arange(90), 0.95, 1 / 3) is None


def test_mean_interval_recovers_variances_of_parts():
    """Squared distances of the bounds from the values add up for independent proportions."""
    masks = []
    for start, trials, hits in ((0, 20, 20), (20, 50, 30), (70, 30, 12)):
        rows = np.arange(100)
        masks.append((rows < start + hits, (rows >= start) & (rows < start + trials)))
    estimate = proportions.estimate_mean_proportion(masks, np.arange(100))
    counts = [(20, 20), (30, 50), (12, 30)]
    exact = [stats.binomtest(*count).proportion_ci(0.95, "exact") for count in counts]
    intervals = [(interval.low, interval.high) for interval in exact]
    values = np.array([1, 0.6, 0.4])
    lows, highs = np.array(intervals).T
    expected = (
        values.mean() + np.array([-1, 1]) * np.sqrt([((values - lows) ** 2).sum(), ((highs - values) ** 2).sum()]) / 3
    )
    assert estimate.value == pytest.approx(2 / 3)
    assert estimate.tail_bounds(0.025) == pytest.approx(expected)
    assert estimate.size == pytest.approx(9 / (1 / 20 + 1 / 50 + 1 / 30))


def test_mean_of_identical_proportions_is_one_proportion():
    random = np.random.default_rng(0)
    groups, hits, trials = np.arange(120) // 4, random.random(120) < 0.7, random.random(120) < 0.6
    estimate = proportions.estimate_mean_proportion([(hits, trials)] * 3, groups)
    single = proportions.estimate_proportion(hits, trials, groups)
    assert estimate.tail_bounds(0.025) == pytest.approx(single.tail_bounds(0.025))
    assert (estimate.size, estimate.value) == pytest.approx((single.size, single.value))
    assert proportions.estimate_mean_proportion([(hits, trials), (hits, ~hits & hits)], groups) is None


def test_exact_bounds_match_scipy():
    low, high = proportions.exact_bounds(0.9, 30, stats.norm.isf(0.001))
    expected = stats.binomtest(27, 30).proportion_ci(0.998, "exact")
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert proportions.exact_bounds(1.0, 30, 2.0)[1] == 1
    assert proportions.exact_bounds(0.0, 30, 2.0)[0] == 0


@pytest.mark.parametrize("quantile", [0.5, 3.7, 7.0, 21.0, 37.2, 60.0])
@pytest.mark.parametrize(("value", "trials"), [(20 / 23, 21.2), (0.5, 10), (0.01, 300.0)])
def test_exact_bounds_are_finite_at_every_tail(value, trials, quantile):
    low, high = proportions.exact_bounds(value, trials, quantile)
    assert 0 <= low < value < high <= 1
