"""Confidence level of each candidate on the same test images."""

from itertools import pairwise

import pytest

from fadeformer.promotion.alpha_spending import confidence_of_candidate


def test_first_candidate_pays_nothing():
    assert confidence_of_candidate(0.95, 1) == pytest.approx(0.95)
    assert confidence_of_candidate(0.95, 2) == pytest.approx(1 - 0.1 / 6)


def test_error_rates_sum_to_alpha():
    one_sided = [(1 - confidence_of_candidate(0.95, k)) / 2 for k in range(1, 10_001)]
    assert sum(one_sided) == pytest.approx(0.05, rel=1e-3)
    assert sum(one_sided) < 0.05
    assert all(later < earlier for earlier, later in pairwise(one_sided))
