"""Measures of weighted images are those of the images repeated; DeLong and bootstrap agree with slow plain versions."""

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
from tests.evaluation.test_metrics import made, some

MULTI_LABEL = "multi-label, binary-class"


@given(some, st.integers(0, 1000))
def test_a_weight_counts_an_image_so_many_times(p, seed):
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(p.frame))).astype(float)
    weights[:, 0] += 1
    found = WeightedMetrics(p).compute(weights)
    for sample, counts in enumerate(weights.astype(int)):
        repeated = Predictions(p.frame.loc[p.frame.index.repeat(counts)].reset_index(drop=True), p.task, p.classes)
        truth = metrics.one_versus_rest(repeated.labels, len(p.classes), p.task)
        for c in range(len(p.classes)):
            if truth[:, c].all() or not truth[:, c].any():
                assert not np.isfinite(found.per_class["auc"][sample, c])
                continue
            score = repeated.scores[:, c]
            assert found.per_class["auc"][sample, c] == pytest.approx(sk.roc_auc_score(truth[:, c], score))
            area = sk.average_precision_score(truth[:, c], score)
            assert found.per_class["average_precision"][sample, c] == pytest.approx(area)
        for name in ("accuracy", "loss", "brier"):
            expected = summary.summarize(repeated)["overall"][name]
            assert found.overall[name][sample] == pytest.approx(expected)


@given(some)
def test_the_auc_of_training_and_gate_is_that_of_the_evaluation_to_the_last_bit(p):
    assert metrics.auc(p.labels, p.scores, p.task) == summary.summarize(p)["overall"]["auc"]


def test_the_calibration_error_is_that_of_its_bins_by_hand():
    """20 bins would be unlike these 15: quantiles at 1/15, ... of 30 scores leave two in each."""
    p = made("binary-class", 2, 30, 3)
    order = np.argsort(p.scores[:, 1])
    score, outcome = p.scores[order, 1], p.labels[order, 0]
    bins = np.searchsorted(np.quantile(score, np.arange(1, 15) / 15), score, side="right")
    gaps = [abs((score - outcome)[bins == b].sum()) for b in range(15)]
    assert len(np.unique(bins)) == 15
    assert summary.summarize(p)["overall"]["calibration_error"] == pytest.approx(sum(gaps) / 30)


def plain_delong(truth, scores):
    """Every pair, one after the other, by the formulas of the paper."""
    kernel = [np.array([[(p > n) + 0.5 * (p == n) for n in s[~truth]] for p in s[truth]], dtype=float) for s in scores]
    over_negatives, over_positives = ([k.mean(axis=axis) for k in kernel] for axis in (1, 0))
    spread = np.cov(over_negatives) / truth.sum() + np.cov(over_positives) / (~truth).sum()
    return np.array([k.mean() for k in kernel]), spread


@given(st.integers(0, 10_000), st.integers(6, 40), st.booleans())
def test_delong_is_that_of_the_paper(seed, images, coarse):
    random = np.random.default_rng(seed)
    truth = np.arange(images) % 3 == 0
    scores = [random.normal(size=images) + truth for _ in range(2)]
    scores = [np.round(s) for s in scores] if coarse else scores
    found = delong.estimate_aucs([truth, truth], scores)
    values, covariance = plain_delong(truth, scores)
    np.testing.assert_allclose(found.areas, values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-10)


@pytest.mark.parametrize("of_a_group", [1, 3])
def test_delong_is_a_bootstrap_of_groups(of_a_group):
    """20,000 draws: the standard error of a standard deviation is 0.5 % of it."""
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(150), of_a_group)
    shared = random.normal(size=150)[groups]
    truth = (np.arange(150) % 2 == 0)[groups] if of_a_group > 1 else np.arange(150) % 2 == 0
    score = truth + shared + 0.5 * random.normal(size=len(groups))
    found = delong.estimate_aucs([truth], [score], groups)
    p = made("binary-class", 2, len(groups), 0)
    p.frame["label"], p.frame["score_1"] = truth.astype(int), score
    measure = WeightedMetrics(p)
    stratum = bootstrap.assign_strata(measure.truth, groups)
    parts = bootstrap.map_resamples(lambda w: measure.compute(w).per_class["auc"][:, 1], groups, stratum, 20_000, 0)
    # the bootstrap's variance lacks n / (n - 1), here of 75 groups a class
    spread = np.concatenate(parts).std() * np.sqrt(75 / 74)
    assert np.sqrt(found.covariance[0, 0]) == pytest.approx(spread, rel=0.03)
    if of_a_group > 1:
        assert np.sqrt(delong.estimate_aucs([truth], [score]).covariance[0, 0]) < 0.8 * spread


def test_degrees_of_freedom_are_those_of_brunner_and_munzel():
    """By scipy's own test, of which the AUC is the effect: its p is 0.05 at the end of the plain interval."""
    random = np.random.default_rng(0)
    truth = np.arange(40) < 9
    score = random.normal(size=40) + truth
    found = delong.estimate_aucs([truth], [score])
    p = stats.brunnermunzel(score[~truth], score[truth]).pvalue
    error = np.sqrt(found.covariance[0, 0])
    assert 2 * stats.t.sf(abs(found.areas[0] - 0.5) / error, found.degrees_of_freedom[0]) == pytest.approx(p)


def test_two_models_that_rank_alike_do_not_differ():
    truth, score = np.array([True, False, True, False]), np.array([0.9, 0.4, 0.3, 0.1])
    same = delong.auc_difference([truth], [score], [2 * score])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = delong.auc_difference([truth], [np.array([0.9, 0.4, 0.6, 0.1])], [score])
    assert better.value == 0.25
    assert better.low < 0.25 < better.high


def test_delong_needs_two_of_each_kind():
    truth, score = np.array([True, False, False]), np.array([0.9, 0.5, 0.1])
    found = delong.estimate_aucs([truth], [score])
    assert found.areas == [1.0]
    assert delong.mean_auc_interval(found, [0], 0.95) is None
    with pytest.raises(ValueError, match="positives and negatives"):
        delong.estimate_aucs([np.array([True, True])], [np.array([0.1, 0.2])])
    with pytest.raises(ValueError, match="two groups"):
        delong.auc_difference([truth], [score], [score])


def test_a_perfect_auc_is_not_certain():
    truth = np.arange(40) % 2 == 0
    found = delong.estimate_aucs([truth], [truth.astype(float)])
    low, high = delong.mean_auc_interval(found, [0], 0.95)
    assert (low, high) == wilson_interval(20, 20)
    assert 0.8 < low < 0.9


def test_wilson_is_that_of_the_books():
    """Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3."""
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson_interval(hits, trials) == pytest.approx(expected, abs=5e-5)


def test_samples_keep_groups_whole_and_every_class():
    """Five groups of two images have the first class, six of one the second, seven of three none."""
    groups = np.concatenate([np.repeat(np.arange(5), 2), np.arange(5, 11), np.repeat(np.arange(11, 18), 3)])
    truth = np.zeros((37, 2), dtype=bool)
    truth[0:10:2, 0] = True
    truth[10:16, 1] = True
    stratum = bootstrap.assign_strata(truth, groups)
    kinds = [stratum[:5], stratum[5:11], stratum[11:]]
    assert [len(np.unique(kind)) for kind in kinds] == [1, 1, 1]
    assert len({kind[0] for kind in kinds}) == 3
    found = bootstrap.bootstrap_weights(groups, stratum, 2000, np.random.SeedSequence(0))
    for group in range(18):
        assert (np.ptp(found[:, groups == group], axis=1) == 0).all()
    of_groups = found[:, [np.flatnonzero(groups == group)[0] for group in range(18)]]
    for kind, count in ((slice(0, 5), 5), (slice(5, 11), 6), (slice(11, 18), 7)):
        assert (of_groups[:, kind].sum(axis=1) == count).all()
        assert of_groups[:, kind].var() == pytest.approx(1 - 1 / count, abs=0.05)


@pytest.mark.parametrize(("rare", "middle", "common"), [(1, 7, 9), (7, 2, 9), (7, 9, 3), (1, 2, 1)])
def test_no_group_is_taken_for_certain_where_others_could_be_drawn_in_its_place(rare, middle, common):
    labels = np.repeat([2, 1, 0], [rare, middle, common])
    truth = labels[:, None] == np.arange(3)
    truth = np.concatenate([truth, np.eye(3, dtype=bool)[np.repeat([1, 0], [20, 60])]])  # how common each class is
    groups = np.concatenate([np.arange(len(labels)), np.full(20, len(labels)), np.full(60, len(labels) + 1)])
    counts = np.bincount(bootstrap.assign_strata(truth, groups))
    assert counts.sum() == len(labels) + 2
    assert counts[counts > 0].min() >= min(5, counts.sum())


def plain_share(hits, trials, groups):
    """Variance of a ratio over groups (Cochran 1977, 11.8), and Wilson's formula for so many images."""
    names = sorted(set(groups[trials]))
    share = hits[trials].mean()
    gaps = [sum((hits[i] - share) for i in np.flatnonzero(trials & (groups == name))) for name in names]
    variance = len(names) / (len(names) - 1) * sum(gap**2 for gap in gaps) / trials.sum() ** 2
    effective, z = share * (1 - share) / variance, stats.t.ppf(0.975, len(names) - 1)
    roots = np.roots([1 + z * z / effective, -(2 * share + z * z / effective), share**2])
    return tuple(np.sort(roots))


def test_a_share_of_clustered_images_is_as_sure_as_its_patients():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 6)
    hits, trials = random.random(20)[groups] > random.random(120), random.random(120) < 0.8
    found = proportions.proportion_interval(hits, trials, groups, 0.95)
    assert found == pytest.approx(plain_share(hits, trials, groups))
    plain = wilson_interval(int((hits & trials).sum()), int(trials.sum()))
    assert found[1] - found[0] > 1.3 * (plain[1] - plain[0])
    alone = proportions.proportion_interval(hits, trials, np.arange(120), 0.95)
    assert alone == plain
    every = np.ones(120, dtype=bool)
    low, high = proportions.proportion_interval(every, every, groups, 0.95)
    assert high == 1
    assert 0.7 < low < wilson_interval(20, 20)[0]
    assert proportions.proportion_interval(every, groups == 3, groups, 0.95) is None
    assert proportions.proportion_interval(every, ~every, groups, 0.95) is None


def test_mistakes_of_a_patient_that_make_up_for_one_another_count_but_not_without_bound():
    groups, every = np.repeat(np.arange(30), 5), np.ones(150, dtype=bool)
    quantile = stats.t.ppf(0.975, 29)

    def of(*counts):
        """Patients with so many hits among five images."""
        return np.tile(np.arange(5), 30) < np.resize(counts, 30)[groups]

    varied, alike = of(2, 3, 4, 2, 4), of(2, 3, 4, 3, 3)
    found = proportions.proportion_interval(varied, every, groups, 0.95)
    assert found == pytest.approx(plain_share(varied, every, groups))
    assert (
        proportions.score_interval(0.6, 150, quantile)[0] < found[0] < proportions.score_interval(0.6, 300, quantile)[0]
    )
    assert proportions.proportion_interval(alike, every, groups, 0.95) == proportions.score_interval(0.6, 300, quantile)
    assert plain_share(alike, every, groups)[0] > proportions.score_interval(0.6, 300, quantile)[0]


def plain_precision(true, positives, false, negatives):
    """Where (false rate - ratio x sensitivity)^2 is the sum of the squares of what its limits are away from each."""
    p0, p1 = false / negatives, true / positives
    (l0, u0), (l1, u1) = wilson_interval(false, negatives), wilson_interval(true, positives)
    low = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (p0 - l0) ** 2 - (x * (u1 - p1)) ** 2, 0, p0 / p1)
    high = optimize.brentq(lambda x: (p0 - x * p1) ** 2 - (u0 - p0) ** 2 - (x * (p1 - l1)) ** 2, p0 / p1, 1e6)
    return tuple(1 / (1 + ratio * negatives / positives) for ratio in (high, low))


def counted(true, positives, false, negatives):
    """Which images are called, and which are positive."""
    called = np.arange(positives + negatives) < true
    called[positives : positives + false] = True
    return called, np.arange(positives + negatives) < positives


@pytest.mark.parametrize("counts", [(12, 15, 9, 135), (40, 60, 20, 90), (3, 50, 30, 60), (59, 60, 1, 90)])
def test_precision_is_as_sure_as_the_two_rates_that_make_it(counts):
    called, truth = counted(*counts)
    found = proportions.predictive_value_interval(called, truth, np.arange(len(truth)), 0.95)
    assert found == pytest.approx(plain_precision(*counts))
    assert found[0] < truth[called].mean() < found[1]


def test_precision_of_no_mistake_and_of_nothing_else_has_an_interval_on_one_side():
    called, truth = counted(20, 30, 0, 60)
    low, high = proportions.predictive_value_interval(called, truth, np.arange(90), 0.95)
    assert (0.75 < low < 0.9, high) == (True, 1)
    called, truth = counted(0, 30, 10, 60)
    low, high = proportions.predictive_value_interval(called, truth, np.arange(90), 0.95)
    assert (low, 0.2 < high < 0.5) == (0, True)
    assert proportions.predictive_value_interval(~called & called, truth, np.arange(90), 0.95) is None
    assert proportions.predictive_value_interval(called, truth | ~truth, np.arange(90), 0.95) is None


def test_few_groups_make_wider_percentiles():
    samples = np.random.default_rng(0).normal(size=20_000)
    many, few = (bootstrap.percentile_interval(samples, groups, 0.95) for groups in (10_000, 8))
    assert many[1] == pytest.approx(stats.norm.ppf(0.975), abs=0.05)
    assert few[1] == pytest.approx(np.sqrt(8 / 7) * stats.t.ppf(0.975, 7), abs=0.15)
    assert bootstrap.percentile_interval(samples, 1, 0.95) is None


def test_half_of_the_groups_of_each_stratum_is_drawn_whole():
    groups, stratum = np.repeat(np.arange(9), 2), np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    drawn = bootstrap.half_sample_weights(groups, stratum, 400, seed=0)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert (drawn[:, ::2] == drawn[:, 1::2]).all()  # both images of a group
    of_group = drawn[:, ::2]
    assert (of_group[:, :6].sum(axis=1) == 3).all()
    assert np.bincount(of_group[:, 6:].sum(axis=1).astype(int)).tolist() == [0, 200, 200]
    assert of_group.mean(axis=0) == pytest.approx(np.full(9, 0.5), abs=0.1)


def test_intervals_of_average_precision_allow_for_its_being_too_high_of_few_images():
    def log_odds(images: int, seed: int) -> tuple[float, float]:
        """Of the average precision of a rare class, and of the middle of its interval."""
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
    values, middles = np.array([log_odds(200, seed) for seed in range(1, 201)]).T
    too_high = values.mean() - truth
    assert too_high > 2 * values.std() / np.sqrt(len(values))
    assert abs(middles.mean() - truth) < too_high / 2


@pytest.mark.parametrize(("task", "classes"), [("binary-class", 2), ("ordinal-regression", 5), (MULTI_LABEL, 4)])
def test_intervals_hold_their_numbers_and_two_seeds_agree(task, classes):
    p = made(task, classes, 300, 1)
    p.frame["group"] = [f"patient {i // 2}" if i < 40 else None for i in range(300)]
    found = summary.summarize(p)
    one, other = (summary.confidence_intervals(p, n_resamples=2000, seed=seed, confidence=0.95) for seed in (0, 1))
    again = summary.confidence_intervals(p, n_resamples=2000, seed=0, confidence=0.95)
    assert one == again
    pairs = [(found["overall"][name], one["overall"][name], other["overall"][name]) for name in found["overall"]]
    for name, values in found["per_class"].items():
        pairs += [
            (values[key], one["per_class"][name][key], other["per_class"][name][key]) for key in one["per_class"][name]
        ]
    assert one["overall"].pop("calibration_error") is None
    known = [pair for pair in pairs if pair[1] is not None]
    assert len(known) > 8
    for value, (low, high), of_other in known:
        assert low <= value <= high
        assert np.abs(np.subtract((low, high), of_other)).max() < 0.08 * (high - low)


def test_a_perfect_number_is_not_told_to_be_certain():
    p = made("multi-class", 3, 60, 0)
    p.frame[[f"score_{c}" for c in range(3)]] = np.eye(3)[p.labels[:, 0]]
    found = summary.summarize(p)["overall"]
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)
    for name in ("auc", "accuracy"):
        assert found[name] == 1
        assert bounds["overall"][name][0] < 0.99
    for name in ("balanced_accuracy", "average_precision", "f1"):
        assert found[name] == 1
        assert bounds["overall"][name] is None
    assert bounds["per_class"]["class 0"]["recall"][0] < 0.95


def test_an_absent_class_has_no_interval():
    p = made("multi-class", 4, 60, 0, absent=1)
    found = summary.confidence_intervals(p, n_resamples=200, seed=0, confidence=0.95)
    assert found["per_class"]["class 1"]["auc"] is None
    assert found["per_class"]["class 1"]["recall"] is None
    assert found["overall"]["auc"] is not None


@pytest.mark.parametrize(
    ("value", "interval", "told"),
    [
        (0.97123, (0.9512, 0.9834), "0.97 (0.95 to 0.98)"), (0.97123, (0.9702, 0.9731), "0.971 (0.970 to 0.973)"),
        (0.5, None, "0.5000"), (None, None, "undefined"),
    ],
)  # fmt: skip
def test_numbers_are_told_to_the_digits_that_they_are_known(value, interval, told):
    assert formatting.format_with_interval(value, interval) == told
