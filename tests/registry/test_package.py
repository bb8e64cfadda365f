"""Packages in a real MLflow store: files, idempotence, and loading from a moved store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from safetensors import safe_open

from fadeformer.errors import UserError
from pipelines.registry import package, versions
from pipelines.tracking import relocate, runs
from tests.packages import images, load, png, project_with_store


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory) -> Path:
    """A project with a model and its own store."""
    with project_with_store(tmp_path_factory.mktemp("project")) as folder:
        yield folder


@pytest.fixture(scope="module")
def run_id() -> str:
    with runs.start_run() as new_run_id:
        pass
    return new_run_id


@pytest.fixture(scope="module")
def package_folder(project, run_id) -> Path:
    """The folder of the first package."""
    return Path(mlflow.artifacts.download_artifacts(f"models:/{package.log_package(run_id).model_id}"))


def test_package_has_weights_and_text_files_only(project, package_folder):
    files = {path.relative_to(package_folder).as_posix() for path in package_folder.rglob("*") if path.is_file()}
    assert {f"data/model/{name}" for name in ("weights.safetensors", "model.json", "operating_points.json")} <= files
    endings = ".py .txt .yaml .json .safetensors .csv .parquet .html"
    assert {Path(name).suffix for name in files} <= {"", *endings.split()}
    with safe_open(package_folder / "data/model/weights.safetensors", "pt") as weights:
        assert "classifier.weight" in weights.keys()  # noqa: SIM118  not a dictionary
    for name in files:
        assert str(project).encode() not in (package_folder / name).read_bytes(), name


def test_requirements_are_pinned_and_minimal(package_folder):
    names = [line.split("==") for line in (package_folder / "requirements.txt").read_text().split()]
    assert all(len(name) == 2 for name in names)
    assert not {name for name, _ in names} & {"mlflow", "dvc", "prefect", "great-expectations", "matplotlib", "captum"}


LOAD_AND_PREDICT = """
import sys, mlflow, numpy as np
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(np.load(sys.argv[2]))
np.save(sys.argv[3], found.filter(like="probability.").to_numpy())
import fadeformer
print(fadeformer.__file__)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def load_elsewhere(uri: str, folder: Path, **environment: str) -> tuple[np.ndarray, str, set[str]]:
    """Predict in a process in another folder; return scores, path of the library, and imported modules."""
    np.save(folder / "images.npy", images(5))
    process = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT, uri, str(folder / "images.npy"), str(folder / "scores.npy")],
        cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    *_, library, imported = process.stdout.splitlines()
    return np.load(folder / "scores.npy"), library, set(imported.split())


def test_same_content_is_logged_only_once(project, run_id):
    first = package.log_package(run_id)
    client = MlflowClient()
    unfinished = client.create_logged_model(
        first.experiment_id,
        name="model",
        source_run_id=run_id,  # by a killed stage
    )
    assert package.log_package(run_id).model_id == first.model_id
    assert unfinished.model_id not in {model.model_id for model in client.search_logged_models([first.experiment_id])}
    assert versions.register_version("m", run_id, first.model_id).number == "1"
    path = project / "reports" / "operating_points.json"
    content = path.read_text()
    points = json.loads(content)
    points["points"]["youden"]["malignant"]["threshold"] = 0.123
    path.write_text(json.dumps(points))
    other_package = package.log_package(run_id)
    assert other_package.model_id != first.model_id
    assert versions.register_version("m", run_id, other_package.model_id).number == "2"
    client.set_registered_model_alias("m", "champion", "1")
    path.write_text(content)
    assert versions.register_version("m", run_id, package.log_package(run_id).model_id).number == "1"
    assert package.log_package(run_id).tags[package.CONTENT_TAG] == package.compute_content_checksum()


def test_package_accepts_all_input_encodings_of_mlflow(package_folder):
    model = mlflow.pyfunc.load_model(str(package_folder))
    pixels = images(4)
    files = [png(image) for image in pixels]
    expected = model.predict(pixels)
    pd.testing.assert_frame_equal(model.predict(pd.DataFrame({"image": files})), expected)
    pd.testing.assert_frame_equal(model.predict({"image": pixels}), expected)
    assert len(model.predict(model.input_example)) == 1
    assert model.predict(pixels, params={"operating_point": "sensitivity"})["decision"].unique() == ["malignant"]
    np.testing.assert_allclose(
        model.get_raw_model().predict_proba(pixels), expected.filter(like="probability.").to_numpy(), atol=1e-6
    )


def test_model_config_overrides_limits(package_folder):
    model = mlflow.pyfunc.load_model(str(package_folder), model_config={"max_pixels": 100})
    with pytest.raises(mlflow.MlflowException, match="more than the limit of 100"):
        model.predict(pd.DataFrame({"image": [png(images(1)[0])]}))
    with pytest.raises(ValueError, match="model_config: invalid max_pixels; keys are max_pixels and batch_size"):
        mlflow.pyfunc.load_model(str(package_folder), model_config={"max_pixels": 0})


def test_moved_store_loads_without_project_or_orchestrator(project, run_id, tmp_path):
    versions.register_version("moving", run_id, package.log_package(run_id).model_id)
    MlflowClient().set_registered_model_alias("moving", "champion", "1")
    expected = load(project).predict_proba(images(5))
    elsewhere = tmp_path / "with a space"
    shutil.copytree(project / "mlruns", elsewhere)
    moved_artifacts = (project / "mlruns" / "artifacts").rename(project / "mlruns" / "away")
    try:
        subprocess.run([sys.executable, str(elsewhere / Path(relocate.__file__).name)], check=True, cwd="/")
        store = f"sqlite:///{elsewhere}/mlflow.db"
        scores, library, imported = load_elsewhere("models:/moving@champion", tmp_path, MLFLOW_TRACKING_URI=store)
    finally:
        moved_artifacts.rename(project / "mlruns" / "artifacts")
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert library.startswith(str(elsewhere))
    assert not imported & {"pipelines", "dvc", "prefect", "great_expectations", "matplotlib", "captum", "sklearn"}


def test_package_is_fetched_by_each_uri(run_id):
    logged = package.log_package(run_id)
    number = versions.register_version("fetched", run_id, logged.model_id).number
    MlflowClient().set_registered_model_alias("fetched", "champion", number)
    names = ("fetched@champion", f"fetched/{number}", logged.model_id)
    folders = [package.fetch_package(f"models:/{name}") for name in names]
    folders += [package.fetch_package(f"runs:/{run_id}/model"), package.fetch_package(str(folders[0]))]
    files = [
        "model.json", "ood.safetensors", "operating_points.json", "reference.parquet", "training_images.parquet",
        "weights.safetensors"
    ]  # fmt: skip
    for folder in folders:
        assert sorted(path.name for path in package.find_data_folder(folder).iterdir()) == files


@pytest.mark.parametrize("uri", ["models:/m@unknown", "models:/m/99", "models:/unheard@champion", "runs:/0123/model"])
def test_unknown_model_is_reported(uri):
    with pytest.raises(UserError, match=f"^{uri}: MLflow at .*mlruns has no such model"):
        package.fetch_package(uri)


def test_fetching_does_not_create_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="there is no MLflow store; run `dvc repro`"):
        package.fetch_package("models:/a@champion")
    assert not list(tmp_path.iterdir())
