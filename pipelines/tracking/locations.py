"""Where runs are kept: the project's folder, its own MLflow store, or a server; told without loading MLflow."""

from __future__ import annotations

import os
import re
from pathlib import Path

WORKSPACES = Path(".cache/runs")  # where deployment runs have their working copies
WORKSPACE_MARKER = Path(".cache/copy.json")  # in a copy: of what it is one


def project_folder() -> Path:
    """The project's folder; an experiment of DVC or a deployment run in a copy below it belongs to the real one."""
    here = Path.cwd()
    homes = [parent.parent for parent in here.parents if parent.name == ".dvc"]
    homes += [one.parents[len(WORKSPACES.parts)] for one in (here, *here.parents) if (one / WORKSPACE_MARKER).is_file()]
    return min(homes, key=lambda home: len(home.parts), default=here)


def local_store_uri() -> str:
    """The project's own store, as `MLFLOW_TRACKING_URI` would name it."""
    return f"sqlite:///{project_folder() / 'mlruns' / 'mlflow.db'}?timeout=60"


def remote_store_uri() -> str | None:
    """What `MLFLOW_TRACKING_URI` names; MLflow itself sets it to what was connected before."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    return named if named and named != local_store_uri() else None


def tracking_uri() -> str:
    """What `MLFLOW_TRACKING_URI` has to name for a process in another folder to use the same store."""
    return remote_store_uri() or local_store_uri()


def store_exists() -> bool:
    """Whether there is a store: a server that is named, or the project's own once a stage has made it."""
    return remote_store_uri() is not None or (project_folder() / "mlruns" / "mlflow.db").exists()


def display_address() -> str:
    """Where MLflow keeps its runs, for people; without a password."""
    named = remote_store_uri()
    return (
        re.sub("(?<=://)[^/]*@", "", named).partition("?")[0].rstrip("/") if named else str(project_folder() / "mlruns")
    )


def ui_url() -> str | None:
    """Where a browser finds the pages of the MLflow server; None for a store without one.

    That is the server's address, unless `FADEFORMER_MLFLOW_PAGES` names another: within a network of containers a
    server has a name that no browser knows.
    """
    if not tracking_uri().startswith("http"):
        return None
    return os.environ.get("FADEFORMER_MLFLOW_PAGES", "").rstrip("/") or display_address()
