"""Matplotlib figures of predictions, metrics and images."""
