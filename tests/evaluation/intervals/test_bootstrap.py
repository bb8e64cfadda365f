"""Stratified cluster bootstrap: strata, resamples, half-samples and percentile intervals."""

import numpy as np
import pytest
from scipy import stats

from fadeformer.evaluation.intervals import bootstrap


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
