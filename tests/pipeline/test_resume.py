"""A training that is killed, stopped, sent to several processes or cut off from MLflow comes to the same end."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from fadeformer.training.state import COST_FIELDS
from tests.conftest import EVERY_CORE, Kept, Project
from tests.postgresql import free_port

pytestmark = pytest.mark.pipeline

OFTEN = {"epochs": 6, "checkpoint_minutes": 1e-6, "batch_size": 32, "device": "cpu"}  # a checkpoint after each step
SELDOM = {**OFTEN, "epochs": 2, "checkpoint_minutes": 5}
STEPS = 5  # of an epoch: 140 images
RESULTS = ("models/best_model.pth", "models/history.csv")


@pytest.fixture(scope="module")
def pieces(project: Project, kept: Kept, prefect_server: str) -> Project:
    """A project whose next stage is train, without any run in MLflow; its flows report to a server that is running."""
    kept.give(project)
    project.environment["PREFECT_API_URL"] = prefect_server
    project.change(train=OFTEN)
    project.commit("often")
    shutil.rmtree(project.folder / "mlruns")
    return project


@pytest.fixture
def own_server(pieces: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flows start their own server."""
    monkeypatch.delitem(pieces.environment, "PREFECT_API_URL")


@pytest.fixture(scope="module")
def whole(pieces: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of it, whose training is never interrupted."""
    project = Project(tmp_path_factory.mktemp("whole"))
    project.environment["PREFECT_API_URL"] = pieces.environment["PREFECT_API_URL"]
    shutil.copytree(pieces.folder, project.folder)
    project.run("dvc", "repro", "train", **EVERY_CORE)
    return project


def begun(project: Project) -> list[Path]:
    """Trainings that have not ended."""
    folders = sorted(path.parent for path in project.folder.glob(".cache/train/[!.]*/made_of.json"))
    return [folder for folder in folders if not (folder / "finished.json").exists()]


def step(project: Project) -> int:
    """Step of the newest checkpoint of a training that has not ended."""
    found = [int(path.stem.removeprefix("step-")) for folder in begun(project) for path in folder.glob("step-*.pt")]
    return max(found, default=0)


@contextmanager
def running(project: Project, *command: str, **environment: str):
    """A command in a process group of its own, nothing of which is left."""
    process = subprocess.Popen(
        command, cwd=project.folder, env={**project.environment, **environment}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def forget(project: Project) -> None:
    """Removes what trainings before have left."""
    shutil.rmtree(project.folder / ".cache" / "train", ignore_errors=True)


def wait_for_step(project: Project, process: subprocess.Popen, wanted: int) -> None:
    deadline = time.monotonic() + 200
    while step(project) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    assert step(project) >= wanted


def told_to_mlflow(project: Project) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every metric that is not a cost, in the order in which MLflow was told, and the runs with their status."""
    with closing(sqlite3.connect(project.folder / "mlruns" / "mlflow.db")) as store:
        metrics = pd.read_sql("select run_uuid, key, step, value, timestamp from metrics", store)
        runs = dict(store.execute("select run_uuid, status from runs order by start_time"))
    metrics = metrics[~metrics["key"].isin(COST_FIELDS) & ~metrics["key"].str.startswith("seconds.")]
    return metrics.sort_values(["timestamp", "step", "key"], kind="stable"), runs


def test_a_training_killed_anytime_ends_the_same(whole, pieces):
    moments = np.random.default_rng(0)
    for reached in (1, 22):
        with running(pieces, "dvc", "repro", "train", **EVERY_CORE) as process:
            wait_for_step(pieces, process, reached)
            time.sleep(0.1 * moments.random())
            os.killpg(process.pid, signal.SIGKILL)
    output = pieces.run("dvc", "repro", "train", **EVERY_CORE)
    assert "going on with the training that was begun in .cache/train/" in output
    assert re.search(r"taken up after epoch \d, batch \d of the next, step (2[2-9]|30)", output)
    for name in RESULTS:
        assert (pieces.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not begun(pieces)
    (metrics, runs), (expected, _) = told_to_mlflow(pieces), told_to_mlflow(whole)
    assert list(runs.values()) == ["FINISHED"]
    assert not metrics.duplicated(["key", "step"]).any()
    assert metrics["step"].max() == OFTEN["epochs"]
    columns = ["key", "step", "value"]
    both = [table[columns].sort_values(columns[:2]).reset_index(drop=True) for table in (metrics, expected)]
    pd.testing.assert_frame_equal(*both, check_exact=True)
    in_time = metrics[metrics["key"] == "val_loss"]["step"]
    assert in_time.is_monotonic_increasing


@pytest.mark.usefixtures("interruptible", "own_server")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_no_process(pieces, number):
    """A signal to `make repro`."""
    forget(pieces)
    pieces.change(train={**OFTEN, "weight_decay": 0.03})
    with running(pieces, "make", "--assume-old", "install", "repro") as process:
        wait_for_step(pieces, process, 5)
        below = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(rf"^train: stopped by {number.name} (in epoch \d, after step|at once)", output, re.MULTILINE), (
        output
    )
    assert "Traceback" not in output
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert list(told_to_mlflow(pieces)[1].values())[-1] == "KILLED"


def test_other_parameters_train_afresh_and_say_so(pieces):
    """The one before was stopped and is kept."""
    assert len(begun(pieces)) == 1
    stopped = list(told_to_mlflow(pieces)[1])[-1]
    pieces.change(train={**OFTEN, "weight_decay": 0.03, "learning_rate": 0.002, "epochs": 1})
    output = pieces.run("python", "-m", "pipelines", "train")
    assert "training afresh, not from the checkpoint in .cache/train/" in output
    assert "train.learning_rate is 0.002, was 0.001" in output
    assert "taken up" not in output
    assert len(begun(pieces)) == 1
    pieces.change(train={**OFTEN, "weight_decay": 0.03, "learning_rate": 0.001})
    assert "taken up after epoch" in pieces.run("python", "-m", "pipelines", "train")
    assert not begun(pieces)
    metrics, runs = told_to_mlflow(pieces)
    assert runs[stopped] == "FINISHED"
    assert not metrics.duplicated(["run_uuid", "key", "step"]).any()


def test_a_model_that_dvc_has_not_noted_yet_is_not_trained_again(pieces):
    """The stage was killed after its last line; DVC removes models/ and runs it again."""
    before = [(pieces.folder / name).read_bytes() for name in ("models/best_model.pth", "models/run.json")]
    (pieces.folder / ".models.killed").mkdir()
    shutil.rmtree(pieces.folder / "models")
    output = pieces.run("python", "-m", "pipelines", "train")
    assert "epoch   1/" not in output
    assert [(pieces.folder / name).read_bytes() for name in ("models/best_model.pth", "models/run.json")] == before
    assert not (pieces.folder / ".models.killed").exists()


def test_without_mlflow_training_goes_on_and_is_told_later(pieces):
    nobody = f"http://127.0.0.1:{free_port()}"
    forget(pieces)
    pieces.change(train=SELDOM)
    before = told_to_mlflow(pieces)[1]
    output = pieces.run("python", "-m", "pipelines", "train", check=False, MLFLOW_TRACKING_URI=nobody)
    assert pieces.code == os.EX_TEMPFAIL
    assert output.count("cannot be reached: training goes on") == 1
    assert "Traceback" not in output
    assert re.search(r"^train: .*the training is finished and kept in", output, re.MULTILINE), output
    output = pieces.run("python", "-m", "pipelines", "train")
    assert "epoch   1/2" not in output
    metrics, runs = told_to_mlflow(pieces)
    (new,) = runs.keys() - before.keys()
    assert runs[new] == "FINISHED"
    told = metrics[metrics["run_uuid"] == new]
    assert sorted(told.loc[told["key"] == "val_loss", "step"]) == [1, 2]


@pytest.fixture(scope="module")
def steady(pieces: Project) -> pd.DataFrame:
    """The history of one process: no batch normalization, no dropout, and an optimizer that rounding affects little."""
    pieces.change(
        model={"backbone": "vit_tiny_patch16_224", "fade": None, "dropout": 0.0, "drop_path": 0.0},
        train={**SELDOM, "optimizer": "sgd", "learning_rate": 0.02},
    )
    pieces.run("python", "-m", "pipelines", "train")
    return pd.read_csv(pieces.folder / "models" / "history.csv")


def test_two_processes_come_to_the_history_of_one(pieces, steady):
    pieces.change(train={"devices": 2})
    pieces.run("python", "-m", "pipelines", "train")
    found = pd.read_csv(pieces.folder / "models" / "history.csv")
    assert found["epoch"].tolist() == steady["epoch"].tolist()
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert found[name].to_numpy() == pytest.approx(steady[name].to_numpy(), abs=1e-5), name
    assert steady["train_loss"].nunique() == len(steady)


def test_two_machines_do_so_too(pieces, steady):
    pieces.change(train={"devices": 1, "checkpoint_minutes": 6})
    cluster = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    other = ["torchrun", "--nproc-per-node", "1", "-m", "pipelines.stages.train_worker"]
    with running(pieces, *other, **cluster, PET_NODE_RANK="1") as process:
        pieces.run("python", "-m", "pipelines", "train", **cluster, PET_NODE_RANK="0")
        assert process.wait(timeout=60) == 0
    found = pd.read_csv(pieces.folder / "models" / "history.csv")
    for name in ("train_loss", "val_loss"):
        assert found[name].to_numpy() == pytest.approx(steady[name].to_numpy(), abs=1e-5), name


def test_an_error_in_one_of_several_processes_is_one_message(pieces):
    pieces.change(train={"devices": 2, "batch_size": 2})
    output = pieces.run("python", "-m", "pipelines", "train", check=False)
    assert pieces.code == 1
    assert re.search(r"^train: a batch of 2 images is too small for 2 device\(s\)", output, re.MULTILINE), output
    assert "Traceback" not in output


@pytest.mark.usefixtures("own_server")
def test_another_process_does_not_train_the_same_and_sigterm_reaches_all(pieces, prefect_server):
    """Several processes, of a network with batch normalization, in the second epoch."""
    forget(pieces)
    long = {**SELDOM, "devices": 2, "epochs": 1000, "early_stopping_patience": 1000}
    pieces.change(model={"backbone": "resnet18", "fade": None}, train=long)
    with running(pieces, sys.executable, "-m", "pipelines", "train") as process:
        wait_for_step(pieces, process, STEPS)
        output = pieces.run("python", "-m", "pipelines", "train", check=False, PREFECT_API_URL=prefect_server)
        assert pieces.code == os.EX_TEMPFAIL
        assert "another process trains the very same; wait until it has ended" in output
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert "Traceback" not in output
    assert re.search(r"^train: stopped by SIGTERM", output, re.MULTILINE), output
