"""MLflow's store, a server's or the project's own: made, reached, and whether it answers."""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
import requests
from filelock import FileLock, Timeout
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from fadeformer.errors import PassingError, UserError
from fadeformer.files import whole_file
from pipelines import moved, places
from pipelines.moved import EXPERIMENT

REFUSALS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # of what is asked; the same again would be in vain
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Unreachable(PassingError):  # noqa: N818  it is not here, which is no error of its own
    """MLflow cannot be reached, or cannot write now; later it may.

    Attributes:
        reason: in a few words.
        remedy: what to do, likewise.
    """

    def __init__(self, error: Exception) -> None:
        self.reason = _brief(error)
        self.remedy = "start it" if places.server() else "mend mlruns/"
        other = ", or unset MLFLOW_TRACKING_URI to use this project's mlruns/" if places.server() else ""
        super().__init__(f"MLflow at {places.address()} cannot be used; {self.remedy}{other} ({self.reason})")


def _brief(error: Exception) -> str:
    """The cause, out of a text that may hold a whole SQL statement or a chain of causes."""
    error = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error  # the driver's own
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    _, chained, cause = text.rpartition("Caused by ")
    return (cause.partition("(")[2].strip("\"')") if chained else text)[:200]


@contextmanager
def told() -> Iterator[None]:
    """Raises errors of MLflow as Unreachable, or as UserError where it refuses what it is asked."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in REFUSALS:
            said = str(error).strip().splitlines()[0][:500]
            raise UserError(f"MLflow at {places.address()} refuses: {said}") from error
        raise Unreachable(error) from error
    except (SQLAlchemyError, requests.RequestException) as error:  # the latter of files, such as 401: a server with
        raise Unreachable(error) from error  # accounts says so of everybody while it has no database


def may_pass(error: Exception) -> bool:
    """Whether a server's answer to what was asked of its files may be another one next time."""
    if not (places.server() or "").startswith("http"):
        return False
    if isinstance(error, requests.HTTPError):
        return error.response is None or error.response.status_code != requests.codes.not_found
    if isinstance(error, MlflowException):
        return error.error_code not in REFUSALS
    return isinstance(error, requests.RequestException)


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """In the block MLflow is asked once and given so long for each answer; left alone it tries for four minutes.

    Raises:
        Unreachable: it is a database that is down, read-only or locked.
    """
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("mlflow.store", "urllib3")}
    os.environ.update(settings)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what fails is told by an exception
    try:
        _knock(places.server() or places.own(), seconds)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in loggers.items():
            logger.setLevel(level)


@told()
def _knock(uri: str, seconds: int) -> None:
    """Tells at once of a database that does not answer: MLflow tries ten times to open it and waits 20 s for a lock."""
    kind = uri.split(":")[0].split("+")[0]
    try:
        if kind == "sqlite" and Path(name := str(make_url(uri).database)).is_file():
            with closing(sqlite3.connect(name, timeout=seconds)) as connection:
                connection.execute("begin immediate")
                connection.rollback()
        elif kind in PORTS and (host := make_url(uri).host):
            socket.create_connection((host, make_url(uri).port or PORTS[kind]), timeout=seconds).close()
    except (sqlite3.Error, OSError) as error:
        raise Unreachable(error) from error


@told()
def connect() -> str:
    """Points MLflow at `MLFLOW_TRACKING_URI`, or else at the project's own store, which is made if it is not there.

    Returns:
        The id of the experiment.

    Raises:
        Unreachable: the store cannot be reached.
        UserError: it is none, or its experiment was deleted.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    store, server = places.project() / "mlruns", places.server()
    mlflow.set_tracking_uri(server or places.own())
    try:
        store.mkdir(exist_ok=True)
        # Two processes that create the database at once break its migration.
        with FileLock(store / ".lock", timeout=MLFLOW_HTTP_REQUEST_TIMEOUT.get()):
            if not server and not (store / "mlflow.db").exists():
                _make(store / "mlflow.db")
            if not server:
                _leave_mender(store / Path(moved.__file__).name)
            location = None if server else (store / "artifacts").as_uri()
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=location)
            elif location and experiment.artifact_location.startswith("file:"):
                moved.follow(store / "mlflow.db", experiment.artifact_location, location)
    except (OSError, sqlite3.Error, Timeout) as error:
        raise Unreachable(error) from error
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow's experiment {EXPERIMENT} was deleted; restore it with `mlflow experiments restore"
            f" --experiment-id {experiment.experiment_id}`, or remove mlruns/mlflow.db to begin anew"
        )
    return mlflow.set_experiment(EXPERIMENT).experiment_id


def _make(database: Path) -> None:
    """Makes a database that appears whole: of one that was left half made MLflow makes nothing any more."""
    begun = database.with_name(f".{database.name}.begun")
    for half in database.parent.glob(f"{begun.name}*"):
        half.unlink()
    engine = create_sqlalchemy_engine(f"sqlite:///{begun}")
    _initialize_tables(engine)
    engine.dispose()
    begun.rename(database)


def _leave_mender(place: Path) -> None:
    """Puts what mends a store that was moved into the store itself."""
    text = Path(moved.__file__).read_bytes()
    if not place.is_file() or place.read_bytes() != text:
        with whole_file(place) as temporary:
            temporary.write_bytes(text)
