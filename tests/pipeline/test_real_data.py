"""`dvc exp run` on real images: the official RetinaMNIST by its flag, a rebuilt PneumoniaMNIST as a user's own file."""

import json

import pytest

from tests.conftest import Project
from tests.pipeline.test_reproduce import ran

pytestmark = [pytest.mark.pipeline, pytest.mark.real_data]
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
