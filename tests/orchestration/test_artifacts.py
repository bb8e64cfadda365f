"""Prefect artifacts of a deployment run: links to MLflow, and commands to get the results."""

import pytest

from fadeformer.io.atomic import write_json
from pipelines import paths
from pipelines.orchestration import artifacts
from pipelines.tracking import locations

SERVER = "http://mlflow:5000"


@pytest.fixture
def published(tmp_path, monkeypatch) -> dict[str, str]:
    """Published artifacts by key; the current directory is a project with a model."""
    by_key: dict[str, str] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FADEFORMER_MLFLOW_PAGES", raising=False)
    monkeypatch.setattr(artifacts, "create_link_artifact", lambda link, key, **_: by_key.update({key: link}))
    monkeypatch.setattr(
        artifacts, "create_markdown_artifact", lambda text, key, description: by_key.update({key: text})
    )
    for path in (paths.RUN, paths.REPORT):
        path.parent.mkdir(parents=True)
    write_json(paths.RUN, {"mlflow_run_id": "abc", "mlflow_experiment_id": "7"})
    paths.REPORT.touch()
    return by_key


def test_links_lead_to_the_mlflow_server(published, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://trainer:secret@{SERVER.removeprefix('http://')}/")
    artifacts.publish_links()
    url = f"{SERVER}/#/experiments/7/runs/abc"
    assert published == {"mlflow-run": url, "report": f"{url}/artifacts/index.html"}


def test_links_use_the_public_mlflow_url(published, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    monkeypatch.setenv("FADEFORMER_MLFLOW_PAGES", "https://mlflow.example.org/")
    artifacts.publish_links()
    assert published["mlflow-run"] == "https://mlflow.example.org/#/experiments/7/runs/abc"


def test_links_need_a_server_and_existing_files(published, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FADEFORMER_MLFLOW_PAGES", "https://mlflow.example.org")
    artifacts.publish_links()
    assert published == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    paths.REPORT.unlink()
    artifacts.publish_links()
    assert published.keys() == {"mlflow-run"}


def test_experiment_artifact_shows_the_dvc_commands(published, tmp_path):
    locations.WORKSPACE_MARKER.parent.mkdir()
    write_json(locations.WORKSPACE_MARKER, {"repository": "https://git.example.org/fadeformer.git"})
    artifacts.publish_experiment("first-1234")
    assert published["experiment"] == (
        "`dvc exp pull https://git.example.org/fadeformer.git first-1234`, then `dvc exp apply first-1234`"
    )
    (tmp_path / ".git").mkdir()
    write_json(locations.WORKSPACE_MARKER, {"repository": str(tmp_path)})
    artifacts.publish_experiment("first-1234")
    assert published["experiment"] == "`dvc exp apply first-1234` in the repository that this was deployed from"
