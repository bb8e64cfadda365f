"""Prefect deployments: flows, workspaces, artifacts, and the set-up of a Prefect server."""
