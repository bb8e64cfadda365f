"""Locations of the project and its MLflow store or server; does not import MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from fadeformer.errors import UserError

WORKSPACES = Path(".cache/runs")  # workspaces of deployment runs
WORKSPACE_MARKER = Path(".cache/copy.json")  # in a workspace: the repository and commit it was cloned from


def project_folder() -> Path:
    """Return the project's root; for a DVC experiment or a deployment run, that of the project it was copied from."""
    here = Path.cwd()
    roots = [parent.parent for parent in here.parents if parent.name == ".dvc"]
    workspaces = [folder for folder in (here, *here.parents) if (folder / WORKSPACE_MARKER).is_file()]
    roots += [workspace.parents[len(WORKSPACES.parts)] for workspace in workspaces]
    return min(roots, key=lambda root: len(root.parts), default=here)


def local_store_uri() -> str:
    """Return the tracking URI of the project's own store."""
    return f"sqlite:///{project_folder() / 'mlruns' / 'mlflow.db'}?timeout=60"


def remote_store_uri() -> str | None:
    """Return `MLFLOW_TRACKING_URI`; None if it is the project's own store (MLflow sets the variable on connecting)."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return uri if uri and uri != local_store_uri() else None


def tracking_uri() -> str:
    """Return the tracking URI with which a process in another folder uses the same store."""
    return remote_store_uri() or local_store_uri()


def check_store() -> None:
    """Check the settings of the store; stages call it before they compute anything.

    Raises:
        UserError: MLflow cannot use the project's path in the address of its database, or `MLFLOW_REGISTRY_URI` is
            another store, which this pipeline does not support.
    """
    folder = project_folder()
    if not remote_store_uri() and ("?" in str(folder) or unquote(str(folder)) != str(folder)):
        raise UserError(
            f"{folder}: MLflow cannot open a database in a folder with ? or a percent code such as %2F in its path;"
            " rename or move the project's folder, or set MLFLOW_TRACKING_URI to a server"
        )
    registry = os.environ.get("MLFLOW_REGISTRY_URI")
    if registry and registry != tracking_uri():
        raise UserError(
            f"MLFLOW_REGISTRY_URI is {_without_credentials(registry)}, but models are registered where their runs are,"
            f" at {display_address()}; unset MLFLOW_REGISTRY_URI"
        )


def store_exists() -> bool:
    """Return True if a remote store is configured, or if a stage has already created the project's own."""
    return remote_store_uri() is not None or (project_folder() / "mlruns" / "mlflow.db").exists()


def display_address() -> str:
    """Return the location of the store for messages, without credentials."""
    uri = remote_store_uri()
    return _without_credentials(uri) if uri else str(project_folder() / "mlruns")


def _without_credentials(uri: str) -> str:
    return re.sub("(?<=://)[^/]*@", "", uri).partition("?")[0].rstrip("/")


def ui_url() -> str | None:
    """Return the URL of the MLflow server for a browser; None for a store without a server.

    `FADEFORMER_MLFLOW_PAGES` overrides it: in a container network the server's host name is unknown to browsers.
    """
    if not tracking_uri().startswith("http"):
        return None
    return os.environ.get("FADEFORMER_MLFLOW_PAGES", "").rstrip("/") or display_address()
