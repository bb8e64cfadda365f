"""The whole pipeline as a deployment: a Prefect server and a process worker run it with an override."""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import Project

pytestmark = pytest.mark.pipeline
PATIENCE = 120  # seconds until the server must answer


@pytest.fixture(scope="module")
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/api"


@pytest.fixture(scope="module")
def started(project: Project, address: str) -> Iterator[Callable[..., Path]]:
    """Starts a program of the project in the background and gives its log; all end with the module."""
    running = []

    def start(*command: str) -> Path:
        log = project.folder.parent / f"{command[1]}.log"
        environment = {**project.environment, "PREFECT_API_URL": address}
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=project.folder, env=environment, stdout=file, stderr=file)
        running.append(process)
        return log

    yield start
    for process in reversed(running):  # the worker while it can still tell the server
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # Prefect's worker hangs now and then when told so just after a run has ended
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def finished(project: Project, address: str, started) -> str:
    """What the deployment run printed, on a server and a worker started for it."""
    log = started("prefect", "server", "start", "--host", "127.0.0.1", "--port", address.split(":")[2].split("/")[0])
    try:
        soon(lambda: answers(f"{address}/health"))
    except AssertionError:
        pytest.fail(log.read_text())
    prefect = ("prefect", "--no-prompt")
    project.run(*prefect, "work-pool", "create", "local", "--type", "process", PREFECT_API_URL=address)
    project.run(*prefect, "deploy", "--all", PREFECT_API_URL=address)
    started("prefect", "worker", "start", "--pool", "local")
    command = ("deployment", "run", "pipeline/local", "--param", 'train={"epochs": 1}', "--watch")
    return project.run("prefect", *command, PREFECT_API_URL=address)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return response.status == 200
    except (URLError, OSError):
        return False


def soon(true: Callable[[], object]) -> object:
    """Waits until something is true, and gives it."""
    deadline = time.monotonic() + PATIENCE
    while not (value := true()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return value


def stages(project: Project) -> list[list[str]]:
    """Commands of DVC, its shells and stages that run in the project."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # one that has just ended, or a zombie
            command = process.cmdline()
            if process.cwd() == str(project.folder) and {"dvc", "pipelines"} & set(" ".join(command).split()):
                found.append(command)
    return found


def ask(address: str, what: str) -> list[dict]:
    request = Request(f"{address}/{what}/filter", data=b"{}", headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def test_the_run_ends_completed(finished):
    assert "Completed" in finished


def test_the_override_was_used_and_params_yaml_is_as_it_was(project, finished):
    settings = json.loads((project.folder / "models/model.json").read_text())["params"]
    assert settings["train"]["epochs"] == 1
    assert project.run("git", "status", "--short", "params.yaml") == ""
    assert json.loads((project.folder / "reports/promotion.json").read_text())["decision"] == "promoted"


def test_the_server_saw_every_flow_and_task_by_its_name(finished, address):
    flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
    runs = ask(address, "flow_runs")
    assert {flows[run["flow_id"]] for run in runs} == {"pipeline", "train", "evaluate"}
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    tasks = {task["name"].rsplit("-", 1)[0] for task in ask(address, "task_runs")}
    assert tasks == {
        "download", "validate", "preprocess", "train", "evaluate", "promote", "fit the network", "write the model",
        "log the history to MLflow", "predict", "measure", "draw figures", "write the report",
        "log the evaluation to MLflow",
    }  # fmt: skip


def test_a_value_that_params_yaml_would_refuse_is_refused_at_submission(project, finished, address):
    command = ("deployment", "run", "pipeline/local", "--param", 'train={"epochs": 0}')
    output = project.run("prefect", *command, check=False, PREFECT_API_URL=address)
    assert project.code != 0
    assert "minimum" in output


def test_a_run_that_is_cancelled_ends_its_stage_and_leaves_nothing_behind(project, finished, address):
    endless = json.dumps({"epochs": 10**6, "early_stopping_patience": 10**6})
    options = ("--param", f"train={endless}", "--flow-run-name", "endless")
    known = {run["id"] for run in ask(address, "flow_runs")}
    project.run("prefect", "deployment", "run", "pipeline/local", *options, PREFECT_API_URL=address)

    def states() -> dict[str, str]:
        flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
        new = [run for run in ask(address, "flow_runs") if run["id"] not in known]
        return {flows[run["flow_id"]]: run["state_type"] for run in new}

    soon(lambda: states().get("train") == "RUNNING")
    assert len(stages(project)) >= 2  # dvc and the stage; a shell that only calls may have become the stage
    (run,) = [run["id"] for run in ask(address, "flow_runs") if run["name"] == "endless"]
    project.run("prefect", "--no-prompt", "flow-run", "cancel", run, PREFECT_API_URL=address)
    soon(lambda: not stages(project))
    soon(lambda: states()["pipeline"] == "CANCELLED")
    assert states()["train"] in ("CRASHED", "FAILED")  # the stage told its end, and by a signal of its own
    assert project.run("git", "status", "--short", "params.yaml") == ""


def test_drift_is_told_by_the_command_and_by_the_state_of_a_run(project, finished, address):
    scans = project.folder / "data" / "own" / "scans"
    scans.mkdir(parents=True)
    pixels = np.load(project.folder / "data/processed/test.npy")
    for number, image in enumerate(pixels):
        Image.fromarray(255 - image).save(scans / f"{number}.png")
    output = project.run(
        "fadeformer", "drift", "data/own/scans", "--model", "models:/fadenet-phantom@champion", check=False
    )
    assert project.code == 4
    assert "image brightness" in output
    assert (project.folder / "reports/drift/index.html").is_file()
    output = project.run(
        "prefect", "deployment", "run", "drift/local", "--watch", check=False, PREFECT_API_URL=address
    )  # fmt: skip
    assert project.code != 0
    assert "Failed" in output
    last = max((run for run in ask(address, "flow_runs")), key=lambda run: run["created"])
    assert "image brightness" in last["state"]["message"]
