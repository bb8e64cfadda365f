"""The pipeline on real images: official RetinaMNIST, rebuilt PneumoniaMNIST, and a sample of NIH's radiographs."""

import json

import numpy as np
import pytest

from fadeformer.data.sources.chestxray14 import BOX_LIST
from fadeformer.evaluation import predictions
from tests.conftest import Project, read_json_file, stages_run
from tests.data.sources.test_chestxray14 import SAMPLE_BOXES

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]


def test_retinamnist_runs_from_a_mirror(project: Project, real_data):
    project.change(
        dataset={"name": "retinamnist", "mirror": f"{real_data}/medmnist", "size": 28},
        preprocess={"image_size": 16}, train={"epochs": 1},
    )  # fmt: skip
    output = project.stages()
    decision = read_json_file(project, "reports/promotion.json")
    assert decision["model"] == "fadenet-retinamnist"
    assert f"promote: {decision['decision'].upper()} fadenet-retinamnist version 1" in output
    meta = read_json_file(project, "data/processed/meta.json")
    assert meta["counts"] == {"train": 1080, "val": 120, "test": 400}
    numbers = read_json_file(project, "reports/metrics.json")["test"]["overall"]
    test = predictions.read(project.folder / "reports/predictions.parquet").select_split("test")
    accuracy = (test.scores.argmax(axis=1) == test.labels[:, 0]).mean()  # the evaluator knows no decision weights
    official = f"[AUC]{numbers['auc']:.3f}_[ACC]{accuracy:.3f}"
    (result,) = (project.folder / "reports/medmnist").glob("retinamnist_test_*.csv")
    assert result.name == f"retinamnist_test_{official}@42.csv"
    assert len(result.read_text().splitlines()) == 400
    project.run("git", "checkout", "params.yaml")


def test_pneumoniamnist_leaks_stop_unless_allowed(project: Project, real_data):
    project.change(dataset={"name": "npz", "root": f"{real_data}/npz/pneumoniamnist.npz"})
    output = project.run("dvc", "repro", check=False)
    assert project.code != 0
    assert stages_run(output) == ["download", "validate"]
    assert "8 images are in two splits" in output
    assert "validate.max_cross_split_duplicates: 8" in output
    project.change(validate={"max_cross_split_duplicates": 8})
    assert "validate:" in project.run("dvc", "status", "validate")
    output = project.stages("validate")
    assert "RELAXED by validate.max_cross_split_duplicates: 8: 8 images are in two splits" in output
    project.run("git", "checkout", "params.yaml")


def test_chestxray14_is_evaluated_by_finding(project: Project, real_data, tmp_path):
    for path in (real_data / "chestxray14").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / BOX_LIST).write_text(SAMPLE_BOXES)
    project.change(
        dataset={"name": "chestxray14", "mirror": str(tmp_path), "edition": "other", "archives": [1]},
        preprocess={"image_size": 16}, train={"epochs": 1},
    )  # fmt: skip
    project.stages()
    meta, metrics = read_json_file(project, "data/processed/meta.json"), read_json_file(project, "reports/metrics.json")
    card = (project.folder / "reports/model_card.md").read_text()
    assert meta["counts"]["test"] == 251
    assert meta["split"].startswith("chestxray14-")
    assert (project.folder / "data/splits" / meta["split"]).is_file()
    assert read_json_file(project, "reports/results.json")["test_balanced_accuracy"]["split"] == meta["split"]
    assert f"| Split | {meta['split']} |" in card
    assert (project.folder / "dataset.lock").is_file()
    assert read_json_file(project, "reports/promotion.json")["model"] == "fadenet-chestxray14"
    aucs = {name: values["auc"] for name, values in metrics["test"]["per_class"].items()}
    without = [name for name, auc in aucs.items() if auc is None]
    assert len(aucs) == 14
    assert without  # because the sample is small
    frame = predictions.read(project.folder / "reports/predictions.parquet").select_split("test").frame
    patients = [frame.loc[frame[f"label_{c}"] == 1, "group"].nunique() for c in range(14)]
    left_out = [name for name, count in zip(aucs, patients, strict=True) if count < 2]
    averaged = [auc for name, auc in aucs.items() if name not in left_out]
    assert metrics["test"]["overall"]["auc"] == pytest.approx(np.mean(averaged))
    assert f"Left out of means, fewer than two patients with or without it: {', '.join(left_out)}." in card
    expectations = read_json_file(project, "reports/validation/validation.json")["expectations"]
    warned = [expectation["description"] for expectation in expectations if not expectation["passed"]]
    assert all(any(f" {name} (it has 0)" in description for description in warned) for name in without)
    assert "NaN" not in json.dumps(metrics)
    pointing = read_json_file(project, "reports/explanations.json")["pointing"]
    assert (pointing["cases"], pointing["images"]) == (2, 2)  # of nine boxes in the sample
    assert set(pointing["methods"]) == {"grad_cam", "attention", "laplacian"}
    assert set(pointing["methods"]["attention"]["per_class"]) == {"Atelectasis", "Infiltration"}
    assert (
        "hand-drawn boxes (Zhang et al. 2018): 2 findings in 2 test images"
        in (project.folder / "reports/index.html").read_text()
    )
