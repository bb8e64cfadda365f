"""Confidence intervals (DeLong, bootstrap, Wilson, curve bands), paired differences, and multiple testing."""
