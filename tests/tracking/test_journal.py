"""Journal of a training: real MLflow stores, a server that is killed, and trainings that are killed."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.errors import TransientError, UserError
from fadeformer.io.atomic import read_json, write_json
from pipelines.tracking import journal, locations, runs
from pipelines.tracking import store as mlflow_store
from pipelines.tracking.journal import Journal

CARD = {"name": "dots", "file": "dots.npz", "sha256": "ab" * 32, "size": 16, "note": "made up", "task": "binary-class"}
META = ArrayMetadata(
    dataset=CARD, image_size=16, channels=1, counts={"train": 1}, split="published", cross_split_duplicates=0,
    channel_mean=[0.5], channel_std=[0.1], aspect="squash",
)  # fmt: skip
PARAMS = {"train.lr": 0.1, "seed": 1}
FORK = multiprocessing.get_context("fork")
FOLDER = Path(".cache/train/key")
METRICS = ("learning_rate", "loss")


@pytest.fixture(autouse=True)
def connection(monkeypatch):
    """Restore the tracking URI after each test."""
    previous = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    yield
    mlflow.set_tracking_uri(previous)


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory) -> Path:
    """A project with an MLflow store that has only the experiment."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "")
        mlflow_store.connect()
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with the folder of a training; the test runs in it."""
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    return tmp_path


@pytest.fixture
def store(empty_project, project) -> Path:
    """The database of a copy of the empty store."""
    shutil.copytree(empty_project / "mlruns", project / "mlruns")
    return project / "mlruns" / "mlflow.db"


def query_rows(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def stored_points(database: Path) -> list[tuple[str, int, float, int]]:
    """Return metric, step, value and time of each logged point, in order of insertion."""
    return query_rows(database, "select key, step, value, timestamp from metrics order by rowid")


def history_points() -> list[tuple[str, int, float, int]]:
    """Return the same points from the journal's history."""
    rows = pd.read_csv(FOLDER / "history.csv", float_precision="round_trip").to_dict("records")
    return [
        (name, row["epoch"], value, row["time"])
        for row in rows
        for name, value in row.items()
        if name not in ("epoch", "time") and not math.isnan(value)
    ]


def epoch_metrics(epoch: int) -> dict[str, float | None]:
    return {"epoch": epoch, "learning_rate": 0.1 / epoch, "loss": 1 / epoch}


def start_journal(epochs: int = 0) -> Journal:
    training_journal = Journal(FOLDER)
    training_journal.start(PARAMS, META)
    for epoch in range(1, epochs + 1):
        training_journal.add_epoch(epoch_metrics(epoch))
    return training_journal


def run_in_store() -> mlflow.entities.Run:
    (found,) = MlflowClient().search_runs(["1"])
    return found


def test_run_has_params_tags_dataset_and_metrics(store, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-daks")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "first")
    training_journal = start_journal(epochs=2)
    training_journal.flush()
    run = run_in_store()
    assert training_journal.finalize() == run.info.run_id
    assert run.info.run_name == "first"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"train.lr": "0.1", "seed": "1"}
    assert run.data.tags.items() >= {
        "dataset.name": "dots", "dataset.size": "16", "dataset.sha256": "ab" * 32, "dataset.note": "made up",
        "dataset.split": "published", "git.revision": "not a git repository", "dvc.lock": "not run by DVC",
        "mlflow.user": run.info.user_id, "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "python -m pipelines train",
    }.items()  # fmt: skip
    assert run.info.user_id != "unknown"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("dots", "ab" * 16)
    assert json.loads(dataset.dataset.source)["tags"]["file"] == "dots.npz"
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    note = read_json(FOLDER / "run.json")
    assert run.data.tags[runs.IDENTITY_TAG] == note["identity"]
    assert run.info.start_time == note["time"]
    assert [(key, step) for key, step, _, _ in stored_points(store)] == [
        (key, epoch) for epoch in (1, 2) for key in METRICS
    ]
    assert stored_points(store) == history_points()
    assert mlflow.active_run() is None


def test_repeated_epoch_is_not_overwritten(store):
    start_journal(epochs=2).flush()
    before, first = (FOLDER / "history.csv").read_bytes(), run_in_store()
    again = Journal(FOLDER)
    again.start({"seed": 2}, META)
    again.add_epoch({**epoch_metrics(2), "loss": 7.0})
    assert (FOLDER / "history.csv").read_bytes() == before
    again.add_epoch(epoch_metrics(3))
    assert again.finalize() == first.info.run_id
    assert stored_points(store) == history_points()
    assert len(history_points()) == 6


def test_resumed_training_sets_its_run_to_running(store):
    start_journal(epochs=1).close("KILLED")
    assert run_in_store().info.status == "KILLED"
    Journal(FOLDER).flush()
    assert run_in_store().info.status == "RUNNING"


def test_undefined_metric_is_not_logged(store):
    training_journal = start_journal()
    training_journal.add_epoch({**epoch_metrics(1), "auc": None})
    training_journal.add_epoch({**epoch_metrics(2), "auc": 0.1 + 0.2})
    training_journal.finalize()
    assert [(step, value) for key, step, value, _ in stored_points(store) if key == "auc"] == [(2, 0.1 + 0.2)]
    assert Journal(FOLDER).finalize()
    assert stored_points(store) == history_points()


def test_large_batches_are_logged_completely(store):
    training_journal = Journal(FOLDER)
    training_journal.start({f"p{i}": i for i in range(250)}, META)
    for epoch in range(1, 121):
        training_journal.add_epoch(epoch_metrics(epoch) | {f"m{i}": i + epoch for i in range(10)})
    training_journal.finalize()
    assert stored_points(store) == history_points()
    assert len(history_points()) == 120 * 12
    assert len(run_in_store().data.params) == 250


# After a kill, the next process asks MLflow for the logged epochs.


def exit_status_of(function, *arguments) -> int:
    """Run a function in a new process and return its exit status, negative for a signal."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def train(epochs: int = 4, permits=None) -> None:
    """Train like the stage: resume from the last checkpoint, which is older than the last epoch in the history.

    With `permits` it acquires one before each epoch, so that it cannot finish before it is killed.
    """
    training_journal, checkpoint = start_journal(), FOLDER / "checkpoint.json"
    training_journal.flush()
    for epoch in range(read_json(checkpoint) + 1 if checkpoint.is_file() else 1, epochs + 1):
        if permits is not None:
            permits.acquire()
        training_journal.add_epoch({**epoch_metrics(epoch), "loss": time.perf_counter()})  # differs at each repetition
        training_journal.flush()
        write_json(checkpoint, epoch)
    Journal(FOLDER).finalize()


def train_and_die(module, name: str, call: int, before: bool) -> None:
    real, calls = getattr(module, name), []

    def dying_function(*arguments):
        calls.append(1)
        result = None if before and len(calls) == call else real(*arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, dying_function)  # this is a separate process
    train()


def check_trained(store: Path, epochs: int = 4) -> None:
    """Check that there is one run with each step once, in order and with the values of the first attempt."""
    assert query_rows(store, "select count(*) from runs") == [(1,)]
    assert [(key, step) for key, step, _, _ in stored_points(store)] == [
        (key, epoch) for epoch in range(1, epochs + 1) for key in METRICS
    ]
    assert stored_points(store) == history_points()
    assert query_rows(store, "select count(*) from inputs") == [(1,)]
    assert query_rows(store, "select count(*) from params") == [(len(PARAMS),)]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (runs, "find_or_create_run", 1), (runs, "set_status", 1), (runs, "log_provenance", 1),
        (runs, "log_metric_points", 1), (runs, "log_metric_points", 3), (journal, "write_json", 1),
        (journal, "write_json", 2), (os, "fsync", 5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_killed_training_resumes_in_the_same_run(store, module, name, call, before):
    assert exit_status_of(train_and_die, module, name, call, before) == -signal.SIGKILL
    assert exit_status_of(train) == 0
    check_trained(store)


def test_repeatedly_killed_training_resumes_in_one_run(store):
    rng, epochs, checkpoint = np.random.default_rng(0), 60, FOLDER / "checkpoint.json"
    for _ in range(8):
        reached = read_json(checkpoint) if checkpoint.is_file() else 0
        new = int(rng.integers(1, 5))
        process = FORK.Process(target=train, args=(epochs, FORK.Semaphore(new + 2)))
        process.start()
        while not checkpoint.is_file() or read_json(checkpoint) < reached + new:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
    assert 0 < len(stored_points(store)) < 2 * epochs
    assert exit_status_of(train, epochs) == 0
    check_trained(store, epochs)


# Permanent errors are reported as one message.


def delete_run(run_id: str) -> None:
    MlflowClient().delete_run(run_id)


def drop_rows(run_id: str) -> None:
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        with closing(sqlite3.connect("mlruns/mlflow.db")) as connection, connection:
            connection.execute(f"delete from {table}")  # noqa: S608


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "same process"])
@pytest.mark.parametrize("remove_run", [delete_run, drop_rows])
def test_missing_run_is_reported_and_can_be_recreated(store, remove_run, resumed):
    training_journal = start_journal(epochs=1)
    run_id = training_journal.finalize()
    remove_run(run_id)
    training_journal = Journal(FOLDER) if resumed else training_journal
    training_journal.add_epoch(epoch_metrics(2))
    message = (
        rf"MLflow at {store.parent} has no run {run_id}, or it was deleted; restore it .* or remove {FOLDER}/run.json"
    )
    for method in (training_journal.flush, training_journal.finalize):
        with pytest.raises(UserError, match=message) as raised:
            method()
        assert not isinstance(raised.value, TransientError)
    (FOLDER / "run.json").unlink()
    assert start_journal().finalize() != run_id
    assert stored_points(store)[-4:] == history_points()


def test_deleted_experiment_is_reported(store):
    start_journal(epochs=1).finalize()
    MlflowClient().delete_experiment("1")
    with pytest.raises(UserError, match="experiment fadeformer was deleted; restore it"):
        Journal(FOLDER).flush()


def test_run_in_another_store_is_reported(store, empty_project, monkeypatch, tmp_path):
    run_id = start_journal(epochs=1).finalize()
    other = shutil.copytree(empty_project / "mlruns", tmp_path / "other") / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with pytest.raises(UserError, match=rf"sqlite:///{other} has no run {run_id}.* set MLFLOW_TRACKING_URI as before"):
        Journal(FOLDER).flush()
    assert stored_points(other) == []


def test_store_of_a_server_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TransientError, match=r"MLflow at http://127.0.0.1:1 cannot be used"):
        mlflow_store.connect()
    assert list(tmp_path.iterdir()) == []


def test_moved_project_keeps_its_run(store, monkeypatch):
    run_id = start_journal(epochs=1).finalize()
    monkeypatch.chdir(shutil.copytree(Path.cwd(), store.parents[2] / f"{store.parents[1].name}-moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert start_journal(epochs=2).finalize() == run_id
    assert stored_points(Path("mlruns/mlflow.db")) == history_points()
    assert len(history_points()) == 4


def test_display_address_hides_credentials(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@example.org:5000/mlflow/?token=secret")
    assert locations.display_address() == "http://example.org:5000/mlflow"


# Transient errors are retried.


class FailingHandler(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        FailingHandler.requests += 1
        self.send_response(503)
        self.send_header("Retry-After", "600")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(params=["refused", "timeout", "status 503", "database"])
def unreachable_uri(request, project, monkeypatch) -> str:
    """The URI of an MLflow server or database that cannot be reached."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent_server,
        HTTPServer(("127.0.0.1", 0), FailingHandler) as failing_server,
    ):
        port = {"timeout": silent_server.getsockname()[1], "status 503": failing_server.server_port}.get(request.param)
        if request.param == "status 503":
            threading.Thread(target=failing_server.serve_forever, daemon=True).start()
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as closed_port:
                port = closed_port.getsockname()[1]
        scheme = "postgresql" if request.param == "database" else "http"
        uri = f"{scheme}://127.0.0.1:{port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
        if request.param == "status 503":
            failing_server.shutdown()


def test_training_continues_without_mlflow(unreachable_uri, monkeypatch, capfd):
    monkeypatch.setattr(journal, "TIMEOUT", 1)
    attempts: list[float] = []
    check = mlflow_store.check_reachable
    monkeypatch.setattr(mlflow_store, "check_reachable", lambda timeout: attempts.append(timeout) or check(timeout))
    FailingHandler.requests = 0
    training_journal = start_journal()
    for epoch in range(1, 100):
        training_journal.add_epoch(epoch_metrics(epoch))
        training_journal.flush()
    assert len(attempts) == 1  # no further one within RETRY_INTERVAL
    training_journal.close("KILLED")
    with pytest.raises(
        TransientError,
        match=rf"{unreachable_uri} cannot be reached.* finished and stored in {FOLDER}: start it, then run",
    ):
        Journal(FOLDER).finalize()
    assert FailingHandler.requests <= 3
    printed = capfd.readouterr()
    first, last = printed.out.splitlines()
    assert first.startswith(
        f"MLflow at {unreachable_uri} cannot be reached: training continues, and its metrics are stored in"
        f" {FOLDER}/history.csv"
    )
    assert last.startswith(f"MLflow at {unreachable_uri} does not show the status KILLED: ")
    assert printed.err == ""
    assert len(history_points()) == 2 * 99


def test_flush_retries_after_the_interval(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    attempts, clock = [], [0.0]
    monkeypatch.setattr(
        mlflow_store,
        "check_reachable",
        lambda timeout, real=mlflow_store.check_reachable: attempts.append(1) or real(timeout),
    )
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    training_journal = start_journal(epochs=1)
    for clock[0] in (0, 59, 61, 119, 122):
        training_journal.flush()
    assert len(attempts) == 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_read_only_store_counts_as_unreachable(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{store}?mode=ro&uri=true")
    start_journal(epochs=1).flush()
    printed = capfd.readouterr()
    assert printed.out.strip().endswith("(attempt to write a readonly database)")
    assert printed.err == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    Journal(FOLDER).finalize()
    assert stored_points(store) == history_points()


class Server:
    """A process of `mlflow server` that can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "served.db"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}",
                "--artifacts-destination", str(self.database.parent / "served"), "--host", "127.0.0.1",
                "--port", str(self.port), "--workers", "1",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        for _ in range(1800):
            assert self.process.poll() is None
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.mark.server
def test_server_that_starts_late_and_restarts(project, monkeypatch, capfd):
    monkeypatch.setattr(journal, "RETRY_INTERVAL", 0)
    server = Server(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        training_journal = start_journal(epochs=2)
        training_journal.flush()
        server.start()
        training_journal.flush()
        assert stored_points(server.database) == history_points()
        server.kill()
        for epoch in (3, 4):
            training_journal.add_epoch(epoch_metrics(epoch))
            training_journal.flush()
        server.start()
        training_journal.add_epoch(epoch_metrics(5))
        training_journal.flush()
        assert Journal(FOLDER).finalize() == training_journal.finalize()
        assert stored_points(server.database) == history_points()
        assert len(history_points()) == 2 * 5
        assert query_rows(server.database, "select count(*) from runs") == [(1,)]
    finally:
        server.kill()
    lines = capfd.readouterr().out.splitlines()
    assert [("cannot be reached" in line, "can be reached again" in line) for line in lines] == [
        (True, False), (False, True), (True, False), (False, True),
    ]  # fmt: skip
    assert lines[-1].endswith("can be reached again and has all 5 epochs")
