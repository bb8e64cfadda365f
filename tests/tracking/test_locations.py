"""Settings of the MLflow store that are checked before a stage computes anything."""

import subprocess
import sys

import pytest

from fadeformer.errors import UserError
from pipelines.tracking import locations
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Unset MLflow's variables."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["a%2Fb", "a?b"])
def test_folder_that_mlflow_cannot_open_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="rename or move the project's folder"):
        locations.check_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.org:5000")
    locations.check_store()


@pytest.mark.parametrize("name", ["a b", "a#b", "50%", "é;b"])
def test_other_folder_names_are_accepted(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    locations.check_store()


def test_other_registry_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:secret@example.org:5001")
    with pytest.raises(UserError, match=r"MLFLOW_REGISTRY_URI is http://example.org:5001, but models .* unset"):
        locations.check_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@example.org:5001")
    locations.check_store()


def test_stage_checks_store_before_it_starts(tmp_path):
    folder = tmp_path / "feature%2Fbranch"
    folder.mkdir()
    process = subprocess.run(
        [sys.executable, "-m", "pipelines", "download"], cwd=folder, env={"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert process.stderr.strip().startswith(f"download: {folder}: MLflow cannot open a database in a folder with ?")
