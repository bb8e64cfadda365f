"""The orchestration of FadeFormer: stages, flows, experiment tracking, model registry and command line."""
