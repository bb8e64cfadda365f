"""Evaluation: metrics with confidence intervals, subgroups, operating points and model comparison."""
