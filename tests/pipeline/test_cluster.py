"""A deployment with real servers: runs side by side; a machine is lost, then database and object store are away."""

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
LONG, OUTAGE, PATIENCE = "long", 60, 1200  # a run's name; seconds, and as many until a run must have come further
WANTED = {  # parameters of each run; the promotion of the second is refused
    LONG: {"seed": 1, "train": {"epochs": 12, "early_stopping_patience": 12}},
    "strict": {"seed": 3, "train": {"epochs": 1, "learning_rate": 0.003}, "promote": {"min_auc": 1.0}},
}
MODEL = "fadenet-phantom"
WORKERS = ("worker-1", "worker-2", "worker-3")  # two to begin with; the last takes the place of the one that is killed


@pytest.fixture(scope="module")
def killed(cluster: Cluster) -> str:
    """Two runs: the machine of one is lost while it trains, then database and object store are away together.

    Returns:
        The worker that was killed.
    """

    def submit(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["prefect", "deployment", "run", "pipeline/train", "--flow-run-name", name, *options(WANTED[name])],
            cwd=cluster.project.folder, env={**cluster.project.environment, **cluster.environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    for names in ([LONG], [name for name in WANTED if name != LONG]):  # the long one is the first that runs
        for process in [submit(name) for name in names]:
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed

    def tell() -> str:
        return f"{states(cluster)}\n{cluster.tell()}"

    def wait(true: Callable[[], Any]) -> Any:
        return wait_until(true, PATIENCE, tell, pause=2)

    lost = wait(lambda: next((name for name in WORKERS[:2] if "epoch   3/12" in cluster.log(name)), None))
    cluster.kill_worker(lost)
    cluster.stop_objects()
    cluster.postgresql.stop()
    time.sleep(OUTAGE)
    cluster.postgresql.start()
    cluster.start_objects()
    cluster.start_worker(WORKERS[2], "training")  # another machine takes its place
    wait(lambda: ended(cluster))
    return lost


def options(values: dict) -> list[str]:
    """A run's parameters as the command line takes them."""
    return [word for key, value in values.items() for word in ("--param", f"{key}={json.dumps(value)}")]


def states(cluster: Cluster) -> dict[str, str]:
    """The state of each run, by name."""
    return {run["name"]: run["state_name"] for run in cluster.ask("flow_runs") if run["name"] in WANTED}


def ended(cluster: Cluster) -> bool:
    """Whether all have; one that has crashed is scheduled again. Prefect's server may have no database just yet."""
    try:
        return set(states(cluster).values()) <= {"Completed", "Failed", "Cancelled"}
    except HTTPError:
        return False


def trained(cluster: Cluster) -> dict[str, dict]:
    """The MLflow run of each run, by name, found by the link on its page."""
    artifacts = cluster.ask("artifacts")
    found = {}
    for run in cluster.ask("flow_runs"):
        links = [one for one in artifacts if one["flow_run_id"] == run["id"] and one["key"] == "mlflow-run"]
        for link in links[-1:]:
            (run_id,) = re.search(r"/runs/(\w+)", link["data"]).groups()
            found[run["name"]] = cluster.ask_mlflow(f"runs/get?run_id={run_id}")["run"]
    return found


def versions_of(cluster: Cluster) -> list[dict]:
    """All versions of the registered model."""
    named = quote(f"name='{MODEL}'")
    return cluster.ask_mlflow(f"model-versions/search?filter={named}&max_results=100")["model_versions"]


def test_all_end_completed(cluster, killed):
    assert states(cluster) == dict.fromkeys(WANTED, "Completed")


def test_each_has_its_mlflow_run_with_its_parameters_and_every_epoch_once(cluster, killed):
    runs = trained(cluster)
    assert set(runs) == set(WANTED)
    experiment = {"experiment_ids": [next(iter(runs.values()))["info"]["experiment_id"]], "max_results": 100}
    there = cluster.ask_mlflow("runs/search", experiment)["runs"]
    assert sorted(run["info"]["run_id"] for run in there) == sorted(run["info"]["run_id"] for run in runs.values())
    for name, run in runs.items():
        params = {one["key"]: one["value"] for one in run["data"]["params"]}
        assert params["seed"] == str(WANTED[name]["seed"])
        for key, value in WANTED[name]["train"].items():
            assert float(params[f"train.{key}"]) == value
        assert run["info"]["status"] == "FINISHED"
        epochs = range(1, WANTED[name]["train"]["epochs"] + 1)
        for metric in ("train_loss", "val_loss", "val_auc"):
            query = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={metric}"
            points = cluster.ask_mlflow(query)["metrics"]
            assert sorted(int(point["step"]) for point in points) == list(epochs), (name, metric)
        assert {"test.overall.auc", "seconds.fit"} <= {one["key"] for one in run["data"]["metrics"]}


def test_files_of_each_lie_in_the_object_store(cluster, killed):
    stored = cluster.bucket(ARTIFACTS)
    for run in trained(cluster).values():
        of_run = f"files/{run['info']['experiment_id']}/{run['info']['run_id']}/artifacts/"
        for file in ("predictions.parquet", "index.html", "model_card.md", "figures/roc_curves.png", "promotion.json"):
            assert stored[of_run + file] > 0
    versions = versions_of(cluster)
    for version in versions:
        package = f"/models/{version['source'].removeprefix('models:/')}/artifacts/"
        assert {"MLmodel", "requirements.txt"} <= {name.split(package)[1] for name in stored if package in name}


def test_ledger_aliases_and_tags_agree(cluster, killed):
    records = jsonl.read_records(cluster.home / "mlruns" / "ledger.jsonl", "")
    entries = sorted((one for one in records if one["kind"] == "decision"), key=lambda one: one["number"])
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    for before, after in itertools.pairwise(entries):
        assert after["from"] == before["to"]
    model = cluster.ask_mlflow(f"registered-models/get?name={MODEL}")["registered_model"]
    assert {one["alias"]: one["version"] for one in model["aliases"]} == entries[-1]["aliases"]
    versions = versions_of(cluster)
    assert {one["run_id"] for one in versions} == {run["info"]["run_id"] for run in trained(cluster).values()}
    assert {entry["version"] for entry in entries} == {one["version"] for one in versions}
    assert len(versions) == len(WANTED)
    tagged = {}
    for version in versions:
        tagged |= {tag["key"]: json.loads(tag["value"]) for tag in version["tags"] if tag["key"].startswith("ledger.")}
    assert tagged == {f"ledger.{entry['number']:05d}": entry for entry in entries}
    of_strict = trained(cluster)["strict"]["info"]["run_id"]
    assert [entry["action"] for entry in entries if entry["run_id"] == of_strict] == ["refused"]


def test_each_is_an_experiment_whose_results_lie_in_dvcs_remote(cluster, killed):
    git = ("git", "--git-dir", str(cluster.repository))
    refs = cluster.project.run(*git, "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps").splitlines()
    kept = {name.split("/")[-1].rsplit("-", 1)[0]: commit for name, commit in map(str.split, refs)}
    assert set(kept) == set(WANTED)
    stored = cluster.bucket(RESULTS)
    for name, commit in kept.items():
        values = YAML(typ="safe").load(cluster.project.run(*git, "show", f"{commit}:params.yaml"))
        assert values["seed"] == WANTED[name]["seed"]
        assert values["train"]["epochs"] == WANTED[name]["train"]["epochs"]
        lock = YAML(typ="safe").load(cluster.project.run(*git, "show", f"{commit}:dvc.lock"))
        sums = {out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
        missing = [md5 for md5 in sums if f"dvc/files/md5/{md5[:2]}/{md5[2:]}" not in stored]
        assert len(sums) > 10
        assert not missing


def test_a_person_gets_an_experiment_with_its_results(cluster, killed):
    (name,) = [
        one for one in cluster.run("dvc", "exp", "list", "origin", "--name-only").split() if one.startswith(LONG)
    ]
    environment = {**cluster.environment, **cluster.keys[RESULTS]}
    cluster.project.run("dvc", "exp", "pull", "origin", name, **environment)  # as the page of the run says
    cluster.project.run("dvc", "exp", "apply", name)
    with (cluster.project.folder / "models" / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(1, 13)]


def test_the_run_of_the_lost_machine_went_on_from_its_checkpoint_on_another(cluster, killed):
    (run,) = [run for run in cluster.ask("flow_runs") if run["name"] == LONG]
    assert run["run_count"] >= 2
    (other,) = [name for name in WORKERS if "epoch  12/12" in cluster.log(name)]
    assert other != killed
    printed = cluster.log(other)
    assert "resuming the unfinished training" in printed
    assert "epoch   1/12" not in printed
    assert "epoch   2/12" not in printed


def test_no_secret_stands_anywhere(cluster, killed, tmp_path):
    secrets = cluster.every_secret()
    databases = b""
    for name in ("mlflow", "prefect"):
        command = [str(PROGRAMS[-1] / "pg_dump"), "--username", "postgres", name]
        databases += subprocess.run(command, env=cluster.postgresql.environment, check=True, capture_output=True).stdout
    for known in (b"train.learning_rate", b"early_stopping_patience", b"epoch  12/12", b"fadenet-phantom version"):
        assert known in databases  # MLflow's parameters, Prefect's, the logs and artifacts of its runs
    places = {"the databases": databases}
    git = ["git", "--git-dir", str(cluster.repository), "cat-file", "--batch", "--batch-all-objects"]
    places["git"] = subprocess.run(git, check=True, capture_output=True).stdout
    assert b"s3://results/dvc" in places["git"]
    for path in cluster.logs.iterdir():
        places[path.name] = path.read_bytes()
    places["postgresql.log"] = cluster.postgresql.log.read_bytes()
    for folder in (cluster.home, cluster.project.folder, cluster.folder):
        places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Prefect keeps the environment of a run in a file while the run lasts; the killed worker could not remove it.
    for path in (cluster.folder / killed / "tmpdir").glob("prefect-workspace-attempt-*/workspace.json"):
        assert path.stat().st_mode & 0o077 == 0  # nobody else may read it
        assert path.parent.stat().st_mode & 0o077 == 0
        del places[str(path)]
    for bucket in (ARTIFACTS, RESULTS):
        client = cluster.s3(bucket)
        for name in cluster.bucket(bucket):
            places[f"{bucket}/{name}"] = client.get_object(Bucket=bucket, Key=name)["Body"].read()
    assert {"worker-1.log", "prefect.log", "mlflow.log", "objects.log"} <= places.keys()
    found = [
        (what, where) for what, secret in secrets.items() for where, text in places.items() if secret.encode() in text
    ]
    assert not found


def test_no_path_or_name_of_a_machine_stands_in_what_runs_tell(cluster, killed):
    told = {name: json.dumps([run["data"]["tags"], run["data"]["params"]]) for name, run in trained(cluster).items()}
    told["parameters"] = json.dumps([run["parameters"] for run in cluster.ask("flow_runs")])
    assert "early_stopping_patience" in told["parameters"]
    told |= {name: cluster.log(name) for name in WORKERS}
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for name, text in told.items():
        assert str(cluster.folder.parent) not in text, name
        assert not host.search(text), name


def test_servers_and_databases_need_a_password(cluster, killed):
    deployments, runs = f"{cluster.prefect}/deployments/filter", f"{cluster.mlflow}/api/2.0/mlflow/experiments/search"
    wrong, right = basic_auth("admin", "x" * 32), basic_auth("trainer", cluster.secrets["trainer"])
    assert [status_of(deployments, {}), status_of(deployments, {}, Authorization=wrong)] == [401, 401]
    experiments = {"max_results": 1}
    assert [status_of(runs, experiments), status_of(runs, experiments, Authorization=wrong)] == [401, 401]
    assert status_of(runs, experiments, Authorization=right) == 200
    psql = [str(PROGRAMS[-1] / "psql"), "--no-password", "--username", "mlflow", "--command", "select 1"]

    def connect(database: str, password: str) -> int:
        environment = {**cluster.postgresql.environment, "PGPASSWORD": cluster.secrets.get(password, "")}
        return subprocess.run([*psql, database], env=environment, capture_output=True, check=False).returncode

    assert connect("mlflow", "mlflow database") == 0
    assert 0 not in (connect("mlflow", "none"), connect("mlflow", "prefect database"))
    assert connect("prefect", "mlflow database") != 0
