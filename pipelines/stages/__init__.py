"""The stages of the pipeline, a module each with a `main()` that returns a summary."""

STAGES = ("download", "validate", "preprocess", "train", "evaluate", "promote")
