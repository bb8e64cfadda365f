"""Schema and validation of params.yaml."""
