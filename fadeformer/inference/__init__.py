"""Inference: trained classifiers, calibration, operating points, out-of-distribution detection and export."""
