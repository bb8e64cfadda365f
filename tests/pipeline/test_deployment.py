"""Deployments: a Prefect server and process workers run the pipeline, in copies and in the user's folder."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image
from ruamel.yaml import YAML

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
        if log.exists():
            log.rename(log.with_suffix(".before"))
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
    project.run("python", "-m", "pipelines.deploy", PREFECT_API_URL=address)
    project.run("python", "-m", "pipelines.deploy", "--at-once", "2", PREFECT_API_URL=address)  # changes what is there
    started("prefect", "worker", "start", "--pool", "local")
    options = ("--param", 'train={"epochs": 1}', "--watch", "--flow-run-name", "first")
    return project.run("prefect", "deployment", "run", "pipeline/train", *options, PREFECT_API_URL=address)


@pytest.fixture(scope="module")
def experiment(project: Project, finished: str) -> str:
    """Name of the DVC experiment that the run left."""
    return left(project, "first")


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return response.status == 200
    except (URLError, OSError):
        return False


def soon(true: Callable[[], object], patience: float = PATIENCE) -> object:
    """Waits until something is true, and gives it."""
    deadline = time.monotonic() + patience
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


def ask(address: str, what: str, **wanted: object) -> list[dict]:
    body = json.dumps(wanted).encode()
    request = Request(f"{address}/{what}/filter", data=body, headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def run_named(address: str, name: str) -> dict:
    """The only run whose name is this, or begins with it."""
    found = [run for run in ask(address, "flow_runs") if run["name"] == name or run["name"].startswith(f"{name}-")]
    (run,) = [run for run in found if run["name"] == name] or found
    return run


def artifacts(address: str, name: str) -> dict[str, str]:
    """What the page of a run shows, by key."""
    run = run_named(address, name)["id"]
    found = ask(address, "artifacts", artifacts={"flow_run_id": {"any_": [run]}})
    return {artifact["key"]: artifact["data"] for artifact in found}


def left(project: Project, run: str) -> str:
    """Name of the DVC experiment that a run has left."""
    (name,) = [name for name in project.run("dvc", "exp", "list", "--name-only").split() if name.startswith(f"{run}-")]
    return name


def commit_of(project: Project, experiment: str) -> str:
    return project.run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{experiment}").strip()


def model_of(project: Project, experiment: str) -> list[dict]:
    """What an experiment's dvc.lock says of the model: where it lies, and its checksum."""
    lock = YAML(typ="safe").load(project.run("git", "show", f"{commit_of(project, experiment)}:dvc.lock"))
    return lock["stages"]["train"]["outs"]


def test_parameters_and_results_are_an_experiment_and_the_users_folder_is_as_it_was(project, finished, experiment):
    assert "Completed" in finished
    assert experiment.startswith("first-")
    changed = project.run("git", "diff", "--unified=0", f"main..{commit_of(project, experiment)}", "--", "params.yaml")
    lines = [line.split("#")[0].split() for line in changed.splitlines() if line.startswith(("+ ", "- "))]
    assert lines == [["-", "epochs:", "6"], ["+", "epochs:", "1"]]
    assert project.run("git", "status", "--short") == ""
    assert not (project.folder / "models").exists()
    (entry,) = map(json.loads, history(project))
    assert entry["action"] == "promoted"


def test_the_page_of_a_run_shows_numbers_verdict_and_experiment(finished, address, experiment):
    shown = artifacts(address, "first")
    assert set(shown) == {"metrics", "verdict", "experiment"}  # MLflow has no server here, and so no page
    assert "auc" in [row["measure"] for row in json.loads(shown["metrics"])]
    assert shown["verdict"].startswith("# fadenet-phantom version 1: promoted")
    assert experiment in shown["experiment"]


def shown(tab: Any, name: str) -> None:
    """Keeps what a page shows, for README.md, where FADEFORMER_SCREENSHOTS names a folder."""
    if folder := os.environ.get("FADEFORMER_SCREENSHOTS"):
        tab.wait_for_timeout(15000)  # until what moves into view has come: Prefect's graph takes its time
        tab.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A page of a browser whose waits are long enough for a busy machine."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * PATIENCE)
    yield page
    page.close()


@pytest.fixture(scope="module")
def mlflow(project: Project, experiment: str, started) -> str:
    """Address of MLflow's pages on the project's store, as `make ui` shows them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = (
        "--backend-store-uri",
        "sqlite:///mlruns/mlflow.db?timeout=60",
        "--artifacts-destination",
        "mlruns/artifacts",
    )
    started("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store)
    soon(lambda: answers(f"http://127.0.0.1:{port}/health"))
    return f"http://127.0.0.1:{port}"


def test_a_browser_shows_the_form_of_a_run_with_its_values_and_comments(finished, address, tab):
    (train,) = [one for one in ask(address, "deployments") if one["name"] == "train"]
    tab.goto(f"{address.removesuffix('/api')}/deployments/deployment/{train['id']}/run")
    tab.get_by_text("side of an image, pixels: 28 | 64 | 128 | 224 for MedMNIST, 16 to 1024 for phantom").wait_for()
    shown(tab, "prefect-form")
    tab.get_by_text("images of one step, over all devices").scroll_into_view_if_needed()
    values = tab.evaluate("[...document.querySelectorAll('input')].map(input => input.value)")
    assert {"42", "16", "32"} <= set(values)  # seed, dataset.size and train.batch_size


def test_a_browser_shows_stages_numbers_and_verdict_of_a_run(finished, address, tab):
    tab.goto(f"{address.removesuffix('/api')}/runs/flow-run/{run_named(address, 'first')['id']}")
    tab.get_by_text("Completed").first.wait_for()
    tab.get_by_text("Task Runs", exact=True).click()
    tab.get_by_text("promote", exact=True).first.wait_for()
    shown(tab, "prefect-run")
    tab.get_by_text("Artifacts", exact=True).click()
    tab.get_by_text("Numbers of test with their intervals, and of val").wait_for()
    tab.get_by_text("verdict", exact=True).click()
    tab.get_by_role("cell", name="the data gate let the data pass").wait_for()
    assert tab.get_by_text("fadenet-phantom version 1: promoted").is_visible()
    shown(tab, "prefect-verdict")


def test_the_form_begins_with_the_values_of_params_yaml_and_explains_them(finished, address):
    (train,) = [one for one in ask(address, "deployments") if one["name"] == "train"]
    form = train["parameter_openapi_schema"]["definitions"]["TrainOverrides"]["properties"]
    assert form["batch_size"]["default"] == 32
    assert form["batch_size"]["description"] == "images of one step, over all devices"


def test_the_server_saw_every_flow_and_task_by_its_name(finished, address):
    flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
    runs = ask(address, "flow_runs")
    assert sorted(flows[run["flow_id"]] for run in runs) == ["evaluate", "pipeline", "train"]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    tasks = {task["name"].rsplit("-", 1)[0] for task in ask(address, "task_runs")}
    assert tasks == {
        "bring results", "keep results",
        "download", "validate", "preprocess", "train", "evaluate", "promote", "fit the network", "write the model",
        "predict", "measure", "explain", "draw figures", "write the report",
        "log the evaluation to MLflow",
    }  # fmt: skip


def test_a_value_that_params_yaml_would_refuse_is_refused_at_submission(project, finished, address):
    command = ("deployment", "run", "pipeline/train", "--param", 'train={"epochs": 0}')
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


def test_a_grid_runs_each_combination_and_shows_a_table(project, finished, address):
    options = ("--param", 'vary={"seed": [1, 2]}', "--param", 'fixed={"train.epochs": 1}', "--flow-run-name", "seeds")
    output = project.run("prefect", "deployment", "run", "grid/benchmark", *options, "--watch", PREFECT_API_URL=address)
    assert "Completed" in output
    rows = json.loads(artifacts(address, "seeds")["grid"])
    assert [(row["seed"], row["state"]) for row in rows] == [(1, "Completed"), (2, "Completed")]
    assert all("(" in row["test AUC"] and row["decision"].startswith("fadenet-phantom version") for row in rows)


def test_a_sweep_runs_its_trials_on_the_server(project, finished, address):
    space = project.folder / "seeds.yaml"
    space.write_text("trials: 1\nfixed: {train.epochs: 1}\nspace: {seed: [5, 6]}\n")
    output = project.run("fadeformer", "sweep", space.name, PREFECT_API_URL=address)
    space.unlink()
    assert run_named(address, "seeds-000")["state_type"] == "COMPLETED"
    assert set(artifacts(address, "seeds-000")) == {"experiment"}
    assert f"`prefect deployment run evaluation/evaluate --param of={left(project, 'seeds-000')}`" in output


def test_its_best_is_evaluated_and_judged_again_without_another_training(project, address):
    trained = len(ask(address, "flow_runs", flows={"name": {"any_": ["train"]}}))
    command = ("deployment", "run", "evaluation/evaluate", "--param", f"of={left(project, 'seeds-000')}", "--watch")
    narrow = ("--param", 'evaluate={"confidence": 0.9}', "--flow-run-name", "narrow")
    project.run("prefect", *command, *narrow, PREFECT_API_URL=address)
    assert {"metrics", "verdict", "experiment"} <= set(artifacts(address, "narrow"))
    name = left(project, "narrow")
    assert model_of(project, name) == model_of(project, left(project, "seeds-000"))
    intervals = ("dvc", "get", ".", "reports/intervals.json", "--rev", commit_of(project, name), "--out", "narrow.json")
    project.run(*intervals)
    assert json.loads((project.folder / "narrow.json").read_text())["confidence"] == 0.9
    (project.folder / "narrow.json").unlink()
    command = ("deployment", "run", "promotion/promote", "--param", f"of={name}", "--watch")
    strict = ("--param", 'promote={"min_auc": 1.0}', "--flow-run-name", "stricter")
    assert "Completed" in project.run("prefect", *command, *strict, PREFECT_API_URL=address)
    assert ": refused" in artifacts(address, "stricter")["verdict"].splitlines()[0]
    assert len(ask(address, "flow_runs", flows={"name": {"any_": ["train"]}})) == trained


def test_a_grid_that_is_cancelled_cancels_its_runs(project, finished, address):
    endless = json.dumps({"train.epochs": 10**6, "train.early_stopping_patience": 10**6})
    options = ("--param", 'vary={"seed": [11, 12, 13]}', "--param", f"fixed={endless}", "--flow-run-name", "given up")
    project.run("prefect", "deployment", "run", "grid/benchmark", *options, PREFECT_API_URL=address)

    def states() -> list[str]:
        names = {"name": {"any_": ["seed=11", "seed=12", "seed=13"]}}
        return sorted(run["state_type"] for run in ask(address, "flow_runs", flow_runs=names))

    soon(lambda: states() == ["RUNNING", "RUNNING", "SCHEDULED"])  # two at a time
    run = run_named(address, "given up")["id"]
    project.run("prefect", "--no-prompt", "flow-run", "cancel", run, PREFECT_API_URL=address)
    soon(lambda: not {"RUNNING", "SCHEDULED", "PENDING", "CANCELLING"} & set(states()))
    assert states() == ["CANCELLED"] * 3
    soon(lambda: run_named(address, "given up")["state_type"] != "CANCELLING")
    assert run_named(address, "given up")["state_type"] == "CANCELLED"


def test_a_browser_lists_runs_and_compares_two_with_charts(mlflow, address, tab):
    tab.goto(f"{mlflow}/#/experiments/1/runs")
    first = tab.get_by_role("link", name="first", exact=True)
    first.wait_for()
    identity = first.get_attribute("href").rsplit("/", 1)[1]
    other = tab.get_by_role("link", name="seed=1", exact=True).get_attribute("href").rsplit("/", 1)[1]
    shown(tab, "mlflow-runs")
    tab.goto(f'{mlflow}/#/compare-runs?runs=["{identity}","{other}"]&experiments=["1"]')
    tab.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    tab.get_by_text("Parallel Coordinates Plot").wait_for()
    tab.locator(".js-plotly-plot svg").first.wait_for()
    assert tab.get_by_role("link", name=identity).is_visible()
    shown(tab, "mlflow-compare")
    tab.goto(f"{mlflow}/#/experiments/1/runs?compareRunsMode=CHART")
    tab.locator(".js-plotly-plot svg").first.wait_for()
    shown(tab, "mlflow-charts")


def test_a_browser_shows_card_and_aliases_of_a_version(mlflow, project, tab):
    champion = [entry for entry in map(json.loads, history(project)) if entry["action"] == "promoted"][-1]["version"]
    tab.goto(f"{mlflow}/#/models/fadenet-phantom/versions/{champion}")
    tab.get_by_text("Intended use").wait_for()
    assert tab.get_by_text("Not a medical device").first.is_visible()
    assert tab.get_by_text("champion").first.is_visible()
    shown(tab, "mlflow-version")


def history(project: Project) -> list[str]:
    return project.run("fadeformer", "registry", "history", "--json").splitlines()[:-1]


def test_drift_is_told_by_the_command_and_by_the_state_of_a_run(project, experiment, address):
    project.run("dvc", "exp", "apply", experiment)  # as the run's page says
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
