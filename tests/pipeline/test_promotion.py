"""Promotion in a project: champion with other test images, forced promotion, rollback, and history."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from fadeformer.data.preprocess import decode_to_memmap
from fadeformer.evaluation import predictions
from fadeformer.evaluation.metrics import auc
from pipelines.registry import resolve
from tests.conftest import stages_run

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]
NAME = "fadenet-phantom"


def decision(project) -> dict:
    return json.loads((project.folder / "reports/promotion.json").read_text())


def aliases(project) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    return {alias: str(number) for alias, number in client.get_registered_model(NAME).aliases.items()}


def check_named(promotion: dict, name: str) -> dict:
    return next(check for check in promotion["checks"] if check["name"] == name)


def test_champion_predicts_changed_test_images(reproduced):
    first = decision(reproduced)
    assert (first["decision"], first["aliases"], first["ledger_entry"]) == ("promoted", ["champion"], 1)
    reproduced.change(
        dataset={"seed": 8}, preprocess={"image_size": 20}, train={"epochs": 1, "learning_rate": 1e-9},
        evaluate={"subgroups": []}, promote={"min_subgroup_auc": {"sex": 0.5}, "min_class_auc": 0.5},
    )  # fmt: skip
    output = reproduced.stages()
    reproduced.run("dvc", "commit", "--force")  # as after `dvc repro`, which would take longer
    assert (
        f"the test images have changed since champion {NAME} version 1 was evaluated: running inference with it"
        in output
    )
    assert f"promote: REFUSED {NAME} version 2 stays challenger" in output
    result = decision(reproduced)
    assert check_named(result, "unseen_test_images")["status"] == "passed"
    assert check_named(result, "not_inferior")["status"] == "failed"
    assert check_named(result, "min_subgroup_auc")["details"].startswith(
        "sex is not a subgroup column of the test images (available: none)"
    )
    assert result["champion_auc"] > result["auc"] + 0.05  # a trained model on new images, and an untrained one
    assert aliases(reproduced) == {"champion": "1", "challenger": "2"}
    row = next(line for line in output.splitlines() if line.startswith("test AUC not lower than that of"))
    assert " failed " in row
    page = (reproduced.folder / "reports/promotion.html").read_text()
    assert "Refused: " in page
    assert "test AUC not lower than that of the champion by more than 0.02, at 95 %" in page


def test_champion_uses_its_own_preprocessing(reproduced, monkeypatch, tmp_path):
    """Its scores are those of its package for the images in data/raw."""
    monkeypatch.chdir(reproduced.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    champion = resolve.load_classifier(resolve.find_model_files(f"models:/{NAME}/1"))
    rows = pd.read_parquet("data/manifest.parquet").query("split == 'test'")
    pixels = decode_to_memmap(rows, Path("data/raw"), tmp_path / "test.npy", **champion.input_config)
    test = predictions.read(Path("reports/predictions.parquet")).select_split("test")
    result = decision(reproduced)
    assert auc(test.labels, champion.predict_proba(pixels), test.task) == pytest.approx(result["champion_auc"])
    details = check_named(result, "not_inferior")["details"]
    assert details.startswith(f"difference {result['auc'] - result['champion_auc']:+.4f}")


def test_forced_promotion_needs_and_records_a_reason(reproduced):
    output = reproduced.run("fadeformer", "promote", "--force", check=False)
    assert reproduced.code == 1
    assert "promote: --reason is missing; describe why" in output
    output = reproduced.run("fadeformer", "promote", "--force", "--reason", "the old one cannot read DICOM")
    assert f"PROMOTED {NAME} version 2 is champion (FORCED: the old one cannot read DICOM; without force: " in output
    result = decision(reproduced)
    assert (result["decision"], result["forced"], result["ledger_entry"]) == ("promoted", True, 3)
    assert aliases(reproduced) == {"champion": "2", "previous": "1"}
    assert "FORCED: " in (reproduced.folder / "reports/promotion.html").read_text()
    client = MlflowClient(f"sqlite:///{reproduced.folder}/mlruns/mlflow.db")
    assert client.get_model_version(NAME, "2").tags["forced"].startswith("FORCED: the old one cannot read DICOM")


def test_rolled_back_model_is_not_promoted_again(reproduced):
    reason = "misses every lesion of the new scanner"
    output = reproduced.run("fadeformer", "promote", "--rollback", "--reason", reason)
    assert f"ROLLED BACK {NAME} version 1 is champion again; revoked: version 2 ({reason})" in output
    assert aliases(reproduced) == {"champion": "1"}
    reproduced.change(promote={"min_subgroup_auc": None, "min_class_auc": None, "margin": 1.0, "min_auc": 0.0})
    assert stages_run(reproduced.run("dvc", "repro")) == ["promote"]
    result = decision(reproduced)
    assert result["decision"] == "refused"
    assert result["reason"].endswith(f"1 failed; was never rolled back: rolled back: {reason}")
    assert aliases(reproduced) == {"champion": "1"}
    output = reproduced.run("fadeformer", "promote", "--rollback", "--reason", reason, check=False)
    assert reproduced.code == 1
    assert f"promote: {NAME} has no champion before version 1 to roll back to" in output


def test_history_lists_all_decisions(reproduced):
    output = reproduced.run("fadeformer", "registry", "history")
    for action in ("promoted", "refused", "forced", "rolled back"):
        assert action in output
    entries = [
        json.loads(line) for line in reproduced.run("fadeformer", "registry", "history", "--json").splitlines()[:-1]
    ]
    assert [entry["action"] for entry in entries] == ["promoted", "refused", "forced", "rolled back", "refused"]
    assert "5 decisions in" in output
    output = reproduced.run("fadeformer", "registry", "history", "--model", "unknown-model", check=False)
    assert reproduced.code == 1
    assert "no decision on unknown-model yet; run `dvc repro`" in output


def test_scores_that_are_no_numbers_are_refused(reproduced):
    path = reproduced.folder / "reports/predictions.parquet"
    table = pd.read_parquet(path)
    attributes = table.attrs
    table.loc[table["split"] == "test", "score_0"] = np.nan
    table.attrs = attributes
    table.to_parquet(path, index=False)
    output = reproduced.run("fadeformer", "promote")
    assert "every score is in [0, 1]: 40 images with invalid scores" in output
    assert decision(reproduced)["auc"] is None
