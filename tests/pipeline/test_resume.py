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
import torch

from fadeformer.training.checkpoints import CheckpointManager
from fadeformer.training.state import COST_FIELDS
from tests.conftest import ALL_CORES, Project, ReproducedProject, read_json_file
from tests.postgresql import free_port

pytestmark = pytest.mark.pipeline

OFTEN = {"epochs": 6, "checkpoint_minutes": 1e-6, "batch_size": 32, "device": "cpu"}  # a checkpoint after each step
SELDOM = {**OFTEN, "epochs": 2, "checkpoint_minutes": 5}
# A network without batch normalization and dropout, and an optimizer that rounding affects little.
STEADY = {
    "model": {"backbone": "vit_tiny_patch16_224", "fade": None, "dropout": 0.0, "drop_path": 0.0},
    "train": {**SELDOM, "optimizer": "sgd", "learning_rate": 0.02},
}
STEPS = 5  # of an epoch: 140 images
RESULTS = ("models/best_model.pth", "models/history.csv")


@pytest.fixture(scope="module")
def whole(project: Project, reproduced_project: ReproducedProject) -> Path:
    """A folder with what the same training has left that was never interrupted, with a checkpoint after each epoch."""
    reproduced_project.restore_to(project)
    folder = project.folder.parent / "whole"
    folder.mkdir()
    shutil.copytree(project.folder / "models", folder / "models")
    shutil.move(project.folder / "mlruns", folder / "mlruns")
    return folder


@pytest.fixture(scope="module")
def pieces(project: Project, whole: Path, prefect_server: str) -> Project:
    """A project whose next stage is train, without any run in MLflow; its flows report to a server that is running."""
    project.environment["PREFECT_API_URL"] = prefect_server
    project.change(train=OFTEN)
    project.commit("often")
    return project


@pytest.fixture
def own_server(pieces: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flows start their own server."""
    monkeypatch.delitem(pieces.environment, "PREFECT_API_URL")


def begun(project: Project) -> list[Path]:
    """Trainings that have not ended."""
    folders = sorted(path.parent for path in project.folder.glob(".cache/train/[!.]*/fingerprint.json"))
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


def killed(project: Project, reached: int) -> None:
    """Kills a training soon after a step."""
    with running(project, "dvc", "repro", "train", **ALL_CORES) as process:
        wait_for_step(project, process, reached)
        time.sleep(0.1 * np.random.default_rng(reached).random())
        os.killpg(process.pid, signal.SIGKILL)


def told_to_mlflow(folder: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every metric of training that is not a cost, in the order in which MLflow was told, and the runs' status."""
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as store:
        metrics = pd.read_sql("select run_uuid, key, step, value, timestamp from metrics", store)
        runs = dict(store.execute("select run_uuid, status from runs order by start_time"))
    metrics = metrics[~metrics["key"].isin(COST_FIELDS) & ~metrics["key"].str.contains(".", regex=False)]
    return metrics.sort_values(["timestamp", "step", "key"], kind="stable"), runs


def test_a_training_is_killed_in_its_first_step(pieces):
    """The tests after it interrupt the same training again; one of them tells what it comes to."""
    killed(pieces, 1)
    assert len(begun(pieces)) == 1


@pytest.mark.usefixtures("interruptible", "own_server")
@pytest.mark.parametrize(("number", "reached"), [(signal.SIGTERM, 7), (signal.SIGINT, 14)])
def test_a_signal_leaves_a_checkpoint_and_no_process(pieces, number, reached):
    """A signal to `make repro`."""
    with running(pieces, "make", "--assume-old", "install", "repro", **ALL_CORES) as process:
        wait_for_step(pieces, process, reached)
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
    assert list(told_to_mlflow(pieces.folder)[1].values()) == ["KILLED"]


@pytest.fixture(scope="module")
def away(pieces: Project) -> str:
    """What a training prints that finds no MLflow, and has other parameters than the one that was stopped."""
    assert len(begun(pieces)) == 1
    pieces.change(**STEADY)
    nobody = f"http://127.0.0.1:{free_port()}"
    output = pieces.run("python", "-m", "pipelines", "train", check=False, MLFLOW_TRACKING_URI=nobody)
    assert pieces.code == os.EX_TEMPFAIL
    return output


@pytest.fixture(scope="module")
def back(pieces: Project, away: str) -> str:
    """What that stage prints when it is run twice more and finds MLflow.

    The second time is that of a stage that was killed after its last line, before DVC noted its model.
    """
    shutil.rmtree(pieces.folder / "models", ignore_errors=True)  # as DVC does
    (pieces.folder / ".models.killed").mkdir()
    output = pieces.run("python", "-m", "pipelines", "train", "train")
    shutil.copytree(pieces.folder / "models", pieces.folder.parent / "steady")
    return output


def test_other_parameters_train_afresh_and_say_so(pieces, away):
    """The one before was stopped and is kept; below it goes on."""
    assert "training from the start, not from the checkpoint in .cache/train/" in away
    assert "model.backbone is vit_tiny_patch16_224, was fadevit_nano" in away
    assert "resumed after epoch" not in away


def test_without_mlflow_training_goes_on_and_is_told_later(pieces, away, back):
    assert away.count("cannot be reached: training continues") == 1
    assert "Traceback" not in away
    assert re.search(r"^train: .*the training is finished and kept in", away, re.MULTILINE), away
    assert "epoch   1/2" in away
    assert "epoch   1/2" not in back
    metrics, runs = told_to_mlflow(pieces.folder)
    new = read_json_file(pieces, "models/run.json")["mlflow_run_id"]
    assert list(runs.values()) == ["KILLED", "FINISHED"]
    assert runs[new] == "FINISHED"
    told = metrics[metrics["run_uuid"] == new]
    assert sorted(told.loc[told["key"] == "val_loss", "step"]) == [1, 2]


def test_a_model_that_dvc_has_not_noted_yet_is_not_trained_again(pieces, back):
    lines = re.findall(r"^train: .*; MLflow run \w+$", back, re.MULTILINE)
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert "epoch   1/" not in back
    (note,) = (pieces.folder / ".cache" / "train").glob("*/finished.json")
    trained = CheckpointManager(note.parent, 1).load_latest()["best_weights"]
    model = torch.load(pieces.folder / "models" / "best_model.pth", weights_only=True)
    torch.testing.assert_close(model, dict(trained), rtol=0, atol=0)
    assert not (pieces.folder / ".models.killed").exists()


def test_a_training_interrupted_anytime_ends_the_same(whole, pieces):
    """After a kill in the first step, two signals, another training in between, and a kill in the fifth epoch."""
    pieces.run("git", "checkout", "--quiet", "params.yaml")
    killed(pieces, 22)
    output = pieces.run("dvc", "repro", "train", **ALL_CORES)
    assert "resuming the unfinished training in .cache/train/" in output
    assert re.search(r"resumed after epoch \d, batch \d of the next epoch, step (2[2-9]|30)", output)
    for name in RESULTS:
        assert (pieces.folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert not begun(pieces)
    (metrics, runs), (expected, _) = told_to_mlflow(pieces.folder), told_to_mlflow(whole)
    assert not metrics.duplicated(["run_uuid", "key", "step"]).any()
    mine = read_json_file(pieces, "models/run.json")["mlflow_run_id"]
    assert list(runs) == [mine, *(runs.keys() - {mine})]
    assert list(runs.values()) == ["FINISHED", "FINISHED"]
    metrics = metrics[metrics["run_uuid"] == mine]
    assert metrics["step"].max() == OFTEN["epochs"]
    columns = ["key", "step", "value"]
    both = [table[columns].sort_values(columns[:2]).reset_index(drop=True) for table in (metrics, expected)]
    pd.testing.assert_frame_equal(*both, check_exact=True)
    in_time = metrics[metrics["key"] == "val_loss"]["step"]
    assert in_time.is_monotonic_increasing


@pytest.fixture(scope="module")
def steady(pieces: Project, back: str) -> pd.DataFrame:
    """The history of one process."""
    return pd.read_csv(pieces.folder.parent / "steady" / "history.csv")


def test_two_processes_come_to_the_history_of_one(pieces, steady):
    pieces.change(model=STEADY["model"], train={**STEADY["train"], "devices": 2})
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
        assert "another process runs the same training; wait until it has finished" in output
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert "Traceback" not in output
    assert re.search(r"^train: stopped by SIGTERM", output, re.MULTILINE), output
