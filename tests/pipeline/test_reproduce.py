"""What `dvc repro` runs again after edits of params.yaml, and that a forced run gives the same bytes."""

import shutil

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from tests.conftest import EVERY_CORE, Project, ran, read
from tests.pipeline.test_first_run import LOAD

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]


def aliases(project: Project) -> dict[str, int]:
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    return client.get_registered_model("fadenet-phantom").aliases


def test_rewording_a_message_of_the_tracking_module_repeats_no_stage(reproduced):
    module = reproduced.folder / "pipelines" / "tracking.py"
    before = module.read_text()
    module.write_text(before.replace("or it was deleted", "or someone deleted it"))
    assert module.read_text() != before
    assert reproduced.run("dvc", "status", "train", "evaluate", "promote") == "Data and pipelines are up to date.\n"
    module.write_text(before)


def test_a_forced_run_gives_the_same_bytes(reproduced):
    names = ("reports/metrics.json", "models/best_model.pth")
    before = [(reproduced.folder / name).read_bytes() for name in names]
    reproduced.run("dvc", "repro", "--force", **EVERY_CORE)
    assert [(reproduced.folder / name).read_bytes() for name in names] == before
    assert read(reproduced, "reports/promotion.json")["version"] == "2"  # the same AUC is not lower than the champion's
    assert aliases(reproduced) == {"champion": 2, "previous": 1}


def test_an_edit_of_evaluate_does_not_train(reproduced):
    reproduced.change(evaluate={"figure_dpi": 60})
    changed = reproduced.run("dvc", "status")
    assert "evaluate:" in changed
    assert "train:" not in changed


def test_an_edit_of_train_does_not_download(reproduced):
    before = read(reproduced, "reports/metrics.json")["test"]["overall"]["auc"]
    reproduced.change(train={"learning_rate": 1e-9}, promote={"min_auc": 0.0})
    assert ran(reproduced.run("dvc", "repro")) == ["train", "evaluate", "promote"]
    decision = read(reproduced, "reports/promotion.json")
    assert decision["auc"] < before == decision["champion_auc"]
    assert aliases(reproduced) == {"champion": 2, "challenger": 3, "previous": 1}
    assert "test AUC not lower than the champion's by more than 0.02, at 95 %" in decision["reason"]


def test_an_earlier_model_comes_back_without_training(reproduced):
    reproduced.run("git", "checkout", "params.yaml")
    assert "train" not in ran(reproduced.run("dvc", "repro"))
    assert read(reproduced, "reports/promotion.json")["version"] == "2"


def test_a_moved_project_keeps_its_models(reproduced, tmp_path):
    (reproduced.folder / "mlruns" / ".lock").unlink()
    moved = Project(tmp_path)
    shutil.copytree(reproduced.folder, moved.folder, symlinks=True)
    shutil.move(reproduced.folder / "mlruns" / "artifacts", tmp_path / "away")
    moved.run("dvc", "repro", "--force", "--single-item", "promote")
    (tmp_path / "load.py").write_text(LOAD)
    store, images = f"sqlite:///{moved.folder}/mlruns/mlflow.db", moved.folder / "data/processed/test.npy"
    moved.run("python", str(tmp_path / "load.py"), store, str(images), str(tmp_path / "scores.npy"))
    assert np.load(tmp_path / "scores.npy").sum(axis=1) == pytest.approx(1)
    shutil.move(tmp_path / "away", reproduced.folder / "mlruns" / "artifacts")


def test_training_starts_from_weights_and_watches_them(reproduced):
    start = reproduced.folder / "start.pth"
    shutil.copy(reproduced.folder / "models" / "best_model.pth", start)
    reproduced.change(model={"weights": "start.pth"}, train={"epochs": 1, "learning_rate": 1e-9})
    assert ran(reproduced.run("dvc", "repro", "train")) == ["train"]
    before = torch.load(start, weights_only=True)
    after = torch.load(reproduced.folder / "models" / "best_model.pth", weights_only=True)
    torch.testing.assert_close(after["attn.qkv.weight"], before["attn.qkv.weight"], rtol=0, atol=1e-6)
    torch.save({name: value * 0.9 if value.is_floating_point() else value for name, value in before.items()}, start)
    assert "train:" in reproduced.run("dvc", "status", "train")
