"""Stages that `dvc repro` runs after edits, and bitwise reproducibility of all stages."""

import json
import shutil

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from tests.conftest import Project, read_json_file, stages_run
from tests.pipeline.test_first_run import LOAD

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]


def aliases(project: Project) -> dict[str, int]:
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    return client.get_registered_model("fadenet-phantom").aliases


@pytest.fixture(scope="module")
def first(reproduced: Project) -> dict[str, bytes]:
    """Files of the first run."""
    names = ("reports/metrics.json", "models/best_model.pth")
    return {name: (reproduced.folder / name).read_bytes() for name in names}


def test_edit_of_tracking_repeats_no_stage(reproduced, first):
    module = reproduced.folder / "pipelines" / "tracking" / "runs.py"
    source = module.read_text()
    module.write_text(f"{source}# a comment\n")
    assert reproduced.run("dvc", "status", "train", "evaluate", "promote") == "Data and pipelines are up to date.\n"
    module.write_text(source)


def test_edit_of_evaluate_does_not_train(reproduced):
    reproduced.change(evaluate={"figure_dpi": 60})
    changed = reproduced.run("dvc", "status")
    assert "evaluate:" in changed
    assert "train:" not in changed


@pytest.fixture(scope="module")
def edited(reproduced: Project, prefect_server: str) -> list[str]:
    """Stages that run after an edit: training starts from weights with permuted classes and learns nothing."""
    weights = torch.load(reproduced.folder / "models" / "best_model.pth", weights_only=True)
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].roll(1, 0)
    torch.save(weights, reproduced.folder / "start.pth")
    reproduced.change(
        model={"weights": "start.pth"}, train={"epochs": 1, "learning_rate": 1e-9}, promote={"min_auc": 0.0}
    )
    return stages_run(reproduced.run("dvc", "repro", PREFECT_API_URL=prefect_server))


def test_edit_of_train_does_not_download(reproduced, first, edited):
    before = json.loads(first["reports/metrics.json"])["test"]["overall"]["auc"]
    assert edited == ["train", "evaluate", "promote"]
    decision = read_json_file(reproduced, "reports/promotion.json")
    assert decision["auc"] < before == decision["champion_auc"]
    assert aliases(reproduced) == {"champion": 1, "challenger": 2}
    assert "test AUC not lower than that of the champion by more than 0.02, at 98.3333 %" in decision["reason"]


def test_training_depends_on_its_initial_weights(reproduced, edited):
    start = reproduced.folder / "start.pth"
    before = torch.load(start, weights_only=True)
    after = torch.load(reproduced.folder / "models" / "best_model.pth", weights_only=True)
    torch.testing.assert_close(after["attn.qkv.weight"], before["attn.qkv.weight"], rtol=0, atol=1e-6)
    torch.save({name: value * 0.9 if value.is_floating_point() else value for name, value in before.items()}, start)
    assert "train:" in reproduced.run("dvc", "status", "train")


def test_moved_project_restores_an_earlier_model(reproduced, first, tmp_path):
    """Without training; and the project finds its models in the new location."""
    reproduced.run("git", "checkout", "params.yaml")
    (reproduced.folder / "mlruns" / ".lock").unlink()
    moved = Project(tmp_path)
    moved.environment["PREFECT_API_URL"] = reproduced.environment["PREFECT_API_URL"]
    shutil.copytree(reproduced.folder, moved.folder, symlinks=True)
    shutil.move(reproduced.folder / "mlruns" / "artifacts", tmp_path / "moved_artifacts")
    assert stages_run(moved.run("dvc", "repro")) == ["promote"]
    assert (moved.folder / "models/best_model.pth").read_bytes() == first["models/best_model.pth"]
    assert read_json_file(moved, "reports/promotion.json")["version"] == "1"
    (tmp_path / "load.py").write_text(LOAD)
    store, images = f"sqlite:///{moved.folder}/mlruns/mlflow.db", moved.folder / "data/processed/test.npy"
    moved.run("python", str(tmp_path / "load.py"), store, str(images), str(tmp_path / "scores.npy"))
    assert np.load(tmp_path / "scores.npy").sum(axis=1) == pytest.approx(1)
    shutil.move(tmp_path / "moved_artifacts", reproduced.folder / "mlruns" / "artifacts")


def test_repeated_stages_give_the_same_bytes(reproduced, first):
    reproduced.stages()
    assert {name: (reproduced.folder / name).read_bytes() for name in first} == first
    # Promoted, because the same AUC is not lower than the champion's.
    assert read_json_file(reproduced, "reports/promotion.json")["version"] == "3"
    assert aliases(reproduced) == {"champion": 3, "challenger": 2, "previous": 1}
