"""Confidence intervals: DeLong, bootstrap, Wilson and pointwise curve bands."""
