"""Versions and their aliases in a real store, with models that are only a row of it."""

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


def version(name: str) -> versions.ModelVersion:
    with runs.start_run() as run_id:
        client = MlflowClient()
        experiment = client.get_run(run_id).info.experiment_id
        made = client.create_logged_model(experiment, name=runs.LOGGED_MODEL_NAME, source_run_id=run_id)
        client.finalize_logged_model(made.model_id, "READY")
    return versions.register_version(name, run_id, made.model_id)


def test_a_package_is_one_version_and_another_package_of_the_run_another():
    first = version("c")
    client = MlflowClient()
    known = client.get_model_version("c", first.number).source.removeprefix("models:/")
    assert versions.register_version("c", first.run_id, known) == first
    other = client.create_logged_model(client.get_run(first.run_id).info.experiment_id, source_run_id=first.run_id)
    assert versions.register_version("c", first.run_id, other.model_id).number == "2"
    assert versions.register_version("c", first.run_id, known) == first


def test_a_model_that_is_not_registered_has_no_versions_and_no_aliases():
    assert versions.list_versions("nobody") == {}
    assert versions.get_aliases("nobody") == {}


def test_a_card_is_the_description():
    one = version("card")
    versions.set_description(one, "| a | b |\n| --- | --- |")
    assert MlflowClient().get_model_version("card", one.number).description == "| a | &emsp;b |\n| --- | --- |"


def test_of_a_long_card_there_is_what_a_database_takes(monkeypatch):
    def update(client, name, number, text):
        if len(text) > 5000:
            raise MlflowException("value too long for type character varying(5000)")
        whole(client, name, number, text)

    whole = MlflowClient.update_model_version
    monkeypatch.setattr(MlflowClient, "update_model_version", update)
    one = version("long")
    versions.set_description(one, "".join(f"line {number}\n" for number in range(1000)))
    found = MlflowClient().get_model_version("long", one.number).description
    lines = found.splitlines()
    assert 4900 < len(found) <= 5000
    assert lines[:-2] == [f"line {number}" for number in range(len(lines) - 2)]
    assert lines[-2:] == ["", "Truncated: the whole card is the artifact `model_card.md` of the run."]
    with pytest.raises(UserError):
        versions.set_description(versions.ModelVersion("nobody", "1", one.run_id), "short")


def test_a_champion_whose_predictions_are_gone_is_told():
    with runs.start_run() as run_id:
        pass
    with pytest.raises(UserError, match=r"champion f version 1: MLflow run \w+ has no predictions.parquet"):
        versions.load_test_predictions(versions.ModelVersion("f", "1", run_id))


def test_a_run_that_is_not_in_the_store_is_told():
    with (
        pytest.raises(UserError, match=r"MLflow at .* has no run 0123, or it was deleted; `dvc repro -f train`"),
        runs.start_run("0123"),
    ):
        pass


def test_a_store_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    """MLflow itself gives up on a database that has some of its tables."""
    before = mlflow.get_tracking_uri()
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
    left = list((tmp_path / "mlruns").glob(".mlflow.db.new*"))
    assert left
    assert not (tmp_path / "mlruns" / "mlflow.db").exists()
    mlflow_store.connect()
    with runs.start_run() as run_id:
        pass
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert not list((tmp_path / "mlruns").glob(".mlflow.db.new*"))
    mlflow.set_tracking_uri(before)


def test_numbers_that_are_there_are_not_logged_again():
    with runs.start_run() as run_id:
        runs.log_metrics({"test": {"auc": 0.5, "loss": 1.0, "name": "x"}})
    with runs.start_run(run_id):
        runs.log_metrics({"test": {"auc": 0.5, "loss": 0.75}})
    client = MlflowClient()
    assert [point.value for point in client.get_metric_history(run_id, "test.auc")] == [0.5]
    assert [point.value for point in client.get_metric_history(run_id, "test.loss")] == [1.0, 0.75]


def test_a_run_ends_as_failed_by_an_error():
    failed = []

    def fail() -> None:
        with runs.start_run() as run_id:
            failed.append(run_id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert MlflowClient().get_run(failed[0]).info.status == "FAILED"


def test_an_experiment_in_a_copy_of_dvc_belongs_to_the_real_store(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "one"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert locations.project_folder() == tmp_path
