"""Model registry: versions and aliases in MLflow, the ledger of decisions, and model packages."""
