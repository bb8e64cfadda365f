"""What a model is made of and starts from is a matter of params.yaml: other networks, and weights of the user's own."""

import csv
import json
import shutil

import pytest
import torch

from tests.pipeline.test_reproduce import ran

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]


@pytest.fixture
def afterwards(reproduced):
    """Puts params.yaml back, whatever becomes of the test."""
    yield
    (reproduced.folder / "start.pth").unlink(missing_ok=True)
    reproduced.run("git", "checkout", "params.yaml")


@pytest.mark.usefixtures("afterwards")
def test_training_starts_from_weights_and_again_when_they_change(reproduced):
    start = reproduced.folder / "start.pth"
    shutil.copy(reproduced.folder / "models" / "best_model.pth", start)
    reproduced.change(model={"weights": "start.pth"}, train={"epochs": 1, "learning_rate": 1e-9})
    assert ran(reproduced.run("dvc", "repro")) == ["train", "evaluate", "promote"]
    before = torch.load(start, weights_only=True)
    after = torch.load(reproduced.folder / "models" / "best_model.pth", weights_only=True)
    torch.testing.assert_close(after["attn.qkv.weight"], before["attn.qkv.weight"], rtol=0, atol=1e-6)
    assert "from the weights of start.pth" in (reproduced.folder / "reports/model_card.md").read_text()
    torch.save({name: value * 0.9 if value.is_floating_point() else value for name, value in before.items()}, start)
    assert ran(reproduced.run("dvc", "repro", "train")) == ["train"]


@pytest.mark.usefixtures("afterwards")
def test_other_networks_go_the_same_way(reproduced):
    options = ("-S", "model.fade.variant=diffusion", "-S", "model.fade.after_blocks=[1,last]", "-S", "train.epochs=1")
    assert ran(reproduced.run("dvc", "exp", "run", *options)) == ["train", "evaluate", "promote"]
    decision = json.loads((reproduced.folder / "reports/promotion.json").read_text())["decision"]
    assert decision in ("promoted", "refused")


@pytest.mark.usefixtures("afterwards")
def test_and_beside_the_workspace_in_a_temporary_folder(reproduced):
    before = (reproduced.folder / "models/model.json").read_bytes()
    options = ("--temp", "--name", "beside", "-S", "model.backbone=resnet18", "-S", "model.fade=null")
    absolute = str(reproduced.folder / ".cache/dvc")
    reproduced.run("dvc", "exp", "run", *options, "-S", "train.epochs=1", DVC_SITE_CACHE_DIR=absolute)
    assert (reproduced.folder / "models/model.json").read_bytes() == before
    shown = csv.DictReader(reproduced.run("dvc", "exp", "show", "--csv").splitlines())
    (row,) = [row for row in shown if row["Experiment"] == "beside"]
    assert row["model.backbone"] == "resnet18"
    last = json.loads((reproduced.folder / "mlruns/ledger.jsonl").read_text().splitlines()[-2])
    assert last["kind"] == "decided"  # in the project's own ledger
