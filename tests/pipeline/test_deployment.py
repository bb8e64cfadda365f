"""Deployments: a Prefect server and a worker run the pipeline in workspaces and in the user's folder."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image
from ruamel.yaml import YAML

from fadeformer.io import jsonl
from tests.conftest import Project
from tests.pipeline.cluster import TIMEOUT, responds, wait_until
from tests.postgresql import free_port

pytestmark = pytest.mark.pipeline
CELL, TRIAL = "seed=1", "seeds-000"  # names of runs: the only run of a grid and of a sweep
WATCH = ("--watch", "--watch-interval", "1")  # seconds; default: 5


@pytest.fixture(scope="module")
def address() -> str:
    return f"http://127.0.0.1:{free_port()}/api"


@pytest.fixture(scope="module")
def started(project: Project, address: str) -> Iterator[Callable[..., Path]]:
    """Starts a program in the background and returns its log; programs stop at the end of the module."""
    processes = []

    def start(*command: str) -> Path:
        log = project.folder.parent / f"{command[0]}-{command[1]}.log"
        environment = {
            **project.environment, "PREFECT_API_URL": address, "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves eight processes that are not needed here
        }  # fmt: skip
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=project.folder, env=environment, stdout=file, stderr=file)
        processes.append(process)
        return log

    yield start
    for process in reversed(processes):  # the worker first, so that it can report to the server
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # Prefect's worker sometimes hangs if it is stopped just after a run
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def grid(project: Project, address: str, started) -> str:
    """Output of a grid of one run, named `CELL`, on a new server and worker."""
    port = address.removesuffix("/api").rsplit(":", 1)[1]
    log = started("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
    wait_until(lambda: responds(f"{address}/health"), describe=log.read_text)
    project.run("python", "-m", "pipelines.orchestration.deploy", PREFECT_API_URL=address)
    project.run(
        "python", "-m", "pipelines.orchestration.deploy", "--concurrency", "2", PREFECT_API_URL=address
    )  # updates the deployments
    started("prefect", "worker", "start", "--pool", "local")
    options = ("--param", 'vary={"seed": [1]}', "--param", 'fixed={"train.epochs": 1}', "--flow-run-name", "grid")
    return project.run("prefect", "deployment", "run", "grid/benchmark", *options, *WATCH, PREFECT_API_URL=address)


@pytest.fixture(scope="module")
def trial(project: Project, address: str, grid) -> str:
    """Output of a sweep of one trial."""
    space = project.folder / "seeds.yaml"
    space.write_text("trials: 1\nfixed: {train.epochs: 1}\nspace: {seed: [5, 6]}\n")
    output = project.run("fadeformer", "sweep", space.name, PREFECT_API_URL=address)
    space.unlink()
    return output


@pytest.fixture(scope="module")
def mlflow(trial, started) -> str:
    """URL of MLflow's UI for the project's store, as started by `make ui`."""
    port = str(free_port())
    store = ("--backend-store-uri", "sqlite:///mlruns/mlflow.db?timeout=60")
    artifacts = ("--artifacts-destination", "mlruns/artifacts")
    started("mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1", *store, *artifacts)
    wait_until(lambda: responds(f"http://127.0.0.1:{port}/health"))
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """Browser tab with timeouts for a busy machine."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * TIMEOUT)
    yield page
    page.close()


def stage_processes(project: Project) -> list[list[str]]:
    """Commands of running processes of DVC, its shells and stages in the project."""
    commands = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # an exited process or zombie
            command = process.cmdline()
            if process.cwd() == str(project.folder) and {"dvc", "pipelines"} & set(" ".join(command).split()):
                commands.append(command)
    return commands


def post(url: str, **body: object) -> Any:
    request = Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def query(address: str, kind: str, **filters: object) -> list[dict]:
    """Objects of a kind from the Prefect server."""
    return post(f"{address}/{kind}/filter", **filters)


def run_named(address: str, name: str) -> dict:
    """The only run with a name or, if there is none, with that prefix."""
    matches = [run for run in query(address, "flow_runs") if run["name"] == name or run["name"].startswith(f"{name}-")]
    (run,) = [run for run in matches if run["name"] == name] or matches
    return run


def artifacts(address: str, name: str) -> dict[str, str]:
    """Artifacts of a run, by key."""
    run = run_named(address, name)["id"]
    items = query(address, "artifacts", artifacts={"flow_run_id": {"any_": [run]}})
    return {artifact["key"]: artifact["data"] for artifact in items}


def experiment_ref(project: Project, run: str) -> tuple[str, str]:
    """Name and commit of the DVC experiment of a run, from git, which is faster than `dvc exp list`."""
    output = project.run("git", "for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", "refs/exps/*/*/*")
    ((name, commit),) = [line.split() for line in output.splitlines() if line.startswith(f"{run}-")]
    return name, commit


def experiment(project: Project, run: str) -> str:
    return experiment_ref(project, run)[0]


def commit_of(project: Project, run: str) -> str:
    return experiment_ref(project, run)[1]


def model_of(project: Project, run: str) -> list[dict]:
    """Model files and their checksums in the dvc.lock of a run's experiment."""
    lock = YAML(typ="safe").load(project.run("git", "show", f"{commit_of(project, run)}:dvc.lock"))
    return lock["stages"]["train"]["outs"]


def history(project: Project) -> list[dict]:
    """Decisions in the ledger, as in `fadeformer registry history`."""
    records = jsonl.read_records(project.folder / "mlruns" / "ledger.jsonl", "")
    return sorted((record for record in records if record["kind"] == "decision"), key=lambda record: record["number"])


def test_grid_publishes_a_table(grid, address):
    assert "Completed" in grid
    (row,) = json.loads(artifacts(address, "grid")["grid"])
    assert (row["seed"], row["state"]) == (1, "Completed")
    assert "(" in row["test AUC"]
    assert row["decision"] == "fadenet-phantom version 1: promoted"


def test_run_is_an_experiment_outside_the_users_folder(project, grid):
    diff = project.run("git", "diff", "--unified=0", f"main..{commit_of(project, CELL)}", "--", "params.yaml")
    lines = [line.split("#")[0].split() for line in diff.splitlines() if line.startswith(("+ ", "- ", "+s", "-s"))]
    assert lines == [["-seed:", "42"], ["+seed:", "1"], ["-", "epochs:", "6"], ["+", "epochs:", "1"]]
    assert project.run("git", "status", "--short") == ""
    assert not (project.folder / "models").exists()
    assert [entry["action"] for entry in history(project)] == ["promoted"]


def test_run_publishes_metrics_decision_and_experiment(project, grid, address):
    published = artifacts(address, CELL)
    assert set(published) == {"metrics", "verdict", "experiment"}  # no link to MLflow, which has no server here
    assert "auc" in [row["metric"] for row in json.loads(published["metrics"])]
    assert published["verdict"].startswith("# fadenet-phantom version 1: promoted")
    assert experiment(project, CELL) in published["experiment"]


def test_server_has_all_flows_and_tasks(grid, address):
    flows = {flow["id"]: flow["name"] for flow in query(address, "flows")}
    runs = query(address, "flow_runs")
    assert sorted(flows[run["flow_id"]] for run in runs) == ["evaluate", "grid", "pipeline", "train"]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    tasks = {task["name"].rsplit("-", 1)[0] for task in query(address, "task_runs")}
    assert tasks == {
        "pull results", "push results",
        "download", "validate", "preprocess", "train", "evaluate", "promote", "fit the network", "write the model",
        "predict", "compute metrics", "explain", "draw figures", "write the report",
        "log the evaluation to MLflow",
    }  # fmt: skip


def test_form_has_values_and_comments_of_params_yaml(grid, address):
    (train,) = [item for item in query(address, "deployments") if item["name"] == "train"]
    form = train["parameter_openapi_schema"]["definitions"]["TrainOverrides"]["properties"]
    assert form["batch_size"]["default"] == 32
    assert form["batch_size"]["description"] == "global batch size: images per step over all devices"
    assert "minimum" in json.dumps(form["epochs"])  # Prefect rejects invalid values at submission


def test_sweep_runs_trials_on_the_server(project, trial, address):
    assert run_named(address, TRIAL)["state_type"] == "COMPLETED"
    assert set(artifacts(address, TRIAL)) == {"experiment"}
    assert f"\nprefect deployment run evaluation/evaluate --param experiment={experiment(project, TRIAL)}\n" in trial


def test_best_trial_is_evaluated_without_training(project, trial, address):
    trained = len(query(address, "flow_runs", flows={"name": {"any_": ["train"]}}))
    options = ("--param", f"experiment={experiment(project, TRIAL)}", *WATCH)
    command = ("deployment", "run", "evaluation/evaluate", *options)
    overrides = ("--param", 'evaluate={"confidence": 0.9}', "--flow-run-name", "narrow")
    project.run("prefect", *command, *overrides, PREFECT_API_URL=address)
    assert {"metrics", "verdict", "experiment"} <= set(artifacts(address, "narrow"))
    assert model_of(project, "narrow") == model_of(project, TRIAL)
    commit, path = commit_of(project, "narrow"), project.folder.parent / "narrow.json"
    project.run("dvc", "get", ".", "reports/intervals.json", "--rev", commit, "--out", str(path))
    assert json.loads(path.read_text())["confidence"] == 0.9
    assert len(query(address, "flow_runs", flows={"name": {"any_": ["train"]}})) == trained


def test_canceled_run_stops_its_stage(project, trial, address):
    endless = json.dumps({"epochs": 10**6, "early_stopping_patience": 10**6})
    options = ("--param", f"train={endless}", "--flow-run-name", "endless")
    previous = {run["id"] for run in query(address, "flow_runs")}
    project.run("prefect", "deployment", "run", "pipeline/local", *options, PREFECT_API_URL=address)

    def states() -> dict[str, str]:
        flows = {flow["id"]: flow["name"] for flow in query(address, "flows")}
        new = [run for run in query(address, "flow_runs") if run["id"] not in previous]
        return {flows[run["flow_id"]]: run["state_type"] for run in new}

    wait_until(lambda: states().get("train") == "RUNNING")
    assert len(stage_processes(project)) >= 2  # dvc and the stage; a shell can replace itself with the stage
    run = run_named(address, "endless")["id"]
    project.run("prefect", "--no-prompt", "flow-run", "cancel", run, PREFECT_API_URL=address)
    wait_until(lambda: not stage_processes(project))
    wait_until(lambda: states()["pipeline"] == "CANCELLED")
    assert states()["train"] in ("CRASHED", "FAILED")  # the stage reported the signal
    assert project.run("git", "status", "--short", "params.yaml") == ""


def screenshot(tab: Any, name: str) -> None:
    """Save a screenshot for README.md if FADEFORMER_SCREENSHOTS is set to a folder."""
    if folder := os.environ.get("FADEFORMER_SCREENSHOTS"):
        tab.wait_for_timeout(15000)  # Prefect's graph is slow
        tab.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_browser_shows_form_and_results_of_run(grid, address, tab):
    ui = address.removesuffix("/api")
    (train,) = [item for item in query(address, "deployments") if item["name"] == "train"]
    tab.goto(f"{ui}/deployments/deployment/{train['id']}/run")
    tab.get_by_text("image side, pixels: 28 | 64 | 128 | 224 for MedMNIST, 16 to 1024 for phantom").wait_for()
    tab.get_by_text("global batch size: images per step over all devices").scroll_into_view_if_needed()
    values = tab.evaluate("[...document.querySelectorAll('input')].map(input => input.value)")
    assert {"42", "16", "32"} <= set(values)  # seed, dataset.size and train.batch_size
    tab.goto(f"{ui}/runs/flow-run/{run_named(address, CELL)['id']}")
    tab.get_by_text("Completed").first.wait_for()
    tab.get_by_text("Task Runs", exact=True).click()
    tab.get_by_text("promote", exact=True).first.wait_for()
    screenshot(tab, "prefect-run")
    tab.get_by_text("Artifacts", exact=True).click()
    tab.get_by_text("Metrics on test with confidence intervals, and on val").wait_for()
    tab.get_by_text("verdict", exact=True).click()
    tab.get_by_role("cell", name="data validation passed").wait_for()
    assert tab.get_by_text("fadenet-phantom version 1: promoted").is_visible()
    screenshot(tab, "prefect-verdict")


def test_browser_shows_model_version_and_run_comparison(mlflow, project, tab):
    champion = [entry for entry in history(project) if entry["action"] == "promoted"][-1]["version"]
    tab.goto(f"{mlflow}/#/models/fadenet-phantom/versions/{champion}")
    tab.get_by_text("Intended use").wait_for()
    assert tab.get_by_text("Not a medical device").first.is_visible()
    assert tab.get_by_text("champion").first.is_visible()
    screenshot(tab, "mlflow-version")
    runs = post(f"{mlflow}/api/2.0/mlflow/runs/search", experiment_ids=["1"], filter="metrics.val_auc >= 0")["runs"]
    first, second = [run["info"]["run_id"] for run in runs][:2]
    tab.goto(f'{mlflow}/#/compare-runs?runs=["{first}","{second}"]&experiments=["1"]')
    tab.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    tab.locator(".js-plotly-plot svg").first.wait_for()
    screenshot(tab, "mlflow-compare")


def test_run_with_drift_fails(project, grid, address):
    project.run("dvc", "exp", "apply", experiment(project, CELL))  # as in the run's artifact
    scans = project.folder / "data" / "own" / "scans"
    scans.mkdir(parents=True)
    pixels = np.load(project.folder / "data/processed/test.npy")
    for number, image in enumerate(pixels):
        Image.fromarray(255 - image).save(scans / f"{number}.png")
    command = ("prefect", "deployment", "run", "drift/local", "--param", "independent=true", *WATCH)
    output = project.run(*command, check=False, PREFECT_API_URL=address)
    assert project.code != 0
    assert "Failed" in output
    last = max(query(address, "flow_runs"), key=lambda run: run["created"])
    assert "image brightness" in last["state"]["message"]
    assert (project.folder / "reports/drift/index.html").is_file()
