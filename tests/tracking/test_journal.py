"""History of a training in MLflow: real stores, a real server that dies, and trainings that are killed."""

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
    """No test leaves another its store."""
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A project with an MLflow store in which there is nothing but the experiment."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "")
        mlflow_store.connect()
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with that of a training, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    return tmp_path


@pytest.fixture
def store(empty, project) -> Path:
    """The database of a copy of that store."""
    shutil.copytree(empty / "mlruns", project / "mlruns")
    return project / "mlruns" / "mlflow.db"


def ask(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def points(database: Path) -> list[tuple[str, int, float, int]]:
    """Metric, step, value and time of each row, in the order in which they came."""
    return ask(database, "select key, step, value, timestamp from metrics order by rowid")


def expected() -> list[tuple[str, int, float, int]]:
    """The same as the history has it."""
    rows = pd.read_csv(FOLDER / "history.csv", float_precision="round_trip").to_dict("records")
    return [
        (name, row["epoch"], value, row["time"])
        for row in rows
        for name, value in row.items()
        if name not in ("epoch", "time") and not math.isnan(value)
    ]


def measured(epoch: int) -> dict[str, float | None]:
    return {"epoch": epoch, "learning_rate": 0.1 / epoch, "loss": 1 / epoch}


def begun(epochs: int = 0) -> Journal:
    book = Journal(FOLDER)
    book.start(PARAMS, META)
    for epoch in range(1, epochs + 1):
        book.add_epoch(measured(epoch))
    return book


def run_in_store() -> mlflow.entities.Run:
    (found,) = MlflowClient().search_runs(["1"])
    return found


def test_a_run_has_what_a_training_leaves(store, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-daks")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "first")
    book = begun(epochs=2)
    book.flush()
    ours = run_in_store()
    assert book.finalize() == ours.info.run_id
    assert ours.info.run_name == "first"
    assert ours.info.status == "RUNNING"
    assert ours.data.params == {"train.lr": "0.1", "seed": "1"}
    assert ours.data.tags.items() >= {
        "dataset.name": "dots", "dataset.size": "16", "dataset.sha256": "ab" * 32, "dataset.note": "made up",
        "dataset.split": "published", "git.revision": "not a git repository", "dvc.lock": "not run by DVC",
        "mlflow.user": ours.info.user_id, "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "python -m pipelines train",
    }.items()  # fmt: skip
    assert ours.info.user_id != "unknown"
    (dataset,) = ours.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("dots", "ab" * 16)
    assert json.loads(dataset.dataset.source)["tags"]["file"] == "dots.npz"
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    note = read_json(FOLDER / "run.json")
    assert ours.data.tags[runs.IDENTITY_TAG] == note["identity"]
    assert ours.info.start_time == note["time"]
    assert [(key, step) for key, step, _, _ in points(store)] == [(key, epoch) for epoch in (1, 2) for key in METRICS]
    assert points(store) == expected()
    assert mlflow.active_run() is None


def test_an_epoch_that_is_computed_again_stands_as_it_was(store):
    begun(epochs=2).flush()
    before, first = (FOLDER / "history.csv").read_bytes(), run_in_store()
    again = Journal(FOLDER)
    again.start({"seed": 2}, META)
    again.add_epoch({**measured(2), "loss": 7.0})
    assert (FOLDER / "history.csv").read_bytes() == before
    again.add_epoch(measured(3))
    assert again.finalize() == first.info.run_id
    assert points(store) == expected()
    assert len(expected()) == 6


def test_a_resumed_training_has_the_same_run_running_again(store):
    begun(epochs=1).close("KILLED")
    assert run_in_store().info.status == "KILLED"
    Journal(FOLDER).flush()
    assert run_in_store().info.status == "RUNNING"


def test_a_metric_that_is_undefined_is_left_out(store):
    book = begun()
    book.add_epoch({**measured(1), "auc": None})
    book.add_epoch({**measured(2), "auc": 0.1 + 0.2})
    book.finalize()
    assert [(step, value) for key, step, value, _ in points(store) if key == "auc"] == [(2, 0.1 + 0.2)]
    assert Journal(FOLDER).finalize()
    assert points(store) == expected()


def test_more_than_mlflow_takes_in_one_call(store):
    book = Journal(FOLDER)
    book.start({f"p{i}": i for i in range(250)}, META)
    for epoch in range(1, 121):
        book.add_epoch(measured(epoch) | {f"m{i}": i + epoch for i in range(10)})
    book.finalize()
    assert points(store) == expected()
    assert len(expected()) == 120 * 12
    assert len(run_in_store().data.params) == 250


# A killed process is followed by another, which asks MLflow what it has.


def ended(function, *arguments) -> int:
    """The exit status of a process which does that, negative for a signal."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def train(epochs: int = 4, permits=None) -> None:
    """As a stage would: resumes from its last checkpoint, which is older than the last epoch in the history.

    With permits it waits for one before each epoch, so that it cannot end before it is killed.
    """
    book, checkpoint = begun(), FOLDER / "checkpoint.json"
    book.flush()
    for epoch in range(read_json(checkpoint) + 1 if checkpoint.is_file() else 1, epochs + 1):
        if permits is not None:
            permits.acquire()
        book.add_epoch({**measured(epoch), "loss": time.perf_counter()})  # never twice the same
        book.flush()
        write_json(checkpoint, epoch)
    Journal(FOLDER).finalize()


def train_and_die(module, name: str, call: int, before: bool) -> None:
    real, calls = getattr(module, name), []

    def deadly(*arguments):
        calls.append(1)
        result = None if before and len(calls) == call else real(*arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)  # in a process of its own
    train()


def check_trained(store: Path, epochs: int = 4) -> None:
    """One run, and each step in it once, in order and as it was first measured."""
    assert ask(store, "select count(*) from runs") == [(1,)]
    assert [(key, step) for key, step, _, _ in points(store)] == [
        (key, epoch) for epoch in range(1, epochs + 1) for key in METRICS
    ]
    assert points(store) == expected()
    assert ask(store, "select count(*) from inputs") == [(1,)]
    assert ask(store, "select count(*) from params") == [(len(PARAMS),)]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (runs, "open_run", 1), (runs, "mark", 1), (runs, "log_origin", 1), (runs, "log_points", 1),
        (runs, "log_points", 3), (journal, "write_json", 1), (journal, "write_json", 2), (os, "fsync", 5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_a_training_killed_there_goes_on_in_the_same_run(store, module, name, call, before):
    assert ended(train_and_die, module, name, call, before) == -signal.SIGKILL
    assert ended(train) == 0
    check_trained(store)


def test_a_training_killed_again_and_again_goes_on_in_the_same_run(store):
    moments, epochs, checkpoint = np.random.default_rng(0), 60, FOLDER / "checkpoint.json"
    for _ in range(8):
        reached = read_json(checkpoint) if checkpoint.is_file() else 0
        new = int(moments.integers(1, 5))
        process = FORK.Process(target=train, args=(epochs, FORK.Semaphore(new + 2)))
        process.start()
        while not checkpoint.is_file() or read_json(checkpoint) < reached + new:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
    assert 0 < len(points(store)) < 2 * epochs
    assert ended(train, epochs) == 0
    check_trained(store, epochs)


# An error that does not pass by itself is one message.


def deleted(run_id: str) -> None:
    MlflowClient().delete_run(run_id)


def gone(run_id: str) -> None:
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        with closing(sqlite3.connect("mlruns/mlflow.db")) as connection, connection:
            connection.execute(f"delete from {table}")  # noqa: S608


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "same process"])
@pytest.mark.parametrize("do", [deleted, gone])
def test_a_run_that_is_gone_is_reported_and_made_again_as_the_message_says(store, do, resumed):
    book = begun(epochs=1)
    run_id = book.finalize()
    do(run_id)
    book = Journal(FOLDER) if resumed else book
    book.add_epoch(measured(2))
    message = (
        rf"MLflow at {store.parent} has no run {run_id}, or it was deleted; restore it .* or remove {FOLDER}/run.json"
    )
    for method in (book.flush, book.finalize):
        with pytest.raises(UserError, match=message) as raised:
            method()
        assert not isinstance(raised.value, TransientError)
    (FOLDER / "run.json").unlink()
    assert begun().finalize() != run_id
    assert points(store)[-4:] == expected()


def test_a_deleted_experiment_is_reported(store):
    begun(epochs=1).finalize()
    MlflowClient().delete_experiment("1")
    with pytest.raises(UserError, match="experiment fadeformer was deleted; restore it"):
        Journal(FOLDER).flush()


def test_another_mlflow_than_before_is_reported(store, empty, monkeypatch, tmp_path):
    run_id = begun(epochs=1).finalize()
    other = shutil.copytree(empty / "mlruns", tmp_path / "other") / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with pytest.raises(UserError, match=rf"sqlite:///{other} has no run {run_id}.* set MLFLOW_TRACKING_URI as it was"):
        Journal(FOLDER).flush()
    assert points(other) == []


def test_a_project_that_moved_has_its_run(store, monkeypatch):
    run_id = begun(epochs=1).finalize()
    monkeypatch.chdir(shutil.copytree(Path.cwd(), store.parents[2] / f"{store.parents[1].name}-moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert begun(epochs=2).finalize() == run_id
    assert points(Path("mlruns/mlflow.db")) == expected()
    assert len(expected()) == 4


def test_no_password_is_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@example.org:5000/mlflow/?token=secret")
    assert locations.display_address() == "http://example.org:5000/mlflow"


# MLflow may come back.


class Failing(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        Failing.asked += 1
        self.send_response(503)
        self.send_header("Retry-After", "600")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(params=["refuses", "says nothing", "fails", "database"])
def away(request, project, monkeypatch) -> str:
    """The address of an MLflow that cannot be reached, in one way or another."""
    with socket.create_server(("127.0.0.1", 0)) as silent, HTTPServer(("127.0.0.1", 0), Failing) as failing:
        port = {"says nothing": silent.getsockname()[1], "fails": failing.server_port}.get(request.param)
        if request.param == "fails":
            threading.Thread(target=failing.serve_forever, daemon=True).start()
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as closed:
                port = closed.getsockname()[1]
        scheme = "postgresql" if request.param == "database" else "http"
        uri = f"{scheme}://127.0.0.1:{port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri
        if request.param == "fails":
            failing.shutdown()


def test_a_training_goes_on_without_mlflow(away, monkeypatch, capfd):
    monkeypatch.setattr(journal, "TIMEOUT", 1)
    tries: list[float] = []
    check = mlflow_store.check_reachable
    monkeypatch.setattr(mlflow_store, "check_reachable", lambda timeout: tries.append(timeout) or check(timeout))
    Failing.asked = 0
    book = begun()
    for epoch in range(1, 100):
        book.add_epoch(measured(epoch))
        book.flush()
    assert len(tries) == 1  # and no more within the pause
    book.close("KILLED")
    with pytest.raises(
        TransientError, match=rf"{away} cannot be reached.* finished and kept in {FOLDER}: start it, then run"
    ):
        Journal(FOLDER).finalize()
    assert Failing.asked <= 3
    printed = capfd.readouterr()
    first, last = printed.out.splitlines()
    assert first.startswith(
        f"MLflow at {away} cannot be reached: training continues, and its metrics are stored in {FOLDER}/history.csv"
    )
    assert last.startswith(f"MLflow at {away} does not show the status KILLED: ")
    assert printed.err == ""
    assert len(expected()) == 2 * 99


def test_after_the_pause_it_is_tried_again(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tries, clock = [], [0.0]
    monkeypatch.setattr(
        mlflow_store,
        "check_reachable",
        lambda timeout, real=mlflow_store.check_reachable: tries.append(1) or real(timeout),
    )
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    book = begun(epochs=1)
    for clock[0] in (0, 59, 61, 119, 122):
        book.flush()
    assert len(tries) == 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_read_only_store_is_waited_for(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{store}?mode=ro&uri=true")
    begun(epochs=1).flush()
    printed = capfd.readouterr()
    assert printed.out.strip().endswith("(attempt to write a readonly database)")
    assert printed.err == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    Journal(FOLDER).finalize()
    assert points(store) == expected()


class Server:
    """`mlflow server`, which can be killed and started again."""

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
def test_a_server_that_comes_late_and_dies_in_between(project, monkeypatch, capfd):
    monkeypatch.setattr(journal, "RETRY_INTERVAL", 0)
    server = Server(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        book = begun(epochs=2)
        book.flush()
        server.start()
        book.flush()
        assert points(server.database) == expected()
        server.kill()
        for epoch in (3, 4):
            book.add_epoch(measured(epoch))
            book.flush()
        server.start()
        book.add_epoch(measured(5))
        book.flush()
        assert Journal(FOLDER).finalize() == book.finalize()
        assert points(server.database) == expected()
        assert len(expected()) == 2 * 5
        assert ask(server.database, "select count(*) from runs") == [(1,)]
    finally:
        server.kill()
    lines = capfd.readouterr().out.splitlines()
    assert [("cannot be reached" in line, "can be reached again" in line) for line in lines] == [
        (True, False), (False, True), (True, False), (False, True),
    ]  # fmt: skip
    assert lines[-1].endswith("can be reached again and has all 5 epochs")
