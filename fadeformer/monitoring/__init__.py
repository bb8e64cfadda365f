"""Drift monitoring: compare new images with the reference data of a model."""
