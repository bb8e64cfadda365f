"""Synthetic blood smear data set."""
