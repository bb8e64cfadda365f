"""Price of using a test set again: each further candidate is judged at a stricter confidence level.

Of many candidates that are no better than the champion, one looks better by chance. The k-th candidate on the same test
images is judged at a one-sided error rate of alpha / (k (k + 1)), which sums to alpha over any number of candidates
(alpha spending, Foster and Stine 2008, doi:10.1111/j.1467-9868.2007.00643.x, without rewards): the probability that
any of them is promoted by chance stays below alpha. The first candidate pays nothing: alpha / 2 is the error rate of a
two-sided interval at level 1 - alpha. docs/explanation/statistics/promotion.md compares it with other rules.
"""

from __future__ import annotations


def confidence_of_candidate(confidence: float, candidate: int) -> float:
    """Return the confidence level of the intervals of the k-th candidate.

    Args:
        confidence: level for the first candidate; 1 - confidence is the error rate over all candidates.
        candidate: its number among the candidates that were judged on the same test images, from 1.
    """
    return 1 - 2 * (1 - confidence) / (candidate * (candidate + 1))
