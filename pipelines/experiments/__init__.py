"""Experiments of many pipeline runs with overrides of params.yaml: grids and hyperparameter sweeps."""
