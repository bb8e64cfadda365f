"""Output and results of one `make repro` in a fresh copy of the project."""

import json
import re
import sqlite3

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from fadeformer.io.formatting import format_with_interval
from pipelines.stages import STAGES
from tests.conftest import ALL_CORES, ROOT, Project, ReproducedProject, read_json_file, stages_run

FIGURES = (
    "training_curves", "confusion_matrix", "roc_curves", "pr_curves", "auc_forest", "reliability", "decision_curves",
    "score_histograms", "subgroup_forest", "gallery", "embedding",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(project: Project, reproduced_project: ReproducedProject) -> str:
    """Output of the first `make repro`."""
    output = project.make("repro", **ALL_CORES)
    reproduced_project.save(project)
    return output


@pytest.fixture(scope="module")
def mlflow(project: Project, first: str) -> MlflowClient:
    return MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")


@pytest.fixture(scope="module")
def run(mlflow: MlflowClient) -> Run:
    (only_run,) = mlflow.search_runs([mlflow.get_experiment_by_name("fadeformer").experiment_id])
    return only_run


def defined(numbers: dict) -> dict:
    """The defined metrics; DVC leaves out undefined ones."""
    nested = {name: defined(value) if isinstance(value, dict) else value for name, value in numbers.items()}
    return {name: value for name, value in nested.items() if value not in (None, {})}


def test_every_stage_prints_one_line(first):
    assert tuple(stages_run(first)) == STAGES
    for stage in STAGES:
        # of the few images of this test, some classes have fewer than 5 in val, and validate warns
        assert len(re.findall(rf"^{stage}: (?!WARNING)", first, flags=re.MULTILINE)) == 1
    assert "promote: PROMOTED" in first
    assert "Warning" not in first
    assert "View at" not in first


def test_nothing_is_written_outside_the_project(project, first):
    assert list(project.home.iterdir()) == []
    assert list(project.temporary.iterdir()) == []
    assert project.run("git", "status", "--short").split() == ["A", "dvc.lock"]


def test_second_run_skips_all_stages(project, first):
    assert stages_run(project.make("repro")) == []


def test_outputs_in_the_readme_exist(project, first):
    table = (ROOT / "README.md").read_text().split("Outputs of a run:")[1].split("\n\n")[1]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(names) >= 10
    for name in names:
        folder = "reports" if name in ("results.json", "intervals.json", "subgroups.json") else "."
        assert (project.folder / folder / name).exists(), name
    assert (project.folder / "reports/validation/data_docs/index.html").is_file()


def test_mlflow_run_has_all_results(project, mlflow, run):
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "6"
    assert run.data.params["dataset.name"] == "phantom"
    assert len(run.data.params) >= 40
    assert [point.step for point in mlflow.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3, 4, 5, 6]
    artifacts = {file.path for file in mlflow.list_artifacts(run.info.run_id)}
    assert {
        "predictions.parquet", "metrics.json", "intervals.json", "operating_points.json", "results.json",
        "model_card.md", "promotion.json", "promotion.html", "dvc.lock",
    } <= artifacts  # fmt: skip
    figures = {file.path for file in mlflow.list_artifacts(run.info.run_id, "figures")}
    assert figures == {f"figures/{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")}
    (data,) = run.inputs.dataset_inputs
    card = read_json_file(project, "data/raw/dataset.json")
    assert (data.dataset.name, run.data.tags["dataset.sha256"]) == ("phantom", card["sha256"])
    assert run.data.tags["git.revision"] == project.run("git", "rev-parse", "HEAD").strip()
    assert len(run.data.tags["dvc.lock"]) == 32
    assert run.data.tags["dvc.data"].endswith(".dir")
    assert run.data.tags["git.changed"] == "false"


def test_metrics_are_the_same_everywhere(project, run):
    metrics = read_json_file(project, "reports/metrics.json")
    logged = run.data.metrics
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))
    results = read_json_file(project, "reports/results.json")
    assert defined(shown[""]["data"]["reports/metrics.json"]["data"]) == defined(metrics)
    test_metrics = metrics["test"]["overall"]
    for name, value in test_metrics.items():
        assert logged[f"test.overall.{name}"] == pytest.approx(value)
    intervals = read_json_file(project, "reports/intervals.json")["test"]["overall"]
    assert intervals["calibration_error"] is None
    with_interval = {name for name, interval in intervals.items() if interval is not None}
    assert {"auc", "accuracy", "loss", "average_precision"} <= with_interval
    for name in with_interval:
        assert [logged[f"test.interval.{name}.{end}"] for end in ("low", "high")] == pytest.approx(intervals[name])
    points = read_json_file(project, "reports/operating_points.json")["points"]
    sensitivity = points["youden"]["basophil"]["on_test"]["sensitivity"]["value"]
    assert logged["test.operating_points.youden.basophil.sensitivity"] == pytest.approx(sensitivity)
    assert logged["test.per_class.basophil.auc"] == pytest.approx(metrics["test"]["per_class"]["basophil"]["auc"])
    assert set(pd.read_csv(project.folder / "reports/curves/net_benefit.csv")["class"]) == set(points["youden"])
    for name in ("loss", "accuracy", "precision", "recall", "f1", "auc"):
        assert results[f"test_{name}"] == test_metrics[name]
    assert set(results) == {
        *(f"test_{name}" for name in ("loss", "accuracy", "precision", "recall", "f1", "auc")),
        "train_losses", "val_losses", "train_accuracies", "val_accuracies", "config", "test_balanced_accuracy",
    }  # fmt: skip
    balanced = {"value": test_metrics["balanced_accuracy"], "split": "published"}
    assert results["test_balanced_accuracy"] == balanced
    assert read_json_file(project, "reports/promotion.json")["auc"] == test_metrics["auc"]


def test_dvc_plots_contain_the_figures(project, first):
    project.run("dvc", "plots", "show", "-o", "plots")
    page = (project.folder / "plots" / "index.html").read_text()
    project.run("rm", "-r", "plots")
    for name in FIGURES:
        assert f"{name}.png" in page
    curves = ("train_loss", "val_accuracy", "ROC on test", "Precision-recall on test")
    for name in (*curves, '"class": "basophil"', '"field": "class"'):
        assert name in page


def test_model_card_states_synthetic_images(project, mlflow):
    card = (project.folder / "reports" / "model_card.md").read_text()
    assert "Synthetic: every image is drawn by a program" in card
    assert mlflow.get_model_version("fadenet-phantom", "1").description.replace("&emsp;", "") == card
    auc, bounds = (read_json_file(project, f"reports/{name}.json")["test"] for name in ("metrics", "intervals"))
    assert f"| AUC | {format_with_interval(auc['overall']['auc'], bounds['overall']['auc'])} |" in card


# For an environment with the requirements, but without this project.
LOAD = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
assert importlib.util.find_spec("fadeformer") is None
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/fadenet-phantom@champion")
scores = model.predict(np.load(sys.argv[2])).filter(like="probability.").to_numpy()
assert model.metadata.get_input_schema() and model.input_example is not None
assert "/mlruns/artifacts/" in sys.modules["fadeformer"].__file__
np.save(sys.argv[3], scores)
"""


def test_champion_has_the_same_scores_elsewhere(project, mlflow, tmp_path):
    assert mlflow.get_registered_model("fadenet-phantom").aliases == {"champion": 1}
    store, images = f"sqlite:///{project.folder}/mlruns/mlflow.db", project.folder / "data/processed/test.npy"
    (tmp_path / "load.py").write_text(LOAD)
    project.run("python", str(tmp_path / "load.py"), store, str(images), str(tmp_path / "scores.npy"))
    predicted = pd.read_parquet(project.folder / "reports/predictions.parquet").query("split == 'test'")
    expected = predicted.filter(like="score_").to_numpy()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-5)


def test_mlflow_uses_no_file_store(project, first):
    assert list((project.folder / "mlruns").rglob("meta.yaml")) == []
    with sqlite3.connect(project.folder / "mlruns" / "mlflow.db") as store:
        (uri,) = store.execute("select artifact_location from experiments where name = 'fadeformer'").fetchone()
    assert uri == (project.folder / "mlruns" / "artifacts").as_uri()


def test_requirements_lock_pins_torch():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split(" ")[0].split("==") for line in lines if line)
    assert (locked["torch"], locked["torchvision"]) == ("2.14.1", "0.29.1")
