"""Create, check and connect to the MLflow store: the project's own or that of a server."""

from __future__ import annotations

import logging
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import requests
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from fadeformer.errors import TransientError, UserError
from pipelines.tracking import locations, relocate
from pipelines.tracking.relocate import EXPERIMENT

REFUSAL_CODES = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # of MLflow: a retry would fail again
DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
LOCK_TIMEOUT = 60  # seconds; another process may be creating the store


class MLflowUnreachable(TransientError):  # noqa: N818
    """MLflow cannot be reached or cannot write at the moment.

    Attributes:
        reason: The cause, in a few words.
        remedy: The fix, in a few words.
    """

    def __init__(self, reason: Exception | str) -> None:
        if isinstance(reason, Exception):  # the database driver's message is shorter than SQLAlchemy's
            reason = getattr(reason, "orig", None) or getattr(reason.__cause__, "orig", None) or reason
        self.reason = (str(reason).strip() or type(reason).__name__).splitlines()[0][:200]
        self.remedy = "start it" if locations.remote_store_uri() else "repair mlruns/"
        alternative = (
            ", or unset MLFLOW_TRACKING_URI to use this project's mlruns/" if locations.remote_store_uri() else ""
        )
        super().__init__(
            f"MLflow at {locations.display_address()} cannot be used; {self.remedy}{alternative} ({self.reason})"
        )


@contextmanager
def translate_mlflow_errors() -> Iterator[None]:
    """Raise MLflow's errors as `MLflowUnreachable`, or as `UserError` if MLflow refuses a request."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, requests.RequestException) as error:
        refused = isinstance(error, MlflowException) and error.error_code in REFUSAL_CODES
        if isinstance(error, requests.HTTPError) and error.response is not None:  # of an artifact
            refused = error.response.status_code == requests.codes.not_found
        if refused:
            reason = str(error).strip().splitlines()[0][:500]
            raise UserError(f"MLflow at {locations.display_address()} refuses: {reason}") from error
        raise MLflowUnreachable(error) from error


def check_reachable(timeout: float) -> None:
    """Raise `MLflowUnreachable` if a server or its database does not answer in time; MLflow itself retries for minutes.

    The project's own store is a local file and needs no check.
    """
    address = urlsplit(locations.remote_store_uri() or "")
    try:
        if address.scheme in ("http", "https"):
            status = requests.get(f"{locations.display_address()}/health", timeout=timeout).status_code
            if status >= requests.codes.server_error:
                raise MLflowUnreachable(f"it answers with status {status}")
        elif port := DEFAULT_PORTS.get(address.scheme.partition("+")[0]):
            socket.create_connection((address.hostname or "localhost", address.port or port), timeout).close()
    except requests.exceptions.SSLError:
        pass  # it answers; whether MLflow accepts the certificate depends on MLflow's own settings
    except requests.ConnectionError as error:
        raise MLflowUnreachable("no connection") from error
    except OSError as error:
        raise MLflowUnreachable(
            "no answer" if isinstance(error, (TimeoutError, requests.Timeout)) else error
        ) from error


@translate_mlflow_errors()
def connect() -> str:
    """Point MLflow at `MLFLOW_TRACKING_URI`, or else at the project's own store, which is created if it is missing.

    Returns:
        The id of the experiment.

    Raises:
        MLflowUnreachable: The store cannot be reached.
        UserError: It is not an MLflow store, its experiment was deleted, or `locations.check_store` fails.
    """
    locations.check_store()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    for name in ("mlflow.store", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their errors are also raised
    server = locations.remote_store_uri()
    mlflow.set_tracking_uri(server or locations.local_store_uri())
    if not server:
        _create_or_relocate_store(locations.project_folder() / "mlruns")
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow's experiment {EXPERIMENT} was deleted; restore it with `mlflow experiments restore"
            f" --experiment-id {experiment.experiment_id}`, or remove mlruns/mlflow.db to start with an empty store"
        )
    return str(mlflow.set_experiment(EXPERIMENT).experiment_id)


def _create_or_relocate_store(store: Path) -> None:
    """Create the project's own store with its experiment, or rewrite its artifact URIs if the folder was moved."""
    try:
        store.mkdir(exist_ok=True)
        # Concurrent creation would break the database migration.
        with FileLock(store / ".lock", timeout=LOCK_TIMEOUT):
            if not (store / "mlflow.db").exists():
                _create_database(store / "mlflow.db")
            shutil.copyfile(relocate.__file__, store / "relocate.py")  # for moving that folder without the project
            location = (store / "artifacts").as_uri()
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=location)
            elif experiment.artifact_location.startswith("file:"):
                relocate.rewrite_artifact_uris(store / "mlflow.db", experiment.artifact_location, location)
    except (OSError, sqlite3.Error, Timeout) as error:
        raise MLflowUnreachable(error) from error


def _create_database(database: Path) -> None:
    """Create MLflow's database atomically, since MLflow cannot use one whose creation was killed."""
    unfinished = database.with_name(f".{database.name}.new")
    for leftover in database.parent.glob(f"{unfinished.name}*"):
        leftover.unlink()
    MlflowClient(f"sqlite:///{unfinished}").search_experiments()
    unfinished.rename(database)
