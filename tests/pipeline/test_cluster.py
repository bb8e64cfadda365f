"""A deployment with real servers and parallel runs, during the loss of a machine and an outage of the storage."""

import csv
import itertools
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from ruamel.yaml import YAML

from fadeformer.io import jsonl
from tests.pipeline.cluster import ARTIFACTS, RESULTS, Cluster, basic_auth, status_of, wait_until
from tests.postgresql import PROGRAMS

pytestmark = [pytest.mark.pipeline, pytest.mark.timeout(1800)]
LONG, OUTAGE, RUN_TIMEOUT = "long", 60, 1200  # name of a run; seconds
RUNS = {  # parameters of each run; the second is not promoted
    LONG: {"seed": 1, "train": {"epochs": 12, "early_stopping_patience": 12}},
    "strict": {"seed": 3, "train": {"epochs": 1, "learning_rate": 0.003}, "promote": {"min_auc": 1.0}},
}
MODEL = "fadenet-phantom"
WORKERS = ("worker-1", "worker-2", "worker-3")  # the third recontents the killed one


@pytest.fixture(scope="module")
def killed_worker(cluster: Cluster) -> str:
    """Run two runs; kill one worker during training, then stop database and object store for a while.

    Returns:
        Name of the killed worker.
    """

    def submit(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["prefect", "deployment", "run", "pipeline/train", "--flow-run-name", name, *options(RUNS[name])],
            cwd=cluster.project.folder, env={**cluster.project.environment, **cluster.environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    for names in ([LONG], [name for name in RUNS if name != LONG]):  # the long run starts first
        for process in [submit(name) for name in names]:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output

    def describe() -> str:
        return f"{run_states(cluster)}\n{cluster.describe()}"

    def wait(condition: Callable[[], Any]) -> Any:
        return wait_until(condition, RUN_TIMEOUT, describe, interval=2)

    killed = wait(lambda: next((name for name in WORKERS[:2] if "epoch   3/12" in cluster.log(name)), None))
    cluster.kill_worker(killed)
    cluster.stop_objects()
    cluster.postgresql.stop()
    time.sleep(OUTAGE)
    cluster.postgresql.start()
    cluster.start_objects()
    cluster.start_worker(WORKERS[2], "training")  # a replacement
    wait(lambda: are_finished(cluster))
    return killed


def options(values: dict) -> list[str]:
    """Command-line options for the parameters of a run."""
    return [option for key, value in values.items() for option in ("--param", f"{key}={json.dumps(value)}")]


def run_states(cluster: Cluster) -> dict[str, str]:
    """State of each run, by name."""
    return {run["name"]: run["state_name"] for run in cluster.query_prefect("flow_runs") if run["name"] in RUNS}


def are_finished(cluster: Cluster) -> bool:
    """Return True if all runs are finished; False while Prefect's database is down."""
    try:
        return set(run_states(cluster).values()) <= {"Completed", "Failed", "Cancelled"}
    except HTTPError:
        return False


def mlflow_runs(cluster: Cluster) -> dict[str, dict]:
    """MLflow run of each run, by name, from the link in its artifacts."""
    artifacts = cluster.query_prefect("artifacts")
    by_name = {}
    for run in cluster.query_prefect("flow_runs"):
        links = [item for item in artifacts if item["flow_run_id"] == run["id"] and item["key"] == "mlflow-run"]
        for link in links[-1:]:
            (run_id,) = re.search(r"/runs/(\w+)", link["data"]).groups()
            by_name[run["name"]] = cluster.query_mlflow(f"runs/get?run_id={run_id}")["run"]
    return by_name


def model_versions(cluster: Cluster) -> list[dict]:
    """All versions of the registered model."""
    query = quote(f"name='{MODEL}'")
    return cluster.query_mlflow(f"model-versions/search?filter={query}&max_results=100")["model_versions"]


def test_all_runs_complete(cluster, killed_worker):
    assert run_states(cluster) == dict.fromkeys(RUNS, "Completed")


def test_mlflow_runs_have_params_and_all_epochs(cluster, killed_worker):
    runs = mlflow_runs(cluster)
    assert set(runs) == set(RUNS)
    experiment = {"experiment_ids": [next(iter(runs.values()))["info"]["experiment_id"]], "max_results": 100}
    stored = cluster.query_mlflow("runs/search", experiment)["runs"]
    assert sorted(run["info"]["run_id"] for run in stored) == sorted(run["info"]["run_id"] for run in runs.values())
    for name, run in runs.items():
        params = {param["key"]: param["value"] for param in run["data"]["params"]}
        assert params["seed"] == str(RUNS[name]["seed"])
        for key, value in RUNS[name]["train"].items():
            assert float(params[f"train.{key}"]) == value
        assert run["info"]["status"] == "FINISHED"
        epochs = range(1, RUNS[name]["train"]["epochs"] + 1)
        for metric in ("train_loss", "val_loss", "val_auc"):
            query = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={metric}"
            points = cluster.query_mlflow(query)["metrics"]
            assert sorted(int(point["step"]) for point in points) == list(epochs), (name, metric)
        assert {"test.overall.auc", "seconds.fit"} <= {metric["key"] for metric in run["data"]["metrics"]}


def test_artifacts_are_in_the_object_store(cluster, killed_worker):
    stored = cluster.bucket(ARTIFACTS)
    for run in mlflow_runs(cluster).values():
        prefix = f"files/{run['info']['experiment_id']}/{run['info']['run_id']}/artifacts/"
        for file in ("predictions.parquet", "index.html", "model_card.md", "figures/roc_curves.png", "promotion.json"):
            assert stored[prefix + file] > 0
    versions = model_versions(cluster)
    for version in versions:
        package = f"/models/{version['source'].removeprefix('models:/')}/artifacts/"
        assert {"MLmodel", "requirements.txt"} <= {name.split(package)[1] for name in stored if package in name}


def test_ledger_aliases_and_tags_agree(cluster, killed_worker):
    records = jsonl.read_records(cluster.home / "mlruns" / "ledger.jsonl", "")
    entries = sorted(
        (record for record in records if record["kind"] == "decision"), key=lambda record: record["number"]
    )
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    for before, after in itertools.pairwise(entries):
        assert after["from"] == before["to"]
    model = cluster.query_mlflow(f"registered-models/get?name={MODEL}")["registered_model"]
    assert {alias["alias"]: alias["version"] for alias in model["aliases"]} == entries[-1]["aliases"]
    versions = model_versions(cluster)
    assert {version["run_id"] for version in versions} == {
        run["info"]["run_id"] for run in mlflow_runs(cluster).values()
    }
    assert {entry["version"] for entry in entries} == {version["version"] for version in versions}
    assert len(versions) == len(RUNS)
    tagged = {}
    for version in versions:
        tagged |= {tag["key"]: json.loads(tag["value"]) for tag in version["tags"] if tag["key"].startswith("ledger.")}
    assert tagged == {f"ledger.{entry['number']:05d}": entry for entry in entries}
    strict_run = mlflow_runs(cluster)["strict"]["info"]["run_id"]
    assert [entry["action"] for entry in entries if entry["run_id"] == strict_run] == ["refused"]


def test_experiments_have_results_in_the_dvc_remote(cluster, killed_worker):
    git = ("git", "--git-dir", str(cluster.repository))
    refs = cluster.project.run(*git, "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    commits = {name.split("/")[-1].rsplit("-", 1)[0]: commit for name, commit in map(str.split, refs)}
    assert set(commits) == set(RUNS)
    stored = cluster.bucket(RESULTS)
    for name, commit in commits.items():
        values = YAML(typ="safe").load(cluster.project.run(*git, "show", f"{commit}:params.yaml"))
        assert values["seed"] == RUNS[name]["seed"]
        assert values["train"]["epochs"] == RUNS[name]["train"]["epochs"]
        lock = YAML(typ="safe").load(cluster.project.run(*git, "show", f"{commit}:dvc.lock"))
        checksums = {out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
        missing = [md5 for md5 in checksums if f"dvc/files/md5/{md5[:2]}/{md5[2:]}" not in stored]
        assert len(checksums) > 10
        assert not missing


def test_user_can_pull_an_experiment(cluster, killed_worker):
    names = cluster.run("dvc", "exp", "list", "origin", "--name-only").split()
    (name,) = [name for name in names if name.startswith(LONG)]
    environment = {**cluster.environment, **cluster.keys[RESULTS]}
    cluster.project.run("dvc", "exp", "pull", "origin", name, **environment)  # the command in the run's artifacts
    cluster.project.run("dvc", "exp", "apply", name)
    with (cluster.project.folder / "models" / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(1, 13)]


def test_run_resumes_on_another_machine(cluster, killed_worker):
    (run,) = [run for run in cluster.query_prefect("flow_runs") if run["name"] == LONG]
    assert run["run_count"] >= 2
    (other,) = [name for name in WORKERS if "epoch  12/12" in cluster.log(name)]
    assert other != killed_worker
    log = cluster.log(other)
    assert "resuming the unfinished training" in log
    assert "epoch   1/12" not in log
    assert "epoch   2/12" not in log


def test_no_secrets_are_stored(cluster, killed_worker, tmp_path):
    secrets = cluster.all_secrets()
    databases = b""
    for name in ("mlflow", "prefect"):
        command = [str(PROGRAMS[-1] / "pg_dump"), "--username", "postgres", name]
        databases += subprocess.run(command, env=cluster.postgresql.environment, check=True, capture_output=True).stdout
    for control in (b"train.learning_rate", b"early_stopping_patience", b"epoch  12/12", b"fadenet-phantom version"):
        assert control in databases  # shows that the search works: parameters, logs and artifacts
    contents = {"databases": databases}
    git = ["git", "--git-dir", str(cluster.repository), "cat-file", "--batch", "--batch-all-objects"]
    contents["git"] = subprocess.run(git, check=True, capture_output=True).stdout
    assert b"s3://results/dvc" in contents["git"]
    for path in cluster.logs.iterdir():
        contents[path.name] = path.read_bytes()
    contents["postgresql.log"] = cluster.postgresql.log.read_bytes()
    for folder in (cluster.home, cluster.project.folder, cluster.folder):
        contents |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Prefect stores the environment of a run in a file during the run; the killed worker could not remove it.
    for path in (cluster.folder / killed_worker / "tmpdir").glob("prefect-workspace-attempt-*/workspace.json"):
        assert path.stat().st_mode & 0o077 == 0  # only readable for its owner
        assert path.parent.stat().st_mode & 0o077 == 0
        del contents[str(path)]
    for bucket in (ARTIFACTS, RESULTS):
        client = cluster.s3(bucket)
        for name in cluster.bucket(bucket):
            contents[f"{bucket}/{name}"] = client.get_object(Bucket=bucket, Key=name)["Body"].read()
    assert {"worker-1.log", "prefect.log", "mlflow.log", "objects.log"} <= contents.keys()
    leaks = [
        (use, file)
        for use, secret in secrets.items()
        for file, content in contents.items()
        if secret.encode() in content
    ]
    assert not leaks


def test_runs_record_no_paths_or_host_names(cluster, killed_worker):
    texts = {
        name: json.dumps([run["data"]["tags"], run["data"]["params"]]) for name, run in mlflow_runs(cluster).items()
    }
    texts["parameters"] = json.dumps([run["parameters"] for run in cluster.query_prefect("flow_runs")])
    assert "early_stopping_patience" in texts["parameters"]
    texts |= {name: cluster.log(name) for name in WORKERS}
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for name, text in texts.items():
        assert str(cluster.folder.parent) not in text, name
        assert not host.search(text), name


def test_servers_and_databases_require_passwords(cluster, killed_worker):
    deployments, runs = f"{cluster.prefect}/deployments/filter", f"{cluster.mlflow}/api/2.0/mlflow/experiments/search"
    invalid, valid = basic_auth("admin", "x" * 32), basic_auth("trainer", cluster.secrets["trainer"])
    assert [status_of(deployments, {}), status_of(deployments, {}, Authorization=invalid)] == [401, 401]
    experiments = {"max_results": 1}
    assert [status_of(runs, experiments), status_of(runs, experiments, Authorization=invalid)] == [401, 401]
    assert status_of(runs, experiments, Authorization=valid) == 200
    psql = [str(PROGRAMS[-1] / "psql"), "--no-password", "--username", "mlflow", "--command", "select 1"]

    def connect(database: str, password: str) -> int:
        environment = {**cluster.postgresql.environment, "PGPASSWORD": cluster.secrets.get(password, "")}
        return subprocess.run([*psql, database], env=environment, capture_output=True, check=False).returncode

    assert connect("mlflow", "mlflow database") == 0
    assert 0 not in (connect("mlflow", "none"), connect("mlflow", "prefect database"))
    assert connect("prefect", "mlflow database") != 0
