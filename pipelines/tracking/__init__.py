"""MLflow tracking: the store, runs, the journal of a training, and resuming."""
