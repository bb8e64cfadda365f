"""One `dvc repro` from nothing to a champion, what it leaves, and what a second one does after each kind of edit."""

import json
import re
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from fadeformer import params
from fadeformer.numerals import told
from pipelines.__main__ import STAGES
from tests.conftest import EVERY_CORE, ROOT, Kept, Project, benchmark

pytestmark = pytest.mark.pipeline
FIGURES = (
    "training_curves", "confusion_matrix", "roc_curves", "pr_curves", "auc_forest", "reliability", "decision_curves",
    "score_histograms", "subgroup_forest", "gallery", "embedding",
)  # fmt: skip


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


def read(project: Project, name: str) -> dict:
    return json.loads((project.folder / name).read_text())


@pytest.fixture(scope="module")
def reproduced(project: Project, kept: Kept) -> Project:
    """Reproduced here, whatever other modules have: what it prints, and leaves outside of the project, is looked at."""
    project.first_output = project.run("dvc", "repro", **EVERY_CORE)
    kept.take(project)
    return project


@pytest.fixture
def mlflow(reproduced: Project) -> MlflowClient:
    return MlflowClient(f"sqlite:///{reproduced.folder}/mlruns/mlflow.db")


def defined(numbers: dict) -> dict:
    """The numbers that are not undefined, which DVC leaves out."""
    found = {name: defined(value) if isinstance(value, dict) else value for name, value in numbers.items()}
    return {name: value for name, value in found.items() if value not in (None, {})}


def the_run(mlflow: MlflowClient):
    experiment = mlflow.get_experiment_by_name("fadeformer")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    return run


def test_every_stage_runs_once_and_says_one_line(reproduced):
    assert tuple(ran(reproduced.first_output)) == STAGES
    for stage in STAGES:
        assert len(re.findall(rf"^{stage}: ", reproduced.first_output, flags=re.MULTILINE)) == 1
    assert "Warning" not in reproduced.first_output
    assert "View at" not in reproduced.first_output


def test_nothing_is_written_outside_the_project(reproduced):
    assert list(reproduced.home.iterdir()) == []
    assert list(reproduced.temporary.iterdir()) == []
    assert reproduced.run("git", "status", "--short").split() == ["A", "dvc.lock"]


def test_one_finished_run_holds_parameters_history_figures_and_data(reproduced, mlflow):
    run = the_run(mlflow)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "6"
    assert run.data.params["dataset.name"] == "phantom"
    assert len(run.data.params) >= 40
    assert [point.step for point in mlflow.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3, 4, 5, 6]
    artifacts = {file.path for file in mlflow.list_artifacts(run.info.run_id)}
    assert {
        "predictions.parquet",
        "metrics.json",
        "intervals.json",
        "operating_points.json",
        "results.json",
        "model_card.md",
        "promotion.json",
        "promotion.html",
        "dvc.lock",
    } <= artifacts
    figures = {file.path for file in mlflow.list_artifacts(run.info.run_id, "figures")}
    assert figures == {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    (data,) = run.inputs.dataset_inputs
    card = read(reproduced, "data/raw/dataset.json")
    assert (data.dataset.name, run.data.tags["dataset.sha256"]) == ("phantom", card["sha256"])
    assert run.data.tags["git.revision"] == reproduced.run("git", "rev-parse", "HEAD").strip()
    assert len(run.data.tags["dvc.lock"]) == 32
    assert run.data.tags["dvc.data"].endswith(".dir")
    assert run.data.tags["git.changed"] == "false"


def test_numbers_are_the_same_everywhere(reproduced, mlflow):
    metrics = read(reproduced, "reports/metrics.json")
    logged = the_run(mlflow).data.metrics
    shown = json.loads(reproduced.run("dvc", "metrics", "show", "--json"))
    results = read(reproduced, "reports/results.json")
    assert defined(shown[""]["data"]["reports/metrics.json"]["data"]) == defined(metrics)
    of_test = metrics["test"]["overall"]
    for name, value in of_test.items():
        assert logged[f"test.overall.{name}"] == pytest.approx(value)
    bounds = read(reproduced, "reports/intervals.json")["test"]["overall"]
    assert bounds["calibration_error"] is None
    known = {name for name, bound in bounds.items() if bound is not None}
    assert {"auc", "accuracy", "loss", "average_precision"} <= known
    for name in known:
        assert [logged[f"test.interval.{name}.{end}"] for end in ("low", "high")] == pytest.approx(bounds[name])
    points = read(reproduced, "reports/operating_points.json")["points"]
    of_basophils = points["youden"]["basophil"]["on_test"]["sensitivity"]["value"]
    assert logged["test.operating_points.youden.basophil.sensitivity"] == pytest.approx(of_basophils)
    assert logged["test.per_class.basophil.auc"] == pytest.approx(metrics["test"]["per_class"]["basophil"]["auc"])
    assert set(pd.read_csv(reproduced.folder / "reports/curves/net_benefit.csv")["class"]) == set(points["youden"])
    for name in ("loss", "accuracy", "precision", "recall", "f1", "auc"):
        assert results[f"test_{name}"] == of_test[name]
    assert set(results) == {
        *(f"test_{name}" for name in ("loss", "accuracy", "precision", "recall", "f1", "auc")),
        "train_losses", "val_losses", "train_accuracies", "val_accuracies", "config", "test_balanced_accuracy",
    }  # fmt: skip
    balanced = {"value": of_test["balanced_accuracy"], "split": "published"}
    assert results["test_balanced_accuracy"] == balanced
    assert read(reproduced, "reports/promotion.json")["auc"] == of_test["auc"]


def test_dvc_shows_the_figures(reproduced):
    reproduced.run("dvc", "plots", "show", "-o", "plots")
    page = (reproduced.folder / "plots" / "index.html").read_text()
    for name in FIGURES:
        assert f"{name}.png" in page
    for name in (
        "train_loss",
        "val_accuracy",
        "ROC on test",
        "Precision-recall on test",
        '"class": "basophil"',
        '"field": "class"',
    ):
        assert name in page
    reproduced.run("rm", "-r", "plots")


def test_the_card_says_that_the_images_are_synthetic(reproduced, mlflow):
    card = (reproduced.folder / "reports" / "model_card.md").read_text()
    assert "Synthetic: every image is drawn by a program" in card
    assert mlflow.get_model_version("fadenet-phantom", "1").description.replace("&emsp;", "") == card
    auc, bounds = (read(reproduced, f"reports/{name}.json")["test"] for name in ("metrics", "intervals"))
    assert f"| AUC | {told(auc['overall']['auc'], bounds['overall']['auc'])} |" in card


# In an environment that has the requirements, but not this project.
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


def test_the_champion_loads_in_a_fresh_process_and_scores_the_same(reproduced, mlflow, tmp_path):
    assert mlflow.get_registered_model("fadenet-phantom").aliases == {"champion": 1}
    store, images = f"sqlite:///{reproduced.folder}/mlruns/mlflow.db", reproduced.folder / "data/processed/test.npy"
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    reproduced.run("python", str(script), store, str(images), str(tmp_path / "scores.npy"))
    predicted = pd.read_parquet(reproduced.folder / "reports/predictions.parquet").query("split == 'test'")
    expected = predicted.filter(like="score_").to_numpy()
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-5)


def test_a_second_run_has_nothing_to_do(reproduced):
    assert ran(reproduced.run("dvc", "repro")) == []


def test_rewording_a_message_of_the_tracking_module_repeats_no_stage(reproduced):
    module = reproduced.folder / "pipelines" / "tracking.py"
    before = module.read_text()
    module.write_text(before.replace("or it was deleted", "or someone deleted it"))
    assert module.read_text() != before
    assert reproduced.run("dvc", "status", "train", "evaluate", "promote") == "Data and pipelines are up to date.\n"
    module.write_text(before)


def test_a_forced_run_gives_the_same_bytes_and_the_benchmark_tells_what_each_stage_takes(
    reproduced, capsys, monkeypatch
):
    names = ("reports/metrics.json", "models/best_model.pth")
    before = [(reproduced.folder / name).read_bytes() for name in names]
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):  # MLflow sets the first in a process that has used it
        monkeypatch.delenv(name, raising=False)
    for name, value in {**reproduced.environment, **EVERY_CORE}.items():
        monkeypatch.setenv(name, value)
    overhead = benchmark("overhead")
    monkeypatch.setattr(overhead, "COMMAND", ("dvc", "repro", "--force"))
    walls = overhead.reproduce(reproduced.folder)
    assert tuple(walls) == ("start", *STAGES)
    assert [(reproduced.folder / name).read_bytes() for name in names] == before
    assert read(reproduced, "reports/promotion.json")["version"] == "2"  # the same AUC is not lower than the champion's
    cloned, work = [], overhead.worked(reproduced.folder)
    monkeypatch.setattr(overhead, "PROJECT", reproduced.folder)
    monkeypatch.setattr(overhead, "worked", lambda folder: work)

    def noted(folder):
        cloned.append(params.load(folder / "params.yaml").train.epochs)
        return walls

    monkeypatch.setattr(overhead, "reproduce", noted)
    monkeypatch.setattr("sys.argv", ["overhead.py", "--epochs", "7"])
    overhead.main()
    assert cloned == [7]
    table = capsys.readouterr().out
    for stage in (*STAGES, "in all"):
        for figures in re.findall(rf"^{stage} +([\d.]+) +([\d.]+) +([\d.]+)$", table, re.MULTILINE):
            wall, worked, above = map(float, figures)
            assert wall == pytest.approx(worked + above, abs=0.11)
        assert len(re.findall(rf"^{stage} ", table, re.MULTILINE)) == 1


def test_an_edit_of_promote_promotes_alone_and_a_refusal_is_a_decision(reproduced, mlflow):
    reproduced.change(promote={"min_auc": 1.0})
    output = reproduced.run("dvc", "repro")
    assert ran(output) == ["promote"]
    assert "promote: REFUSED fadenet-phantom version 2" in output
    decision = read(reproduced, "reports/promotion.json")
    assert decision["decision"] == "refused"
    assert decision["reason"].startswith("lower bound of the test AUC at least 1: 0.")
    assert mlflow.get_registered_model("fadenet-phantom").aliases == {"champion": 2, "previous": 1}  # nobody is demoted


@pytest.mark.usefixtures("shared_server")
def test_an_edit_of_evaluate_does_not_train(reproduced):
    reproduced.change(evaluate={"figure_dpi": 60})
    assert ran(reproduced.run("dvc", "repro")) == ["evaluate", "promote"]


@pytest.mark.usefixtures("shared_server")
def test_an_edit_of_train_does_not_download_and_a_worse_model_stays_a_challenger(reproduced, mlflow):
    before = read(reproduced, "reports/metrics.json")["test"]["overall"]["auc"]
    reproduced.change(train={"learning_rate": 1e-9}, promote={"min_auc": 0.0})
    output = reproduced.run("dvc", "repro")
    assert ran(output) == ["train", "evaluate", "promote"]
    decision = read(reproduced, "reports/promotion.json")
    assert decision["auc"] < before == decision["champion_auc"]
    assert mlflow.get_registered_model("fadenet-phantom").aliases == {
        "champion": 2, "challenger": 3, "previous": 1,
    }  # fmt: skip
    assert "test AUC not lower than the champion's by more than 0.02, at 95 %" in decision["reason"]
    assert len(mlflow.search_model_versions("name = 'fadenet-phantom'")) == 3


def test_what_was_trained_before_comes_back_without_training(reproduced):
    reproduced.run("git", "checkout", "params.yaml")
    assert "train" not in ran(reproduced.run("dvc", "repro"))
    assert read(reproduced, "reports/promotion.json")["version"] == "2"


def test_a_moved_project_keeps_its_models(reproduced, tmp_path):
    (reproduced.folder / "mlruns" / ".lock").unlink()
    moved = Project(tmp_path)
    shutil.copytree(reproduced.folder, moved.folder, symlinks=True)
    shutil.move(reproduced.folder / "mlruns" / "artifacts", tmp_path / "away")
    moved.run("dvc", "repro", "--force", "--single-item", "promote")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    store, images = f"sqlite:///{moved.folder}/mlruns/mlflow.db", moved.folder / "data/processed/test.npy"
    moved.run("python", str(script), store, str(images), str(tmp_path / "scores.npy"))
    assert np.load(tmp_path / "scores.npy").sum(axis=1) == pytest.approx(1)
    shutil.move(tmp_path / "away", reproduced.folder / "mlruns" / "artifacts")


def test_no_file_store_appears(reproduced):
    assert list((reproduced.folder / "mlruns").rglob("meta.yaml")) == []
    with sqlite3.connect(reproduced.folder / "mlruns" / "mlflow.db") as store:
        (uri,) = store.execute("select artifact_location from experiments where name = 'fadeformer'").fetchone()
    assert uri == (reproduced.folder / "mlruns" / "artifacts").as_uri()


def test_the_shipped_lock_of_requirements_is_what_is_tested():
    locked = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line
    )
    assert (locked["torch"], locked["torchvision"]) == ("2.14.1", "0.29.1")
