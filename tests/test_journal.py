"""What a training tells MLflow: real stores, a real server that dies, and trainings that are killed."""

import json
import math
import multiprocessing
import os
import resource
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
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from fadeformer import lines
from fadeformer.arrays import Meta
from fadeformer.errors import UserError
from fadeformer.files import read_json, write_json
from pipelines import journal, places, tracking
from pipelines import store as mlflow_store
from pipelines.journal import Journal

CARD = {"name": "dots", "file": "dots.npz", "sha256": "ab" * 32, "size": 16, "note": "made up", "task": "binary-class"}
META = Meta(
    dataset=CARD, image_size=16, channels=1, counts={"train": 1}, split="published", cross_split_duplicates=0,
    channel_mean=[0.5], channel_std=[0.1], aspect="squash",
)  # fmt: skip
PARAMS = {"train.lr": 0.1, "seed": 1}
FORK = multiprocessing.get_context("fork")
FOLDER = Path(".cache/train/key")


@pytest.fixture(autouse=True)
def connection(monkeypatch):
    """No test leaves another its store, and a pause ends when the test wants it to."""
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
def store(empty, tmp_path, monkeypatch) -> Path:
    """The database of a copy of that project, in whose folder the test runs."""
    shutil.copytree(empty / "mlruns", tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mlruns" / "mlflow.db"


def ask(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def points(database: Path) -> list[tuple[str, int, float]]:
    """Metric, step and value of each row, in the order in which they came."""
    rows = ask(database, "select key, step, value, is_nan from metrics order by rowid")
    return [(key, step, math.nan if is_nan else value) for key, step, value, is_nan in rows]


def written(folder: Path = FOLDER) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def expected(folder: Path = FOLDER) -> list[tuple[str, int, float]]:
    """The same as the journal has it."""
    return [(key, record["step"], value) for record in written(folder)[1:] for key, value in record["metrics"].items()]


def begun(folder: Path = FOLDER, epochs: int = 0) -> Journal:
    book = Journal(folder)
    book.start(PARAMS, META)
    for epoch in range(1, epochs + 1):
        book.epoch({"epoch": epoch, "loss": 1 / epoch, "auc": epoch / 100})
    return book


def run_in_store() -> mlflow.entities.Run:
    (found,) = MlflowClient().search_runs(["1"])
    return found


def test_a_run_is_called_what_started_it(store, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-daks")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "first")
    book = begun(epochs=1)
    assert book.deliver()
    book.close("FINISHED")
    assert MlflowClient().get_run(book.run_id).info.run_name == "first"


def test_a_run_has_what_a_run_of_the_pipeline_leaves(store):
    book = begun(epochs=2)
    assert book.run_id is None
    assert book.deliver()
    book.metrics({"seconds": {"fit": 3.5}})
    assert book.settle() == book.run_id
    book.close("FINISHED")
    ours = MlflowClient().get_run(book.run_id)
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
    assert ours.data.tags[tracking.IDENTITY] == written()[0]["identity"]
    assert ours.info.start_time == written()[0]["time"]
    assert ours.info.status == "FINISHED"
    assert ours.info.end_time >= ours.info.start_time
    assert points(store) == [
        ("loss", 1, 1.0), ("auc", 1, 0.01), ("loss", 2, 0.5), ("auc", 2, 0.02), ("seconds.fit", 0, 3.5),
    ]  # fmt: skip
    assert mlflow.active_run() is None


def test_an_epoch_that_is_computed_again_stands_as_it_was(store):
    begun(epochs=2).deliver()
    before, first = (FOLDER / "journal.jsonl").read_bytes(), run_in_store()
    again = Journal(FOLDER)
    again.start({"seed": 2}, META)
    again.epoch({"epoch": 2, "loss": 7.0})
    again.metrics({"a": {"b": 1}})
    again.metrics({"a": {"b": 2, "c": 3}})
    assert again.settle() == first.info.run_id
    assert (FOLDER / "journal.jsonl").read_bytes().startswith(before)
    late = [("loss", 1, 1.0), ("auc", 1, 0.01), ("loss", 2, 0.5), ("auc", 2, 0.02), ("a.b", 0, 1.0), ("a.c", 0, 3.0)]
    assert points(store) == late


def test_a_resumed_training_has_the_same_run_running_again(store):
    book = begun(epochs=1)
    book.deliver()
    book.close("KILLED")
    assert run_in_store().info.status == "KILLED"
    assert Journal(FOLDER).deliver()
    assert run_in_store().info.status == "RUNNING"


def test_numbers_that_are_none_or_no_number(store):
    book = begun()
    book.epoch({"epoch": 1, "loss": math.nan, "auc": None, "rate": 1, "up": math.inf})
    book.metrics({"text": "no", "flag": True, "undefined": math.nan, "class": {"a (b)": 1}})
    book.metrics({})
    assert book.deliver()
    largest = sys.float_info.max  # for which MLflow takes infinity
    assert str(points(store)) == str(
        [("loss", 1, math.nan), ("rate", 1, 1.0), ("up", 1, largest), ("class.a  b ", 0, 1.0)]
    )
    assert Journal(FOLDER).deliver()


def test_more_than_mlflow_takes_in_one_call(store):
    book = Journal(FOLDER)
    book.start({f"p{i}": i for i in range(250)}, META)
    for epoch in (1, 2, 3):
        book.epoch({"epoch": epoch} | {f"m{i}": i + epoch for i in range(600)})
    book.metrics({"many": {str(i): i for i in range(2500)}})
    assert book.deliver()
    assert points(store) == expected()
    assert len(expected()) == 3 * 600 + 2500
    assert len(run_in_store().data.params) == 250


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        begun(folder, epochs=3).epoch({"epoch": 4, "näme": 1})
    return (folder / "journal.jsonl").read_bytes()


@given(data=st.data())
def test_a_half_written_line_is_dropped_and_written_again(sample, tmp_path_factory, data):
    cut = data.draw(st.integers(0, len(sample)))
    folder = tmp_path_factory.mktemp("cut")
    (folder / "journal.jsonl").write_bytes(sample[:cut])
    book = Journal(folder)
    whole = sample[:cut].count(b"\n")
    assert (folder / "journal.jsonl").read_bytes() == b"".join(sample.splitlines(keepends=True)[:whole])
    for epoch in (1, 2, 3, 4):
        book.epoch({"epoch": epoch, "loss": 0.25})
    later = [record["step"] for record in written(folder)[min(whole, 1) :]]
    assert later == [1, 2, 3, 4]


def test_a_line_that_cannot_be_written_leaves_the_journal_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book = begun(epochs=1)
    before = (FOLDER / "journal.jsonl").read_bytes()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, len(before) + 9))
        with pytest.raises(OSError, match=r"space|large"):
            book.epoch({"epoch": 2, "loss": 1.0})
        assert (FOLDER / "journal.jsonl").read_bytes() == before

    assert ended(fill) == 0


def test_a_damaged_journal_is_told(tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(b'{"kind": "start"}\n\0\0\0\n')
    with pytest.raises(UserError, match=r"journal.jsonl is damaged .* remove .* to train anew"):
        Journal(tmp_path)


# What was lost with a killed process is not known to the next: it asks MLflow.


def ended(function, *arguments) -> int:
    """The exit status of a process which does that, negative for a signal."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def train(epochs: int = 4, permits=None) -> None:
    """As a stage would: resumes from its last checkpoint, which is older than the last epoch told.

    With permits it waits for one before each epoch, so that it cannot end before it is killed.
    """
    book, checkpoint = begun(), FOLDER / "checkpoint.json"
    book.deliver()
    for epoch in range(read_json(checkpoint) + 1 if checkpoint.is_file() else 1, epochs + 1):
        if permits is not None:
            permits.acquire()
        book.epoch(
            {"epoch": epoch, "loss": time.perf_counter(), "auc": 1 / time.perf_counter()}
        )  # never twice the same
        book.deliver()
        write_json(checkpoint, epoch)
    book.metrics({"seconds": {"fit": time.perf_counter()}})
    book.settle()
    book.close("FINISHED")


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
    assert ask(store, "select status from runs") == [("FINISHED",)]
    wanted = [(key, epoch) for epoch in range(1, epochs + 1) for key in ("loss", "auc")] + [("seconds.fit", 0)]
    assert [(key, step) for key, step, _ in points(store)] == wanted
    assert points(store) == expected()
    assert ask(store, "select count(*) from inputs") == [(1,)]
    assert ask(store, "select count(*) from params") == [(len(PARAMS),)]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (tracking, "open_run", 1), (tracking, "mark", 1), (tracking, "log_origin", 1), (tracking, "log_points", 1),
        (tracking, "log_points", 3), (journal, "write_json", 1), (journal, "write_json", 4), (lines.os, "fsync", 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_a_training_killed_there_goes_on_in_the_same_run(store, module, name, call, before):
    assert ended(train_and_die, module, name, call, before) == -signal.SIGKILL
    assert ended(train) == 0
    check_trained(store)


def test_a_training_killed_again_and_again_goes_on_in_the_same_run(store):
    moments, epochs, file = np.random.default_rng(0), 100, FOLDER / "journal.jsonl"
    for _ in range(10):
        begun_with = file.read_bytes().count(b"\n") if file.is_file() else 1
        new = int(moments.integers(1, 5))
        process = FORK.Process(target=train, args=(epochs, FORK.Semaphore(new + 5)))
        process.start()
        while not file.is_file() or file.read_bytes().count(b"\n") < begun_with + new:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
    assert 0 < len(points(store)) < 2 * epochs
    assert ended(train, epochs) == 0
    check_trained(store, epochs)


def test_what_mlflow_has_is_not_sent_again_whatever_its_time(store):
    book = begun(epochs=3)
    book.metrics({"seconds": {"fit": 2.5}})
    book.deliver()
    lines = written()
    for line in lines:
        line["time"] += 5  # a store that keys rows by their time would take them for new ones
    (FOLDER / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(FOLDER / "delivered.json", read_json(FOLDER / "delivered.json") | {"records": 2})
    book = Journal(FOLDER)
    book.epoch({"epoch": 4, "loss": 0.25, "auc": 0.04})
    assert book.deliver()
    assert points(store) == expected()
    assert len(expected()) == 9


# What is wrong and not merely away is told.


def deleted(book: Journal) -> None:
    MlflowClient().delete_run(book.run_id)


def gone(book: Journal) -> None:
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        with closing(sqlite3.connect("mlruns/mlflow.db")) as connection, connection:
            connection.execute(f"delete from {table}")  # noqa: S608


def deleted_experiment(book: Journal) -> None:
    MlflowClient().delete_experiment("1")


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "same process"])
@pytest.mark.parametrize(
    ("do", "message"),
    [
        (deleted, r"MLflow run \w+ of this training was deleted; restore it with `mlflow runs restore"),
        (gone, r"MLflow at .*/mlruns has no run \w+ of this training any more"),
        (deleted_experiment, "experiment fadeformer was deleted; restore it"),
    ],
)
def test_a_run_that_is_gone_is_told(store, do, message, resumed):
    book = begun(epochs=1)
    assert book.deliver()
    do(book)
    book = Journal(FOLDER) if resumed else book
    book.epoch({"epoch": 2, "loss": 1.0})
    with pytest.raises(UserError, match=message) as told:
        book.deliver()
    assert not isinstance(told.value, mlflow_store.Unreachable)
    with pytest.raises(UserError, match=message):
        book.settle()


def test_a_deleted_run_is_made_again_as_the_message_says(store):
    book = begun(epochs=2)
    book.deliver()
    deleted(book)
    (FOLDER / "delivered.json").unlink()
    again = Journal(FOLDER)
    assert again.settle() != book.run_id
    assert points(store) == expected() * 2


def test_a_changed_parameter_is_told(store):
    book = begun()
    experiment = mlflow_store.connect()
    run_id = tracking.open_run(experiment, written()[0]["identity"], 1, {})
    MlflowClient().log_param(run_id, "seed", "2")
    with pytest.raises(UserError, match=rf"Changing param values.*seed.*; delete run {run_id} there") as told:
        book.deliver()
    assert not isinstance(told.value, mlflow_store.Unreachable)


def test_another_mlflow_than_before_is_told(store, empty, monkeypatch, tmp_path):
    begun(epochs=1).deliver()
    other = shutil.copytree(empty / "mlruns", tmp_path / "other") / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with pytest.raises(UserError, match=rf"is at {store.parent}, and MLflow is now at sqlite:///{other}; set"):
        Journal(FOLDER).deliver()
    (FOLDER / "delivered.json").unlink()  # as the message says
    assert Journal(FOLDER).deliver()
    assert points(other) == points(store) == expected()


def test_a_project_that_moved_has_its_run(store, monkeypatch):
    run_id = begun(epochs=1).settle()
    monkeypatch.chdir(shutil.copytree(Path.cwd(), store.parents[2] / f"{store.parents[1].name}-moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    book = begun(epochs=2)
    assert book.settle() == run_id
    assert points(Path("mlruns/mlflow.db")) == expected()
    assert len(expected()) == 4


def test_no_password_is_told_or_kept(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@example.org:5000/mlflow/?token=secret")
    assert places.address() == "http://example.org:5000/mlflow"


# What is away is waited for.


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
def away(request, tmp_path, monkeypatch) -> str:
    """The address of an MLflow that cannot be reached, in one way or another."""
    monkeypatch.chdir(tmp_path)
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
    monkeypatch.setattr(journal, "PATIENCE", 1)
    monkeypatch.setattr(journal, "LAST_PATIENCE", 1)
    monkeypatch.setattr(journal, "LAST_TRIES", 2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    tries: list[str] = []
    knock = mlflow_store._knock
    monkeypatch.setattr(mlflow_store, "_knock", lambda *given: tries.append(given[0]) or knock(*given))
    Failing.asked, before = 0, dict(os.environ)
    book = begun()
    for epoch in range(1, 100):
        book.epoch({"epoch": epoch, "loss": 1.0})
        assert not book.deliver()
    book.close("KILLED")
    assert len(tries) == 1  # and no more within the pause
    assert Failing.asked <= 1
    assert os.environ == before
    told = capfd.readouterr()
    line, last = told.out.splitlines()
    assert line.startswith(
        f"MLflow at {away} cannot be reached: training goes on, and what it measures is kept in {FOLDER}"
    )
    assert last == f"MLflow at {away} was not told that the run of this training is KILLED: it cannot be reached"
    assert told.err == ""
    Journal(FOLDER).close("KILLED")
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(f"MLflow at {away} was not told that the run of this training is KILLED")
    with pytest.raises(
        UserError, match=rf"{away} cannot be reached.* finished and kept in {FOLDER}: start it, then run"
    ):
        Journal(FOLDER).settle()
    assert len(written()) == 100


def test_after_the_pause_it_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tries = []
    monkeypatch.setattr(mlflow_store, "connect", lambda real=mlflow_store.connect: tries.append(1) or real())
    clock = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])
    book = begun(epochs=1)
    for clock[0] in (0, 59, 61, 119, 122):
        assert not book.deliver()
    assert len(tries) == 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_locked_store_is_waited_for(store, monkeypatch, capfd):
    monkeypatch.setattr(journal, "PATIENCE", 1)
    monkeypatch.setattr(journal, "PAUSE", 0)
    book = begun(epochs=1)
    assert book.deliver()
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("begin exclusive")
        with monkeypatch.context() as locked:  # MLflow, which would wait 20 s each time, is not asked
            locked.setattr(mlflow_store, "connect", lambda: pytest.fail("MLflow was asked"))
            for epoch in (2, 3):
                book.epoch({"epoch": epoch, "loss": 1.0})
                assert not book.deliver()
        other.execute("rollback")
    assert book.deliver()
    told = capfd.readouterr()
    lost, found = told.out.splitlines()
    assert "cannot be reached" in lost
    assert lost.endswith("(database is locked)")
    assert found == f"MLflow at {store.parent} is reached again: 2 records delivered"
    assert told.err == ""
    assert points(store) == expected()


def test_a_full_store_is_waited_for(store, monkeypatch, capfd):
    def full() -> None:
        monkeypatch.setattr(journal, "PAUSE", 0)
        book = begun(epochs=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.stat().st_size,) * 2)
        book.metrics({"many": {f"{'x' * 200}{i}": i for i in range(900)}})
        assert not book.deliver()
        assert not book.deliver()

    assert ended(full) == 0
    told = capfd.readouterr()
    assert len(told.out.splitlines()) == 1
    assert told.err == ""
    Journal(FOLDER).settle()
    assert points(store) == expected()


def test_a_read_only_store_is_waited_for(store, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{store}?mode=ro&uri=true")
    assert not begun(epochs=1).deliver()
    told = capfd.readouterr()
    assert told.out.strip().endswith("readonly database)")
    assert told.err == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    Journal(FOLDER).settle()
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
        for _ in range(600):
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


def test_a_server_that_comes_late_and_dies_in_between(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "PAUSE", 0)
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    try:
        book = begun(epochs=2)
        assert not book.deliver()
        server.start()
        assert book.deliver()
        book.epoch({"epoch": 3, "loss": math.nan, "auc": 0.5})
        book.metrics({"many": {str(i): i for i in range(1500)}})
        assert book.deliver()
        server.kill()
        for epoch in (4, 5):
            book.epoch({"epoch": epoch, "loss": 1.0})
            assert not book.deliver()
        assert read_json(FOLDER / "delivered.json")["records"] == 5
        server.start()
        write_json(FOLDER / "delivered.json", read_json(FOLDER / "delivered.json") | {"records": 3})
        book = Journal(FOLDER)  # killed, too, and what was delivered last not noted
        book.epoch({"epoch": 5, "loss": 9.0})
        assert book.settle() == Journal(FOLDER).settle()
        assert str(points(server.database)) == str(expected())
        assert ask(server.database, "select count(*) from runs") == [(1,)]
        book.epoch({"epoch": 6, "loss": 1.0})
        MlflowClient().delete_run(book.run_id)
        with pytest.raises(UserError, match="was deleted"):
            book.deliver()
    finally:
        server.kill()
    told = capfd.readouterr()
    lines = told.out.splitlines()
    assert [("cannot be reached" in line, "is reached again" in line) for line in lines] == [
        (True, False), (False, True), (True, False),
    ]  # fmt: skip
    assert lines[1].endswith("is reached again: 3 records delivered")
    assert told.err == ""
