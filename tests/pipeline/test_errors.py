"""Errors of the pipeline: one message, a non-zero exit status, and no loss of finished results."""

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
    """Weights before the errors."""
    return (reproduced.folder / "models" / "best_model.pth").read_bytes()


@pytest.fixture
def error_of(reproduced: Project, weights: bytes):
    """Runs a command that must fail in a stage, and returns the message of that stage."""

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
    """Sets dataset.root to an .npz file; keyword arguments replace its arrays."""

    def create(**arrays: np.ndarray):
        rng = np.random.default_rng(0)
        defaults = {}
        for split, count in {"train": 60, "val": 20, "test": 30}.items():
            defaults[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
            defaults[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
        path = reproduced.folder.parent / "scans.npz"
        np.savez(path, **{**defaults, **arrays})
        reproduced.change(dataset={"name": "npz", "root": str(path)})
        return path, defaults

    return create


@pytest.fixture
def unreachable_url() -> str:
    """URL without a server."""
    return f"http://127.0.0.1:{free_port()}"


def test_unknown_key_stops_before_the_first_stage(reproduced, error_of, weights):
    path = reproduced.folder / "params.yaml"
    path.write_text(path.read_text().replace("learning_rate:", "lerning_rate:"))
    message = error_of("check", "make", "--old-file=.venv/installed", "repro")
    assert "params.yaml: unknown key train.lerning_rate; did you mean train.learning_rate?" in message
    assert "params.yaml: key train.learning_rate is missing" in message
    assert (reproduced.folder / "models" / "best_model.pth").read_bytes() == weights


def test_full_disk_keeps_previous_outputs(reproduced, error_of):
    expected = (reproduced.folder / "data" / "processed" / "train.npy").read_bytes()
    message = error_of("preprocess", "bash", "-c", "ulimit -f 50; python -m pipelines preprocess")
    assert "File too large; free some space, then run again" in message
    assert (reproduced.folder / "data" / "processed" / "train.npy").read_bytes() == expected
    # The partial output is kept for the next run, ignored by git and DVC, and removed when that has finished.
    assert len(list((reproduced.folder / "data").glob(".processed-*"))) == 1
    assert ".processed" not in reproduced.run("git", "status", "--short", "--untracked-files=all")
    reproduced.run("python", "-m", "pipelines", "preprocess")
    assert (reproduced.folder / "data" / "processed" / "train.npy").read_bytes() == expected
    assert list((reproduced.folder / "data").glob(".processed-*")) == []


def test_missing_model_is_reported(reproduced, error_of):
    models, moved = reproduced.folder / "models", reproduced.folder.parent / "moved"
    shutil.move(models, moved)
    message = error_of("evaluate", "python", "-m", "pipelines", "evaluate")
    shutil.move(moved, models)
    assert "models/run.json: not found; run `dvc repro train` first" in message


def test_unreachable_mlflow_is_reported(error_of, unreachable_url):
    message = error_of("evaluate", "python", "-m", "pipelines", "evaluate", MLFLOW_TRACKING_URI=unreachable_url)
    assert f"MLflow at {unreachable_url} cannot be used; start it, or unset MLFLOW_TRACKING_URI" in message


def test_unreachable_prefect_is_reported(reproduced, unreachable_url, monkeypatch, capfd):
    monkeypatch.chdir(reproduced.folder)
    monkeypatch.setenv("PREFECT_API_URL", f"{unreachable_url}/api")
    with pytest.raises(SystemExit) as error:
        runner.run("evaluate", evaluate.main)
    assert error.value.code == os.EX_TEMPFAIL
    message = capfd.readouterr().err
    assert message.startswith("\nevaluate: ")
    assert message.count("evaluate: ") == 1
    assert "Traceback" not in message
    assert f"PREFECT_API_URL is {unreachable_url}/api, but no Prefect server answers there" in message


def test_missing_pretrained_weights_are_reported(reproduced, error_of):
    reproduced.change(model={"backbone": "vit_tiny_patch16_224", "pretrained": True, "fade": None})
    message = error_of("train", "python", "-m", "pipelines", "train", HF_HUB_OFFLINE="1")
    assert "cannot download the pretrained weights of vit_tiny_patch16_224" in message
    assert "set model.pretrained to false" in message


def test_missing_archive_is_reported(reproduced, error_of, archive):
    path, _ = archive()
    path.unlink()
    output = reproduced.run("dvc", "repro", check=False)
    assert reproduced.code != 0
    assert f"failed to reproduce 'download': [Errno 2] No such file or directory: '{path}'" in output


def test_leak_is_fixed_by_the_proposed_split(reproduced, error_of, archive):
    _, arrays = archive()
    test_images = arrays["test_images"].copy()
    test_images[7] = arrays["train_images"][41]
    archive(test_images=test_images)
    message = error_of("validate")
    assert re.search(r"own-scans-\w{8}/train/41 ", message)
    assert re.search(r"own-scans-\w{8}/test/7 ", message)
    assert "validate.max_cross_split_duplicates: 1" in message
    assert "`python -m pipelines.stages.validate --fix` proposes a split without leakage" in message
    output = reproduced.run("python", "-m", "pipelines.stages.validate", "--fix")
    proposed = re.search(r"(data/adopted/proposed-\w+\.csv) moves (1|2) of 110 images", output)[1]
    assert not (reproduced.folder / "data/manifest.parquet").exists()
    reproduced.change(split={"adopted": proposed}, validate={"severity": {"same_image_two_labels": "warn"}})
    assert "expectations passed for 110 images" in reproduced.run("dvc", "repro", "validate")
    with (reproduced.folder / proposed).open("a") as file:
        file.write("unknown,train\n")
    assert "validate:" in reproduced.run("dvc", "status", "validate")  # DVC tracks the split file


def test_mismatched_weights_are_reported(reproduced, error_of):
    shutil.copy(reproduced.folder / "models" / "best_model.pth", reproduced.folder / "start.pth")
    diffusion = {"variant": "diffusion", "after_blocks": [1, "last"]}
    reproduced.change(model={"weights": "start.pth", "fade": diffusion})
    message = error_of("train")
    assert "params.yaml: model.weights: start.pth: does not match the model; " in message
    assert 'Missing key(s) in state_dict: "blocks.0.block.' in message
    assert 'Unexpected key(s) in state_dict: "attn.alpha"' in message


def test_finished_results_are_kept(reproduced, weights):
    output = reproduced.run("dvc", "repro")
    assert not {"download", "validate", "preprocess", "train", "evaluate"} & set(stages_run(output))
    assert (reproduced.folder / "models" / "best_model.pth").read_bytes() == weights
