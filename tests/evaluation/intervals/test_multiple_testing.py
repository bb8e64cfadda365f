"""Step-down adjustment of p-values for independent, identical and correlated tests."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from fadeformer.evaluation.intervals.multiple_testing import step_down

ALPHA = 0.05


def test_single_test_is_not_adjusted():
    tests = step_down(np.array([0.03]), np.eye(1), ALPHA, 0)
    assert tests.p_values[0] == pytest.approx(0.03, abs=0.004)
    assert tests.tail == pytest.approx(ALPHA, abs=0.005)


def test_independent_tests_are_adjusted_stepwise():
    p_values = np.array([0.04, 0.001, 0.5, 0.02])
    tests = step_down(p_values, np.eye(4), ALPHA, 0)
    expected = [1 - 0.96**2, 1 - 0.999**4, 0.5, 1 - 0.98**3]
    assert tests.p_values == pytest.approx(expected, abs=0.008)
    assert tests.tail == pytest.approx(1 - 0.95**0.25, abs=0.002)


def test_identical_tests_count_once():
    tests = step_down(np.array([0.03, 0.03, 0.03]), np.ones((3, 3)), ALPHA, 0)
    assert tests.p_values == pytest.approx([0.03] * 3, abs=0.004)
    assert tests.tail == pytest.approx(ALPHA, abs=0.005)


def test_correlated_tests_match_the_bivariate_normal():
    correlation = np.array([[1, 0.7], [0.7, 1]])
    tests = step_down(np.array([0.02, 0.9]), correlation, ALPHA, 0)
    expected = 1 - multivariate_normal.cdf([norm.isf(0.02)] * 2, cov=correlation)
    assert tests.p_values[0] == pytest.approx(expected, abs=0.004)


def test_adjusted_p_values_keep_their_order():
    p_values = np.array([0.2, 1.0, 0.001, 0.001, 1e-12])
    tests = step_down(p_values, np.eye(5), ALPHA, 0)
    assert (np.diff(tests.p_values[np.argsort(p_values, kind="stable")]) >= 0).all()
    assert tests.p_values[1] == 1
    assert tests.p_values[4] < 1e-4
    assert (step_down(p_values, np.eye(5), ALPHA, 0).p_values == tests.p_values).all()
