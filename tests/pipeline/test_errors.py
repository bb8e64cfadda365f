"""Each thing that goes wrong ends in one message, a non-zero exit, and nothing finished lost."""

import os
import re
import shutil

import numpy as np
import pytest

from pipelines import runner
from pipelines.stages import evaluate
from tests.conftest import Project, stages_run
from tests.postgresql import free_port

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("shared_server")]


@pytest.fixture(scope="module")
def weights(reproduced: Project) -> bytes:
    """The model that was trained before anything went wrong."""
    return (reproduced.folder / "models" / "best_model.pth").read_bytes()


@pytest.fixture
def stops(reproduced: Project, weights: bytes):
    """Runs a command that must fail at a stage, and gives that stage's message."""

    def run(stage: str, *command: str, **environment: str) -> str:
        output = reproduced.run(*(command or ("dvc", "repro")), check=False, timeout=120, **environment)
        assert reproduced.code != 0, output
        assert "Traceback" not in output
        messages = re.findall(rf"^{stage}: .*", output, flags=re.MULTILINE | re.DOTALL)
        assert len(messages) == 1, output
        return messages[0].split("\nERROR: failed to reproduce")[0]

    yield run
    reproduced.run("git", "checkout", "--quiet", "params.yaml")


@pytest.fixture
def archive(reproduced: Project):
    """Makes dataset.root an archive; arrays given by name replace those it would have."""

    def make(**arrays: np.ndarray):
        random = np.random.default_rng(0)
        made = {}
        for split, count in {"train": 60, "val": 20, "test": 30}.items():
            made[f"{split}_images"] = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
            made[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
        path = reproduced.folder.parent / "scans.npz"
        np.savez(path, **{**made, **arrays})
        reproduced.change(dataset={"name": "npz", "root": str(path)})
        return path, made

    return make


@pytest.fixture
def nobody() -> str:
    """An address at which nobody answers."""
    return f"http://127.0.0.1:{free_port()}"


def test_a_typo_stops_before_anything_runs(reproduced, stops, weights):
    path = reproduced.folder / "params.yaml"
    path.write_text(path.read_text().replace("learning_rate:", "lerning_rate:"))
    message = stops("check", "make", "--old-file=.venv/installed", "repro")
    assert "params.yaml: unknown key train.lerning_rate; did you mean train.learning_rate?" in message
    assert "params.yaml: key train.learning_rate is missing" in message
    assert (reproduced.folder / "models" / "best_model.pth").read_bytes() == weights


def test_a_full_disk(reproduced, stops):
    before = (reproduced.folder / "data" / "processed" / "train.npy").read_bytes()
    message = stops("preprocess", "bash", "-c", "ulimit -f 50; python -m pipelines preprocess")
    assert "File too large; free some space, then run again" in message
    assert (reproduced.folder / "data" / "processed" / "train.npy").read_bytes() == before
    # What was begun waits for the next run, out of sight of git and of DVC, and is gone when that has ended.
    assert len(list((reproduced.folder / "data").glob(".processed-*"))) == 1
    assert ".processed" not in reproduced.run("git", "status", "--short", "--untracked-files=all")
    reproduced.run("python", "-m", "pipelines", "preprocess")
    assert (reproduced.folder / "data" / "processed" / "train.npy").read_bytes() == before
    assert list((reproduced.folder / "data").glob(".processed-*")) == []


def test_a_model_that_is_not_there(reproduced, stops):
    models, away = reproduced.folder / "models", reproduced.folder.parent / "away"
    shutil.move(models, away)
    message = stops("evaluate", "python", "-m", "pipelines", "evaluate")
    shutil.move(away, models)
    assert "models/run.json: not found; run `dvc repro train` first" in message


def test_a_dead_mlflow_server(stops, nobody):
    message = stops("evaluate", "python", "-m", "pipelines", "evaluate", MLFLOW_TRACKING_URI=nobody)
    assert f"MLflow at {nobody} cannot be used; start it, or unset MLFLOW_TRACKING_URI" in message


def test_a_dead_prefect_server(reproduced, nobody, monkeypatch, capfd):
    monkeypatch.chdir(reproduced.folder)
    monkeypatch.setenv("PREFECT_API_URL", f"{nobody}/api")
    with pytest.raises(SystemExit) as ended:
        runner.run("evaluate", evaluate.main)
    assert ended.value.code == os.EX_TEMPFAIL
    message = capfd.readouterr().err
    assert message.startswith("\nevaluate: ")
    assert message.count("evaluate: ") == 1
    assert "Traceback" not in message
    assert f"PREFECT_API_URL is {nobody}/api, but no Prefect server answers there" in message


def test_no_network_for_pretrained_weights(reproduced, stops):
    reproduced.change(model={"backbone": "vit_tiny_patch16_224", "pretrained": True, "fade": None})
    message = stops("train", "python", "-m", "pipelines", "train", HF_HUB_OFFLINE="1")
    assert "cannot download the pretrained weights of vit_tiny_patch16_224" in message
    assert "set model.pretrained to false" in message


def test_an_archive_that_is_not_there(reproduced, stops, archive):
    path, _ = archive()
    path.unlink()
    output = reproduced.run("dvc", "repro", check=False)
    assert reproduced.code != 0
    assert f"failed to reproduce 'download': [Errno 2] No such file or directory: '{path}'" in output


def test_a_leak_stops_until_a_split_is_adopted(reproduced, stops, archive):
    _, made = archive()
    copied = made["test_images"].copy()
    copied[7] = made["train_images"][41]
    archive(test_images=copied)
    message = stops("validate")
    assert re.search(r"own-scans-\w{8}/train/41 ", message)
    assert re.search(r"own-scans-\w{8}/test/7 ", message)
    assert "validate.max_cross_split_duplicates: 1" in message
    assert "`python -m pipelines.stages.validate --fix` proposes a split without leaks" in message
    output = reproduced.run("python", "-m", "pipelines.stages.validate", "--fix")
    proposed = re.search(r"(data/adopted/proposed-\w+\.csv) moves (1|2) of 110 images", output)[1]
    assert not (reproduced.folder / "data/manifest.parquet").exists()
    reproduced.change(split={"adopted": proposed}, validate={"severity": {"same_image_two_labels": "warn"}})
    assert "expectations passed for 110 images" in reproduced.run("dvc", "repro", "validate")
    with (reproduced.folder / proposed).open("a") as file:
        file.write("nobody,train\n")
    assert "validate:" in reproduced.run("dvc", "status", "validate")  # the split is watched


def test_weights_that_do_not_fit(reproduced, stops):
    shutil.copy(reproduced.folder / "models" / "best_model.pth", reproduced.folder / "start.pth")
    diffusion = {"variant": "diffusion", "after_blocks": [1, "last"]}
    reproduced.change(model={"weights": "start.pth", "fade": diffusion})
    message = stops("train")
    assert "params.yaml: model.weights: start.pth: does not match the model; " in message
    assert 'Missing key(s) in state_dict: "blocks.0.block.' in message
    assert 'Unexpected key(s) in state_dict: "attn.alpha"' in message


def test_nothing_finished_was_lost(reproduced, weights):
    output = reproduced.run("dvc", "repro")
    assert not {"download", "validate", "preprocess", "train", "evaluate"} & set(stages_run(output))
    assert (reproduced.folder / "models" / "best_model.pth").read_bytes() == weights
