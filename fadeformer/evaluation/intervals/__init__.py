"""Confidence intervals (DeLong, bootstrap, Wilson, curve bands), differences of paired metrics, and multiple testing."""
