"""What the page of a deployment run says: where its MLflow run is for a browser, and how to have its results."""

import pytest

from fadeformer.io.atomic import write_json
from pipelines import paths
from pipelines.orchestration import artifacts
from pipelines.tracking import locations

SERVER = "http://mlflow:5000"


@pytest.fixture
def shown(tmp_path, monkeypatch) -> dict[str, str]:
    """The artifacts by key, in place of Prefect's; the folder is that of a project with a model."""
    kept: dict[str, str] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FADEFORMER_MLFLOW_PAGES", raising=False)
    monkeypatch.setattr(artifacts, "create_link_artifact", lambda link, key, **_: kept.update({key: link}))
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, description: kept.update({key: text}))
    for path in (paths.RUN, paths.REPORT):
        path.parent.mkdir(parents=True)
    write_json(paths.RUN, {"mlflow_run_id": "abc", "mlflow_experiment_id": "7"})
    paths.REPORT.touch()
    return kept


def test_links_lead_to_the_server(shown, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://trainer:secret@{SERVER.removeprefix('http://')}/")
    artifacts.publish_links()
    page = f"{SERVER}/#/experiments/7/runs/abc"
    assert shown == {"mlflow-run": page, "report": f"{page}/artifacts/index.html"}


def test_links_lead_to_where_a_browser_finds_the_server(shown, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    monkeypatch.setenv("FADEFORMER_MLFLOW_PAGES", "https://mlflow.example.org/")
    artifacts.publish_links()
    assert shown["mlflow-run"] == "https://mlflow.example.org/#/experiments/7/runs/abc"


def test_there_are_none_without_a_server_and_none_to_a_report_that_is_not_there(shown, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FADEFORMER_MLFLOW_PAGES", "https://mlflow.example.org")
    artifacts.publish_links()
    assert shown == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    paths.REPORT.unlink()
    artifacts.publish_links()
    assert shown.keys() == {"mlflow-run"}


def test_an_experiment_is_applied_where_it_is_and_pulled_from_elsewhere(shown, tmp_path):
    locations.WORKSPACE_MARKER.parent.mkdir()
    write_json(locations.WORKSPACE_MARKER, {"repository": "https://git.example.org/fadeformer.git"})
    artifacts.publish_experiment("first-1234")
    assert shown["experiment"] == (
        "`dvc exp pull https://git.example.org/fadeformer.git first-1234`, then `dvc exp apply first-1234`"
    )
    (tmp_path / ".git").mkdir()
    write_json(locations.WORKSPACE_MARKER, {"repository": str(tmp_path)})
    artifacts.publish_experiment("first-1234")
    assert shown["experiment"] == "`dvc exp apply first-1234` in the repository that this was deployed from"
