"""Overrides and presets of params.yaml, and the check before `dvc repro`."""
