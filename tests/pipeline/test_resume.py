"""Resuming: killed, stopped, distributed and offline trainings have the same result as an uninterrupted one."""

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

FREQUENT = {"epochs": 6, "checkpoint_minutes": 1e-6, "batch_size": 32, "device": "cpu"}  # a checkpoint after each step
RARE = {**FREQUENT, "epochs": 2, "checkpoint_minutes": 5}
# A model without batch normalization and dropout, and an optimizer with little sensitivity to rounding.
STABLE = {
    "model": {"backbone": "vit_tiny_patch16_224", "fade": None, "dropout": 0.0, "drop_path": 0.0},
    "train": {**RARE, "optimizer": "sgd", "learning_rate": 0.02},
}
STEPS = 5  # per epoch of 140 images
RESULTS = ("models/best_model.pth", "models/history.csv")


@pytest.fixture(scope="module")
def uninterrupted(project: Project, reproduced_project: ReproducedProject) -> Path:
    """Folder with the results of an uninterrupted training, with a checkpoint after each epoch."""
    reproduced_project.restore_to(project)
    folder = project.folder.parent / "uninterrupted"
    folder.mkdir()
    shutil.copytree(project.folder / "models", folder / "models")
    shutil.move(project.folder / "mlruns", folder / "mlruns")
    return folder


@pytest.fixture(scope="module")
def interrupted(project: Project, uninterrupted: Path, prefect_server: str) -> Project:
    """A project whose next stage is train, with an empty MLflow store and a running Prefect server."""
    project.environment["PREFECT_API_URL"] = prefect_server
    project.change(train=FREQUENT)
    project.commit("frequent checkpoints")
    return project


@pytest.fixture
def own_server(interrupted: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands start their own Prefect server."""
    monkeypatch.delitem(interrupted.environment, "PREFECT_API_URL")


def unfinished_trainings(project: Project) -> list[Path]:
    """Folders of unfinished trainings."""
    folders = sorted(path.parent for path in project.folder.glob(".cache/train/[!.]*/fingerprint.json"))
    return [folder for folder in folders if not (folder / "finished.json").exists()]


def last_step(project: Project) -> int:
    """Step of the newest checkpoint of an unfinished training."""
    steps = [
        int(path.stem.removeprefix("step-"))
        for folder in unfinished_trainings(project)
        for path in folder.glob("step-*.pt")
    ]
    return max(steps, default=0)


@contextmanager
def running(project: Project, *command: str, **environment: str):
    """Run a command in a new process group, and kill the group at the end."""
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


def remove_checkpoints(project: Project) -> None:
    """Remove the checkpoints of earlier trainings."""
    shutil.rmtree(project.folder / ".cache" / "train", ignore_errors=True)


def wait_for_step(project: Project, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 200
    while last_step(project) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    assert last_step(project) >= step


def kill_after(project: Project, step: int) -> None:
    """Kill a training soon after a step."""
    with running(project, "dvc", "repro", "train", **ALL_CORES) as process:
        wait_for_step(project, process, step)
        time.sleep(0.1 * np.random.default_rng(step).random())
        os.killpg(process.pid, signal.SIGKILL)


def read_mlflow(folder: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Training metrics except costs, in logging order, and the status of each run."""
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as store:
        metrics = pd.read_sql("select run_uuid, key, step, value, timestamp from metrics", store)
        runs = dict(store.execute("select run_uuid, status from runs order by start_time"))
    metrics = metrics[~metrics["key"].isin(COST_FIELDS) & ~metrics["key"].str.match(r"(?:seconds|test|val)\.")]
    return metrics.sort_values(["timestamp", "step", "key"], kind="stable"), runs


def test_training_killed_in_the_first_step_can_resume(interrupted):
    """Later tests interrupt the same training again, and compare its results."""
    kill_after(interrupted, 1)
    assert len(unfinished_trainings(interrupted)) == 1


@pytest.mark.usefixtures("interruptible", "own_server")
# SIGINT reaches the training directly; SIGTERM takes up to two seconds through make and DVC.
@pytest.mark.parametrize(("number", "reached"), [(signal.SIGINT, 4), (signal.SIGTERM, 9)])
def test_signal_stops_make_repro_with_a_checkpoint(interrupted, number, reached):
    with running(interrupted, "make", "--assume-old", "install", "repro", **ALL_CORES) as process:
        wait_for_step(interrupted, process, reached)
        descendants = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # like a terminal
        else:
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(rf"^train: stopped by {number.name} (in epoch \d, after step|at once)", output, re.MULTILINE), (
        output
    )
    assert "Traceback" not in output
    assert psutil.wait_procs(descendants, timeout=10)[1] == []
    assert list(read_mlflow(interrupted.folder)[1].values()) == ["KILLED"]


@pytest.fixture(scope="module")
def offline(interrupted: Project) -> str:
    """Output of a training without MLflow, with other parameters than the stopped training."""
    assert len(unfinished_trainings(interrupted)) == 1
    interrupted.change(**STABLE)
    unreachable_url = f"http://127.0.0.1:{free_port()}"
    output = interrupted.run("python", "-m", "pipelines", "train", check=False, MLFLOW_TRACKING_URI=unreachable_url)
    assert interrupted.code == os.EX_TEMPFAIL
    return output


@pytest.fixture(scope="module")
def online(interrupted: Project, offline: str) -> str:
    """Output of two more runs of that stage, with MLflow.

    The second run is like one after a kill between the end of the stage and DVC's update of dvc.lock.
    """
    shutil.rmtree(interrupted.folder / "models", ignore_errors=True)  # like DVC
    output = interrupted.run("python", "-m", "pipelines", "train")
    shutil.move(interrupted.folder / "models", interrupted.folder.parent / "stable")
    (interrupted.folder / ".models.killed").mkdir()
    return output + interrupted.run("python", "-m", "pipelines", "train")


def test_other_parameters_start_a_new_training(interrupted, offline):
    """The stopped training is kept; a later test resumes it."""
    assert "training from the start, not from the checkpoint in .cache/train/" in offline
    assert "model.backbone is vit_tiny_patch16_224, was fadevit_nano" in offline
    assert "resumed after epoch" not in offline


def test_training_without_mlflow_is_logged_later(interrupted, offline, online):
    assert offline.count("cannot be reached: training continues") == 1
    assert "Traceback" not in offline
    assert re.search(r"^train: .*the training is finished and stored in", offline, re.MULTILINE), offline
    assert "epoch   1/2" in offline
    assert "epoch   1/2" not in online
    metrics, runs = read_mlflow(interrupted.folder)
    new = read_json_file(interrupted, "models/run.json")["mlflow_run_id"]
    assert list(runs.values()) == ["KILLED", "FINISHED"]
    assert runs[new] == "FINISHED"
    logged = metrics[metrics["run_uuid"] == new]
    assert sorted(logged.loc[logged["key"] == "val_loss", "step"]) == [1, 2]


def test_finished_training_is_not_repeated_before_dvc_commit(interrupted, online):
    lines = re.findall(r"^train: .*; MLflow run \w+$", online, re.MULTILINE)
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert "epoch   1/" not in online
    (marker,) = (interrupted.folder / ".cache" / "train").glob("*/finished.json")
    trained = CheckpointManager(marker.parent, 1).load_latest()["best_weights"]
    model = torch.load(interrupted.folder / "models" / "best_model.pth", weights_only=True)
    torch.testing.assert_close(model, dict(trained), rtol=0, atol=0)
    for name in ("best_model.pth", "run.json"):
        first, second = interrupted.folder.parent / "stable" / name, interrupted.folder / "models" / name
        assert first.read_bytes() == second.read_bytes(), name
    assert not (interrupted.folder / ".models.killed").exists()


def test_interrupted_training_gives_the_same_bytes(uninterrupted, interrupted):
    """After a kill in the first step, two signals, another training, and a kill in the fifth epoch."""
    interrupted.run("git", "checkout", "--quiet", "params.yaml")
    kill_after(interrupted, 22)
    output = interrupted.run("dvc", "repro", "train", **ALL_CORES)
    assert "resuming the unfinished training in .cache/train/" in output
    assert re.search(r"resumed after epoch \d, batch \d of the next epoch, step (2[2-9]|30)", output)
    for name in RESULTS:
        assert (interrupted.folder / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    assert not unfinished_trainings(interrupted)
    (metrics, runs), (expected, _) = read_mlflow(interrupted.folder), read_mlflow(uninterrupted)
    assert not metrics.duplicated(["run_uuid", "key", "step"]).any()
    run_id = read_json_file(interrupted, "models/run.json")["mlflow_run_id"]
    assert list(runs) == [run_id, *(runs.keys() - {run_id})]
    assert list(runs.values()) == ["FINISHED", "FINISHED"]
    metrics = metrics[metrics["run_uuid"] == run_id]
    assert metrics["step"].max() == FREQUENT["epochs"]
    columns = ["key", "step", "value"]
    both = [table[columns].sort_values(columns[:2]).reset_index(drop=True) for table in (metrics, expected)]
    pd.testing.assert_frame_equal(*both, check_exact=True)
    logged_epochs = metrics[metrics["key"] == "val_loss"]["step"]
    assert logged_epochs.is_monotonic_increasing


@pytest.fixture(scope="module")
def stable(interrupted: Project, online: str) -> pd.DataFrame:
    """Training history with one process."""
    return pd.read_csv(interrupted.folder.parent / "stable" / "history.csv")


def test_two_processes_have_the_history_of_one(interrupted, stable):
    interrupted.change(model=STABLE["model"], train={**STABLE["train"], "devices": 2})
    interrupted.run("python", "-m", "pipelines", "train")
    history = pd.read_csv(interrupted.folder / "models" / "history.csv")
    assert history["epoch"].tolist() == stable["epoch"].tolist()
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert history[name].to_numpy() == pytest.approx(stable[name].to_numpy(), abs=1e-5), name
    assert stable["train_loss"].nunique() == len(stable)


def test_two_machines_have_the_history_of_one(interrupted, stable):
    interrupted.change(train={"devices": 1, "checkpoint_minutes": 6})
    cluster = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    other = ["torchrun", "--nproc-per-node", "1", "-m", "pipelines.stages.train_worker"]
    with running(interrupted, *other, **cluster, PET_NODE_RANK="1") as process:
        interrupted.run("python", "-m", "pipelines", "train", **cluster, PET_NODE_RANK="0")
        assert process.wait(timeout=60) == 0
    history = pd.read_csv(interrupted.folder / "models" / "history.csv")
    for name in ("train_loss", "val_loss"):
        assert history[name].to_numpy() == pytest.approx(stable[name].to_numpy(), abs=1e-5), name


def test_error_in_one_process_is_one_message(interrupted):
    interrupted.change(train={"devices": 2, "batch_size": 2})
    output = interrupted.run("python", "-m", "pipelines", "train", check=False)
    assert interrupted.code == 1
    assert re.search(r"^train: a batch of 2 images is too small for 2 device\(s\)", output, re.MULTILINE), output
    assert "Traceback" not in output


@pytest.mark.usefixtures("own_server")
def test_running_training_is_locked_and_stops_on_sigterm(interrupted, prefect_server):
    """Two processes, a model with batch normalization, in the second epoch."""
    remove_checkpoints(interrupted)
    long = {**RARE, "devices": 2, "epochs": 1000, "early_stopping_patience": 1000}
    interrupted.change(model={"backbone": "resnet18", "fade": None}, train=long)
    with running(interrupted, sys.executable, "-m", "pipelines", "train") as process:
        wait_for_step(interrupted, process, STEPS)
        output = interrupted.run("python", "-m", "pipelines", "train", check=False, PREFECT_API_URL=prefect_server)
        assert interrupted.code == os.EX_TEMPFAIL
        assert "another process runs the same training; wait until it has finished" in output
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert psutil.wait_procs(descendants, timeout=10)[1] == []
    assert "Traceback" not in output
    assert re.search(r"^train: stopped by SIGTERM", output, re.MULTILINE), output
