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
