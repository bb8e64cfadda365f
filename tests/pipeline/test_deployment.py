"""Deployments: a Prefect server and a worker run the pipeline, in workspaces and in the user's folder."""

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
CELL, TRIAL = "seed=1", "seeds-000"  # names of runs: the only one of a grid, and the only trial of a sweep
WATCH = ("--watch", "--watch-interval", "1")  # seconds, else 5


@pytest.fixture(scope="module")
def address() -> str:
    return f"http://127.0.0.1:{free_port()}/api"


@pytest.fixture(scope="module")
def started(project: Project, address: str) -> Iterator[Callable[..., Path]]:
    """Starts a program of the project in the background and returns its log; all end with the module."""
    running = []

    def start(*command: str) -> Path:
        log = project.folder.parent / f"{command[0]}-{command[1]}.log"
        environment = {
            **project.environment, "PREFECT_API_URL": address, "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes, of which no page here asks anything
        }  # fmt: skip
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=project.folder, env=environment, stdout=file, stderr=file)
        running.append(process)
        return log

    yield start
    for process in reversed(running):  # the worker while it can still report to the server
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # Prefect's worker sometimes hangs if it is stopped just after a run
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def grid(project: Project, address: str, started) -> str:
    """What a grid of one run printed, on a server and a worker started for it; the run is named `CELL`."""
    port = address.removesuffix("/api").rsplit(":", 1)[1]
    log = started("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
    wait_until(lambda: responds(f"{address}/health"), tell=log.read_text)
    project.run("python", "-m", "pipelines.orchestration.deploy", PREFECT_API_URL=address)
    project.run(
        "python", "-m", "pipelines.orchestration.deploy", "--concurrency", "2", PREFECT_API_URL=address
    )  # changes what is there
    started("prefect", "worker", "start", "--pool", "local")
    options = ("--param", 'vary={"seed": [1]}', "--param", 'fixed={"train.epochs": 1}', "--flow-run-name", "grid")
    return project.run("prefect", "deployment", "run", "grid/benchmark", *options, *WATCH, PREFECT_API_URL=address)


@pytest.fixture(scope="module")
def trial(project: Project, address: str, grid) -> str:
    """What a sweep of one trial printed."""
    space = project.folder / "seeds.yaml"
    space.write_text("trials: 1\nfixed: {train.epochs: 1}\nspace: {seed: [5, 6]}\n")
    output = project.run("fadeformer", "sweep", space.name, PREFECT_API_URL=address)
    space.unlink()
    return output


@pytest.fixture(scope="module")
def mlflow(trial, started) -> str:
    """Address of MLflow's pages on the project's store, as `make ui` shows them."""
    port = str(free_port())
    store = ("--backend-store-uri", "sqlite:///mlruns/mlflow.db?timeout=60")
    artifacts = ("--artifacts-destination", "mlruns/artifacts")
    started("mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1", *store, *artifacts)
    wait_until(lambda: responds(f"http://127.0.0.1:{port}/health"))
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def tab(browser) -> Iterator[Any]:
    """A page of a browser whose waits are long enough for a busy machine."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(1000 * TIMEOUT)
    yield page
    page.close()


def stages(project: Project) -> list[list[str]]:
    """Commands of DVC, its shells and stages that run in the project."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # one that has just ended, or a zombie
            command = process.cmdline()
            if process.cwd() == str(project.folder) and {"dvc", "pipelines"} & set(" ".join(command).split()):
                found.append(command)
    return found


def post(url: str, **body: object) -> Any:
    request = Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def ask(address: str, kind: str, **filters: object) -> list[dict]:
    """What Prefect's server has of a kind."""
    return post(f"{address}/{kind}/filter", **filters)


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


def experiment_ref(project: Project, run: str) -> tuple[str, str]:
    """Name and commit of the DVC experiment of a run, from git, which answers sooner than `dvc exp list`."""
    listed = project.run("git", "for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", "refs/exps/*/*/*")
    (found,) = [line.split() for line in listed.splitlines() if line.startswith(f"{run}-")]
    name, commit = found
    return name, commit


def experiment(project: Project, run: str) -> str:
    return experiment_ref(project, run)[0]


def commit_of(project: Project, run: str) -> str:
    return experiment_ref(project, run)[1]


def model_of(project: Project, run: str) -> list[dict]:
    """What the dvc.lock of a run's experiment contains of the model: its files and their checksums."""
    lock = YAML(typ="safe").load(project.run("git", "show", f"{commit_of(project, run)}:dvc.lock"))
    return lock["stages"]["train"]["outs"]


def history(project: Project) -> list[dict]:
    """The decisions of the ledger, which `fadeformer registry history` tells (test_promotion.py)."""
    records = jsonl.read_records(project.folder / "mlruns" / "ledger.jsonl", "")
    return sorted((record for record in records if record["kind"] == "decision"), key=lambda record: record["number"])


def test_a_grid_shows_a_table_of_its_runs(grid, address):
    assert "Completed" in grid
    (row,) = json.loads(artifacts(address, "grid")["grid"])
    assert (row["seed"], row["state"]) == (1, "Completed")
    assert "(" in row["test AUC"]
    assert row["decision"] == "fadenet-phantom version 1: promoted"


def test_parameters_and_results_are_an_experiment_and_the_users_folder_is_unchanged(project, grid):
    changed = project.run("git", "diff", "--unified=0", f"main..{commit_of(project, CELL)}", "--", "params.yaml")
    found = [line.split("#")[0].split() for line in changed.splitlines() if line.startswith(("+ ", "- ", "+s", "-s"))]
    assert found == [["-seed:", "42"], ["+seed:", "1"], ["-", "epochs:", "6"], ["+", "epochs:", "1"]]
    assert project.run("git", "status", "--short") == ""
    assert not (project.folder / "models").exists()
    assert [entry["action"] for entry in history(project)] == ["promoted"]


def test_the_page_of_a_run_shows_numbers_verdict_and_experiment(project, grid, address):
    shown = artifacts(address, CELL)
    assert set(shown) == {"metrics", "verdict", "experiment"}  # MLflow has no server here, and so no page
    assert "auc" in [row["metric"] for row in json.loads(shown["metrics"])]
    assert shown["verdict"].startswith("# fadenet-phantom version 1: promoted")
    assert experiment(project, CELL) in shown["experiment"]


def test_the_server_has_every_flow_and_task_by_its_name(grid, address):
    flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
    runs = ask(address, "flow_runs")
    assert sorted(flows[run["flow_id"]] for run in runs) == ["evaluate", "grid", "pipeline", "train"]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}
    tasks = {task["name"].rsplit("-", 1)[0] for task in ask(address, "task_runs")}
    assert tasks == {
        "pull results", "push results",
        "download", "validate", "preprocess", "train", "evaluate", "promote", "fit the network", "write the model",
        "predict", "compute metrics", "explain", "draw figures", "write the report",
        "log the evaluation to MLflow",
    }  # fmt: skip


def test_the_form_has_the_values_bounds_and_comments_of_params_yaml(grid, address):
    (train,) = [one for one in ask(address, "deployments") if one["name"] == "train"]
    form = train["parameter_openapi_schema"]["definitions"]["TrainOverrides"]["properties"]
    assert form["batch_size"]["default"] == 32
    assert form["batch_size"]["description"] == "images of one step, over all devices"
    assert "minimum" in json.dumps(form["epochs"])  # what params.yaml refuses, Prefect refuses at submission


def test_a_sweep_runs_its_trials_on_the_server(project, trial, address):
    assert run_named(address, TRIAL)["state_type"] == "COMPLETED"
    assert set(artifacts(address, TRIAL)) == {"experiment"}
    assert f"\nprefect deployment run evaluation/evaluate --param experiment={experiment(project, TRIAL)}\n" in trial


def test_its_best_is_evaluated_and_judged_without_another_training(project, trial, address):
    trained = len(ask(address, "flow_runs", flows={"name": {"any_": ["train"]}}))
    command = (
        "deployment",
        "run",
        "evaluation/evaluate",
        "--param",
        f"experiment={experiment(project, TRIAL)}",
        *WATCH,
    )
    narrow = ("--param", 'evaluate={"confidence": 0.9}', "--flow-run-name", "narrow")
    project.run("prefect", *command, *narrow, PREFECT_API_URL=address)
    assert {"metrics", "verdict", "experiment"} <= set(artifacts(address, "narrow"))
    assert model_of(project, "narrow") == model_of(project, TRIAL)
    commit, place = commit_of(project, "narrow"), project.folder.parent / "narrow.json"
    project.run("dvc", "get", ".", "reports/intervals.json", "--rev", commit, "--out", str(place))
    assert json.loads(place.read_text())["confidence"] == 0.9
    assert len(ask(address, "flow_runs", flows={"name": {"any_": ["train"]}})) == trained


def test_a_run_that_is_cancelled_ends_its_stage_and_leaves_nothing_behind(project, trial, address):
    endless = json.dumps({"epochs": 10**6, "early_stopping_patience": 10**6})
    options = ("--param", f"train={endless}", "--flow-run-name", "endless")
    known = {run["id"] for run in ask(address, "flow_runs")}
    project.run("prefect", "deployment", "run", "pipeline/local", *options, PREFECT_API_URL=address)

    def states() -> dict[str, str]:
        flows = {flow["id"]: flow["name"] for flow in ask(address, "flows")}
        new = [run for run in ask(address, "flow_runs") if run["id"] not in known]
        return {flows[run["flow_id"]]: run["state_type"] for run in new}

    wait_until(lambda: states().get("train") == "RUNNING")
    assert len(stages(project)) >= 2  # dvc and the stage; a shell that only calls may have become the stage
    run = run_named(address, "endless")["id"]
    project.run("prefect", "--no-prompt", "flow-run", "cancel", run, PREFECT_API_URL=address)
    wait_until(lambda: not stages(project))
    wait_until(lambda: states()["pipeline"] == "CANCELLED")
    assert states()["train"] in ("CRASHED", "FAILED")  # the stage reported its end, which a signal caused
    assert project.run("git", "status", "--short", "params.yaml") == ""


def screenshot(tab: Any, name: str) -> None:
    """Saves what a page shows, for README.md, where FADEFORMER_SCREENSHOTS names a folder."""
    if folder := os.environ.get("FADEFORMER_SCREENSHOTS"):
        tab.wait_for_timeout(15000)  # Prefect's graph takes its time
        tab.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_a_browser_shows_form_stages_numbers_and_verdict_of_a_run(grid, address, tab):
    pages = address.removesuffix("/api")
    (train,) = [one for one in ask(address, "deployments") if one["name"] == "train"]
    tab.goto(f"{pages}/deployments/deployment/{train['id']}/run")
    tab.get_by_text("side of an image, pixels: 28 | 64 | 128 | 224 for MedMNIST, 16 to 1024 for phantom").wait_for()
    tab.get_by_text("images of one step, over all devices").scroll_into_view_if_needed()
    values = tab.evaluate("[...document.querySelectorAll('input')].map(input => input.value)")
    assert {"42", "16", "32"} <= set(values)  # seed, dataset.size and train.batch_size
    tab.goto(f"{pages}/runs/flow-run/{run_named(address, CELL)['id']}")
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


def test_a_browser_shows_card_and_alias_of_a_version_and_compares_two_runs(mlflow, project, tab):
    champion = [entry for entry in history(project) if entry["action"] == "promoted"][-1]["version"]
    tab.goto(f"{mlflow}/#/models/fadenet-phantom/versions/{champion}")
    tab.get_by_text("Intended use").wait_for()
    assert tab.get_by_text("Not a medical device").first.is_visible()
    assert tab.get_by_text("champion").first.is_visible()
    screenshot(tab, "mlflow-version")
    runs = post(f"{mlflow}/api/2.0/mlflow/runs/search", experiment_ids=["1"], filter="metrics.val_auc >= 0")["runs"]
    one, other = [run["info"]["run_id"] for run in runs][:2]
    tab.goto(f'{mlflow}/#/compare-runs?runs=["{one}","{other}"]&experiments=["1"]')
    tab.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    tab.locator(".js-plotly-plot svg").first.wait_for()
    screenshot(tab, "mlflow-compare")


def test_drift_fails_a_run(project, grid, address):
    project.run("dvc", "exp", "apply", experiment(project, CELL))  # as the run's page says
    scans = project.folder / "data" / "own" / "scans"
    scans.mkdir(parents=True)
    pixels = np.load(project.folder / "data/processed/test.npy")
    for number, image in enumerate(pixels):
        Image.fromarray(255 - image).save(scans / f"{number}.png")
    output = project.run("prefect", "deployment", "run", "drift/local", *WATCH, check=False, PREFECT_API_URL=address)
    assert project.code != 0
    assert "Failed" in output
    last = max(ask(address, "flow_runs"), key=lambda run: run["created"])
    assert "image brightness" in last["state"]["message"]
    assert (project.folder / "reports/drift/index.html").is_file()
