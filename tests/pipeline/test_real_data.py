"""`dvc exp run` on real images: the official RetinaMNIST by its flag, a rebuilt PneumoniaMNIST as a user's own file."""

import json

import pytest

from fadeformer.datasets.chestxray14 import BOXES
from tests.conftest import Project
from tests.datasets.test_chestxray14 import OF_THE_SAMPLE
from tests.pipeline.test_reproduce import ran

pytestmark = [pytest.mark.pipeline, pytest.mark.real_data, pytest.mark.usefixtures("shared_server")]
QUICK = ("-S", "train.epochs=1")


def test_retinamnist_from_a_mirror_runs_to_a_decision(project: Project, real_data):
    output = project.run(
        "dvc", "exp", "run", *QUICK, "-S", "dataset.name=retinamnist", "-S", f"dataset.mirror={real_data}/medmnist",
        "-S", "dataset.size=28",
    )  # fmt: skip
    decision = json.loads((project.folder / "reports/promotion.json").read_text())
    assert decision["model"] == "fadenet-retinamnist"
    assert f"promote: {decision['decision'].upper()} fadenet-retinamnist version 1" in output
    meta = json.loads((project.folder / "data/processed/meta.json").read_text())
    assert meta["counts"] == {"train": 1080, "val": 120, "test": 400}
    assert "retinamnist" in project.run("dvc", "exp", "show", "--csv")
    numbers = json.loads((project.folder / "reports/metrics.json").read_text())["test"]["overall"]
    official = f"[AUC]{numbers['auc']:.3f}_[ACC]{numbers['accuracy']:.3f}"
    (result,) = (project.folder / "reports/medmnist").glob("retinamnist_test_*.csv")
    assert result.name == f"retinamnist_test_{official}@42.csv"
    assert len(result.read_text().splitlines()) == 400


def test_the_leaks_of_pneumoniamnist_stop_it_until_they_are_allowed(project: Project, real_data):
    archive = ("-S", "dataset.name=npz", "-S", f"dataset.root={real_data}/npz/pneumoniamnist.npz")
    output = project.run("dvc", "exp", "run", *QUICK, *archive, check=False)
    assert project.code != 0
    assert ran(output) == ["download", "validate"]
    assert "8 images stand in two splits" in output
    assert "validate.max_cross_split_duplicates: 8" in output
    output = project.run("dvc", "exp", "run", *QUICK, *archive, "-S", "validate.max_cross_split_duplicates=8")
    assert "RELAXED by validate.max_cross_split_duplicates: 8: 8 images stand in two splits" in output
    decision = json.loads((project.folder / "reports/promotion.json").read_text())
    assert decision["model"] == "fadenet-own-pneumoniamnist"
    assert decision["aliases"]
    assert decision["cross_split_duplicates"] == 8
    assert "**8 images stand in two splits**" in (project.folder / "reports/model_card.md").read_text()


def run(project: Project, **dataset: str) -> dict:
    """A run on a real set at 28 pixels, one epoch; what came of it."""
    settings = {"preprocess.image_size": "28", "train.epochs": "1", **{f"dataset.{k}": v for k, v in dataset.items()}}
    options = [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]
    output = project.run("dvc", "exp", "run", *options)
    read = {
        name: json.loads((project.folder / path).read_text())
        for name, path in {
            "meta": "data/processed/meta.json", "validation": "reports/validation/validation.json",
            "decision": "reports/promotion.json", "metrics": "reports/metrics.json",
            "results": "reports/results.json",
        }.items()
    }  # fmt: skip
    return {**read, "output": output, "card": (project.folder / "reports/model_card.md").read_text()}


def test_the_radiographs_of_nih_by_finding(project: Project, real_data, tmp_path):
    for path in (real_data / "chestxray14").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / BOXES).write_text(OF_THE_SAMPLE)
    made = run(project, name="chestxray14", mirror=str(tmp_path), edition="other", archives="[1]")
    assert made["meta"]["counts"]["test"] == 251
    assert made["meta"]["split"].startswith("chestxray14-")
    assert made["decision"]["model"] == "fadenet-chestxray14"
    judged = {name: values["auc"] for name, values in made["metrics"]["test"]["per_class"].items()}
    without = [name for name, auc in judged.items() if auc is None]
    assert len(judged) == 14
    assert without  # in so small a sample
    assert made["metrics"]["test"]["overall"]["auc"] == pytest.approx(
        sum(a for a in judged.values() if a) / (14 - len(without))
    )
    assert f"Not judged, for want of positives or negatives: {', '.join(without)}." in made["card"]
    warned = [e["sentence"] for e in made["validation"]["expectations"] if not e["passed"]]
    assert all(any(f" {name} (it has 0)" in sentence for sentence in warned) for name in without)
    assert "NaN" not in json.dumps(made["metrics"])
    found = json.loads((project.folder / "reports/explanations.json").read_text())["pointing"]
    assert (found["cases"], found["images"]) == (2, 2)  # of the nine boxes of the sample
    assert set(found["methods"]) == {"grad_cam", "attention", "laplacian"}
    assert set(found["methods"]["attention"]["per_class"]) == {"Atelectasis", "Infiltration"}
    assert "Where people drew boxes: 2 findings in 2 test images" in (project.folder / "reports/index.html").read_text()


def test_the_lesions_of_isic_and_the_split_that_their_balanced_accuracy_is_of(project: Project, real_data):
    made = run(project, name="isic2019", mirror=f"{real_data}/isic2019", edition="other")
    split = made["meta"]["split"]
    assert (project.folder / "data/splits" / split).is_file()
    assert made["results"]["test_balanced_accuracy"]["split"] == split
    assert f"on the split {split}; figures" in made["output"]
    assert f"| Split | {split} |" in made["card"]
    assert made["meta"]["counts"] == {"train": 7011, "val": 1001, "test": 2003}
    assert made["validation"]["passed"]
    assert (project.folder / "dataset.lock").is_file()


def test_mednist_in_folders_of_classes(project: Project, real_data):
    made = run(project, name="folder", root=f"{real_data}/mednist/mednist.zip")
    assert sum(made["meta"]["counts"].values()) == 1800
    assert made["decision"]["model"] == "fadenet-own-mednist"
    assert made["metrics"]["test"]["overall"]["auc"] > 0.5
