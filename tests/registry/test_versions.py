"""Versions, aliases and runs in a real MLflow store, with models that have no files."""

import os
import subprocess
import sys

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fadeformer.errors import UserError
from pipelines.registry import versions
from pipelines.tracking import locations, runs
from pipelines.tracking import store as mlflow_store
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("own_store")


def register_empty_version(name: str) -> versions.ModelVersion:
    with runs.start_run() as run_id:
        client = MlflowClient()
        experiment = client.get_run(run_id).info.experiment_id
        logged_model = client.create_logged_model(experiment, name=runs.LOGGED_MODEL_NAME, source_run_id=run_id)
        client.finalize_logged_model(logged_model.model_id, "READY")
    return versions.register_version(name, run_id, logged_model.model_id)


def test_registering_a_package_twice_is_idempotent():
    first = register_empty_version("c")
    client = MlflowClient()
    model_id = client.get_model_version("c", first.number).source.removeprefix("models:/")
    assert versions.register_version("c", first.run_id, model_id) == first
    other = client.create_logged_model(client.get_run(first.run_id).info.experiment_id, source_run_id=first.run_id)
    assert versions.register_version("c", first.run_id, other.model_id).number == "2"
    assert versions.register_version("c", first.run_id, model_id) == first


def test_unregistered_model_has_no_versions_or_aliases():
    assert versions.list_versions("unregistered") == {}
    assert versions.get_aliases("unregistered") == {}


def test_model_card_becomes_the_description():
    version = register_empty_version("card")
    versions.set_description(version, "| a | b |\n| --- | --- |")
    assert MlflowClient().get_model_version("card", version.number).description == "| a | &emsp;b |\n| --- | --- |"


def test_long_model_card_is_truncated_at_a_line(monkeypatch):
    def update(client, name, number, text):
        if len(text) > 5000:
            raise MlflowException("value too long for type character varying(5000)")
        real_update(client, name, number, text)

    real_update = MlflowClient.update_model_version
    monkeypatch.setattr(MlflowClient, "update_model_version", update)
    version = register_empty_version("long")
    versions.set_description(version, "".join(f"line {number}\n" for number in range(1000)))
    description = MlflowClient().get_model_version("long", version.number).description
    lines = description.splitlines()
    assert 4900 < len(description) <= 5000
    assert lines[:-2] == [f"line {number}" for number in range(len(lines) - 2)]
    assert lines[-2:] == ["", "Truncated: the whole card is the artifact `model_card.md` of the run."]
    with pytest.raises(UserError):
        versions.set_description(versions.ModelVersion("unregistered", "1", version.run_id), "short")


def test_champion_without_predictions_is_reported(tmp_path):
    with runs.start_run() as run_id:
        pass
    with pytest.raises(UserError, match=r"champion f version 1: MLflow run \w+ has no predictions.parquet"):
        versions.download_result(versions.ModelVersion("f", "1", run_id), "predictions.parquet", tmp_path)


def test_unknown_run_is_reported():
    with (
        pytest.raises(UserError, match=r"MLflow at .* has no run 0123, or it was deleted; `dvc repro -f train`"),
        runs.start_run("0123"),
    ):
        pass


def test_store_is_created_again_after_a_kill(tmp_path, monkeypatch):
    """MLflow cannot use a database that has only some of its tables."""
    previous_uri = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code = (
        "import os; from sqlalchemy import event; from sqlalchemy.engine import Engine; seen = []\n"
        "@event.listens_for(Engine, 'after_cursor_execute')\n"
        "def after(connection, cursor, statement, *rest):\n"
        "    seen.append(statement)\n"
        "    if len(seen) == 25: os.kill(os.getpid(), 9)\n"
        "from pipelines.tracking import store; store.connect()"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -9
    leftovers = list((tmp_path / "mlruns").glob(".mlflow.db.new*"))
    assert leftovers
    assert not (tmp_path / "mlruns" / "mlflow.db").exists()
    mlflow_store.connect()
    with runs.start_run() as run_id:
        pass
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert not list((tmp_path / "mlruns").glob(".mlflow.db.new*"))
    mlflow.set_tracking_uri(previous_uri)


def test_already_logged_metrics_are_not_logged_again():
    with runs.start_run() as run_id:
        runs.log_metrics({"test": {"auc": 0.5, "loss": 1.0, "name": "x"}})
    with runs.start_run(run_id):
        runs.log_metrics({"test": {"auc": 0.5, "loss": 0.75}})
    client = MlflowClient()
    assert [point.value for point in client.get_metric_history(run_id, "test.auc")] == [0.5]
    assert [point.value for point in client.get_metric_history(run_id, "test.loss")] == [1.0, 0.75]


def test_error_sets_run_status_to_failed():
    run_ids = []

    def fail() -> None:
        with runs.start_run() as run_id:
            run_ids.append(run_id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert MlflowClient().get_run(run_ids[0]).info.status == "FAILED"


def test_dvc_experiment_uses_the_projects_store(tmp_path, monkeypatch):
    workspace = tmp_path / ".dvc" / "tmp" / "exps" / "one"
    workspace.mkdir(parents=True)
    monkeypatch.chdir(workspace)
    assert locations.project_folder() == tmp_path
