"""Many runs of the pipeline with overrides of params.yaml: one engine, for grids and for sweeps."""
