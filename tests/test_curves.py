"""Points of curves are those of scikit-learn, and ranks those of scipy, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn import metrics as sk

from fadeformer import curves
from fadeformer.ranked import ranks


@st.composite
def cases(draw):
    """Truth of both kinds, and scores of which some are the same."""
    images = draw(st.integers(2, 40))
    truth = np.array(draw(st.lists(st.booleans(), min_size=images, max_size=images)))
    truth[draw(st.permutations(range(images)))[:2]] = [True, False]
    steps = draw(st.sampled_from([1, 3, 10, 1000]))
    score = np.array(draw(st.lists(st.integers(0, steps), min_size=images, max_size=images))) / steps
    return truth, score


@given(cases())
@pytest.mark.parametrize("corners", [True, False])
def test_roc_is_that_of_scikit_learn(corners, case):
    found, expected = curves.roc(*case, corners=corners), sk.roc_curve(*case, drop_intermediate=corners)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(cases())
def test_precision_recall_is_that_of_scikit_learn(case):
    found, expected = curves.precision_recall(*case), sk.precision_recall_curve(*case, drop_intermediate=True)
    for ours, theirs in zip(found, expected[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_many_scores_give_the_same_points_too():
    random = np.random.default_rng(0)
    truth, score = random.random(5000) < 0.3, random.random(5000).round(3)
    for corners in (True, False):
        found, expected = (
            curves.roc(truth, score, corners=corners),
            sk.roc_curve(truth, score, drop_intermediate=corners),
        )
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@given(cases())
def test_ranks_are_those_of_scipy(case):
    np.testing.assert_array_equal(ranks(case[1]), rankdata(case[1]))
