"""A package in a real store: its files, that it is made once for a content, and that it goes where its folder goes."""

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
from pipelines.registry import package as packaged
from pipelines.registry import versions
from pipelines.tracking import relocate, runs
from tests.packages import images, load, png, project_with_store


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory) -> Path:
    """A folder with a model and a store of its own."""
    with project_with_store(tmp_path_factory.mktemp("project")) as folder:
        yield folder


@pytest.fixture(scope="module")
def run_id() -> str:
    with runs.start_run() as made:
        pass
    return made


@pytest.fixture(scope="module")
def package(project, run_id) -> Path:
    """The folder of the first package."""
    return Path(mlflow.artifacts.download_artifacts(f"models:/{packaged.log_package(run_id).model_id}"))


def test_a_package_has_weights_and_words_alone(project, package):
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {f"data/model/{name}" for name in ("weights.safetensors", "model.json", "operating_points.json")} <= files
    endings = ".py .txt .yaml .json .safetensors .csv .parquet .html"
    assert {Path(name).suffix for name in files} <= {"", *endings.split()}
    with safe_open(package / "data/model/weights.safetensors", "pt") as weights:
        assert "classifier.weight" in weights.keys()  # noqa: SIM118  it is no dictionary
    for name in files:
        assert str(project).encode() not in (package / name).read_bytes(), name


def test_requirements_are_exact_and_few(package):
    names = [line.split("==") for line in (package / "requirements.txt").read_text().split()]
    assert all(len(name) == 2 for name in names)
    assert not {name for name, _ in names} & {"mlflow", "dvc", "prefect", "great-expectations", "matplotlib", "captum"}


LOADED = """
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
    """Scores by a process in another folder, where its library lies, and what it imported."""
    np.save(folder / "images.npy", images(5))
    done = subprocess.run(
        [sys.executable, "-c", LOADED, uri, str(folder / "images.npy"), str(folder / "scores.npy")],
        cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, library, imported = done.stdout.splitlines()
    return np.load(folder / "scores.npy"), library, set(imported.split())


def test_the_same_content_is_one_package_and_other_operating_points_another(project, run_id):
    first = packaged.log_package(run_id)
    client = MlflowClient()
    begun = client.create_logged_model(first.experiment_id, name="model", source_run_id=run_id)  # a killed stage's
    assert packaged.log_package(run_id).model_id == first.model_id
    assert begun.model_id not in {model.model_id for model in client.search_logged_models([first.experiment_id])}
    assert versions.register_version("m", run_id, first.model_id).number == "1"
    path = project / "reports" / "operating_points.json"
    before = path.read_text()
    points = json.loads(before)
    points["points"]["youden"]["malignant"]["threshold"] = 0.123
    path.write_text(json.dumps(points))
    other = packaged.log_package(run_id)
    assert other.model_id != first.model_id
    assert versions.register_version("m", run_id, other.model_id).number == "2"
    client.set_registered_model_alias("m", "champion", "1")
    path.write_text(before)
    assert versions.register_version("m", run_id, packaged.log_package(run_id).model_id).number == "1"
    assert packaged.log_package(run_id).tags[packaged.CONTENT_TAG] == packaged.compute_content_checksum()


def test_a_package_predicts_from_what_mlflow_hands_on(package):
    model = mlflow.pyfunc.load_model(str(package))
    pixels = images(4)
    files = [png(image) for image in pixels]
    expected = model.predict(pixels)
    pd.testing.assert_frame_equal(model.predict(pd.DataFrame({"image": files})), expected)
    pd.testing.assert_frame_equal(model.predict({"image": pixels}), expected)
    assert len(model.predict(model.input_example)) == 1
    assert model.predict(pixels, params={"operating_point": "sensitivity"})["decision"].unique() == ["malignant"]
    np.testing.assert_allclose(
        model.get_raw_model().scores(pixels), expected.filter(like="probability.").to_numpy(), atol=1e-6
    )


def test_limits_can_be_set_where_it_is_loaded(package):
    model = mlflow.pyfunc.load_model(str(package), model_config={"max_pixels": 100})
    with pytest.raises(mlflow.MlflowException, match="more than the limit of 100"):
        model.predict(pd.DataFrame({"image": [png(images(1)[0])]}))
    with pytest.raises(ValueError, match="model_config: max_pixels: only max_pixels and batch_size"):
        mlflow.pyfunc.load_model(str(package), model_config={"max_pixels": 0})


def test_a_store_that_was_moved_serves_without_this_project_and_imports_no_orchestrator(project, run_id, tmp_path):
    versions.register_version("moving", run_id, packaged.log_package(run_id).model_id)
    MlflowClient().set_registered_model_alias("moving", "champion", "1")
    expected = load(project).predict_proba(images(5))
    elsewhere = tmp_path / "with a space"
    shutil.copytree(project / "mlruns", elsewhere)
    away = (project / "mlruns" / "artifacts").rename(project / "mlruns" / "away")
    try:
        subprocess.run([sys.executable, str(elsewhere / Path(relocate.__file__).name)], check=True, cwd="/")
        store = f"sqlite:///{elsewhere}/mlflow.db"
        scores, library, imported = load_elsewhere("models:/moving@champion", tmp_path, MLFLOW_TRACKING_URI=store)
    finally:
        away.rename(project / "mlruns" / "artifacts")
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert library.startswith(str(elsewhere))
    assert not imported & {"pipelines", "dvc", "prefect", "great_expectations", "matplotlib", "captum", "sklearn"}


def test_a_package_is_fetched_by_each_kind_of_address(run_id):
    made = packaged.log_package(run_id)
    number = versions.register_version("fetched", run_id, made.model_id).number
    MlflowClient().set_registered_model_alias("fetched", "champion", number)
    addresses = ("fetched@champion", f"fetched/{number}", made.model_id)
    folders = [packaged.fetch_package(f"models:/{address}") for address in addresses]
    folders += [packaged.fetch_package(f"runs:/{run_id}/model"), packaged.fetch_package(str(folders[0]))]
    files = [
            "model.json", "operating_points.json", "reference.parquet", "ood.safetensors", "weights.safetensors",
        ]  # fmt: skip
    for folder in folders:
        assert sorted(path.name for path in packaged.find_data_folder(folder).iterdir()) == files


@pytest.mark.parametrize("uri", ["models:/m@nobody", "models:/m/99", "models:/unheard@champion", "runs:/0123/model"])
def test_a_model_that_is_not_there_is_told(uri):
    with pytest.raises(UserError, match=f"^{uri}: MLflow at .*mlruns has no such model"):
        packaged.fetch_package(uri)


def test_without_a_store_none_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="there is no MLflow store; run `dvc repro`"):
        packaged.fetch_package("models:/a@champion")
    assert not list(tmp_path.iterdir())
