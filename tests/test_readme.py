"""Every command of the README is run: here, or where the table says."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import ROOT, Project
from tests.pipeline.test_reproduce import ran

README = (ROOT / "README.md").read_text()
DEPLOYMENT = "tests/pipeline/test_deployment.py"
ELSEWHERE = {
    "git clone REPOSITORY fadeformer": "tests/conftest.py makes a copy of the project for every test of this kind",
    "cd fadeformer": "likewise",
    "make test": "CI",
    "make check": "CI",
    ". .venv/bin/activate": "commands of tests run with that folder in PATH",
    "dvc exp run -S dataset.name=bloodmnist -S dataset.mirror=/data/medmnist": "tests/pipeline/test_real_data.py",
    "dvc exp run -S dataset.name=npz -S dataset.root=data/own/scans.npz": "tests/pipeline/test_real_data.py",
    "dvc exp run -S dataset.name=folder -S dataset.root=data/own/scans.zip -S preprocess.image_size=64": (
        "tests/pipeline/test_real_data.py"
    ),
    "python -m pipelines.validate --fix": "tests/pipeline/test_errors.py",
    "python -m pipelines.download --names": "tests/pipeline/test_dicom.py",
    "python benchmarks/overhead.py": "tests/pipeline/test_reproduce.py",
    "python benchmarks/preprocess.py": "tests/test_benchmarks.py",
    "python benchmarks/gate.py": "tests/test_benchmarks.py",
    "python benchmarks/promotion.py": "tests/test_benchmarks.py",
    "fadeformer registry history": "tests/pipeline/test_promotion.py",
    'fadeformer promote --rollback --reason "misses lesions of the new scanner"': "tests/pipeline/test_promotion.py",
    'fadeformer promote --force --reason "the old one cannot read DICOM"': "tests/pipeline/test_promotion.py",
    "python benchmarks/input.py": "tests/test_benchmarks.py",
    "python benchmarks/training.py": "tests/test_benchmarks.py",
    "python benchmarks/kills.py": "tests/test_benchmarks.py",
    "python benchmarks/evaluation.py coverage": "tests/test_benchmarks.py",
    "python benchmarks/predict.py": "tests/test_benchmarks.py",
    "dvc exp run -S train.devices=2 -S train.precision=32": "tests/pipeline/test_resume.py",
    "dvc exp run -S model.fade.variant=diffusion": "tests/pipeline/test_reproduce.py",
    "dvc exp run -S model.backbone=resnet18 -S model.fade=null": "tests/pipeline/test_reproduce.py",
    "python benchmarks/fadenet.py layer": "tests/test_benchmarks.py",
    "make tables GRID=cpu DATA=../data JOBS=2": "tests/test_tables.py",
    "fadeformer serve models:/fadenet-phantom@champion --port 5001": "tests/test_commands.py",
    "fadeformer export models:/fadenet-phantom@champion --format onnx --out champion.onnx": "tests/test_commands.py",
    "fadeformer drift data/own/scans --model models:/fadenet-phantom@champion": DEPLOYMENT,
    "fadeformer sweep rates.yaml": "tests/pipeline/test_sweep.py",
    "prefect server start": DEPLOYMENT,
    "export PREFECT_API_URL=http://127.0.0.1:4200/api": DEPLOYMENT,
    "make deploy": DEPLOYMENT,
    "prefect worker start --pool local": DEPLOYMENT,
    "prefect deployment run pipeline/train --param 'train={\"epochs\": 1}' --watch": DEPLOYMENT,
}
PREDICT = "fadeformer predict data/own/scans --model models:/fadenet-phantom@champion --out predictions.csv"
HERE = {
    "make repro", "dvc exp run -S train.learning_rate=3e-4 -S train.epochs=5", "dvc exp show", "dvc metrics diff",
    "dvc plots show", "make ui", "make preset NAME=paper",
    "make preset NAME=retinamnist", "make help", "pre-commit install",
    PREDICT,
}  # fmt: skip


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def make(project: Project, *arguments: str, **options: object) -> str:
    """Runs make in a copy of the project, with the environment that is there already."""
    return project.run("make", "--old-file=.venv/installed", *arguments, **options)


def test_every_command_has_its_test():
    assert set(commands()) == HERE | ELSEWHERE.keys()
    deployment = (ROOT / "tests/pipeline/test_deployment.py").read_text()
    assert '\'train={"epochs": 1}\', "--watch"' in deployment


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_help_lists_every_target(project):
    listed = set(re.findall(r"^(\w+) ", make(project, "help"), flags=re.MULTILINE))
    assert listed == set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"repro", "test", "check", "ui", "help", "preset"} <= listed


@pytest.mark.pipeline
def test_make_repro_once_and_again(project):
    assert "promote: PROMOTED" in make(project, "repro")
    assert ran(make(project, "repro")) == []


@pytest.mark.pipeline
def test_what_a_run_leaves_is_there(project):
    table = README.split("What a run leaves:")[1].split("\n\n")[1]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(named) >= 10
    for name in named:
        folder = "reports" if name in ("results.json", "intervals.json", "subgroups.json") else "."
        assert (project.folder / folder / name).exists(), name


@pytest.mark.pipeline
def test_python_of_the_readme_runs_in_that_folder(project):
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        assert "the block ends" in project.run("python", "-c", f"{block}\nprint('the block ends')")


@pytest.mark.pipeline
@pytest.mark.usefixtures("shared_server")
def test_experiments_are_run_shown_and_compared(project):
    project.run("dvc", "exp", "run", "-S", "train.learning_rate=3e-4", "-S", "train.epochs=5")
    shown = project.run("dvc", "exp", "show", "--csv")
    assert "0.0003" in shown
    assert "test.overall.auc" in project.run("dvc", "metrics", "diff")
    assert "index.html" in project.run("dvc", "plots", "show")


@pytest.mark.pipeline
def test_images_are_predicted_by_the_champion(project):
    """As by the served model; in a command's place of `data/own/scans` there are images of test."""
    pixels = np.load(project.folder / "data" / "processed" / "test.npy")[:8]
    scans = project.folder / "data" / "own" / "scans"
    scans.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(scans / f"{number}.png")
    told = project.run(sys.executable, "-m", "pipelines.cli", *PREDICT.split()[1:])
    assert "8 images, 0 of them unreadable" in told
    found = pd.read_csv(project.folder / "predictions.csv")
    shutil.rmtree(scans)
    (project.folder / "predictions.csv").unlink()
    load = "import mlflow, numpy as np; mlflow.set_tracking_uri('sqlite:///mlruns/mlflow.db');"
    load += "model = mlflow.pyfunc.load_model('models:/fadenet-phantom@champion');"
    load += "table = model.predict(np.load('data/processed/test.npy')[:8]).filter(like='probability.');"
    load += "np.save('served.npy', table.to_numpy())"
    project.run("python", "-c", load)
    served = np.load(project.folder / "served.npy")
    assert found.iloc[:, 1:6].to_numpy() == pytest.approx(served, abs=0.02)  # float32, or the precision of training
    (project.folder / "served.npy").unlink()


@pytest.mark.pipeline
def test_the_ui_answers_on_this_machine_only(project):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["make", "--old-file=.venv/installed", "ui", f"PORT={port}"]
    log = project.folder.parent / "ui.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=project.folder, env=project.environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/version", timeout=5) as response:
                    assert response.status == 200
                break
            except (URLError, OSError):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        listening = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else ""
        assert f"00000000:{port:04X}" not in listening
        get = f"http://127.0.0.1:{port}/api/2.0/mlflow/registered-models/get?name=fadenet-phantom"
        with urlopen(get, timeout=30) as response:
            assert b'"champion"' in response.read()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.pipeline
def test_the_paper_preset_by_make(project):
    assert "params.yaml now holds the recipe paper" in make(project, "preset", "NAME=paper")
    assert "backbone: vit_base_patch16_224 " in (project.folder / "params.yaml").read_text()
    assert make(project, "preset", "NAME=papper", check=False).count("there are: paper, retinamnist") == 1
    project.run("git", "checkout", "params.yaml")


def test_pre_commit_is_set_up_and_runs_what_make_check_runs(project):
    assert "pre-commit installed" in project.run("pre-commit", "install")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff format", "ruff check", "mypy", "lint-imports"):
        assert f".venv/bin/{tool}" in hooks
        assert f"\t{tool}" in (ROOT / "Makefile").read_text()
