"""Commands and Python code of the README, run in order in one project, as a new user would."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.experiments import space
from tests.conftest import ROOT, SMALL_PARAMS, Project, ReproducedProject, clone
from tests.pipeline.cluster import responds, wait_until
from tests.postgresql import free_port

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, flags=re.DOTALL)
STEPS = [step for kind, text in BLOCKS for step in (text.splitlines() if kind == "sh" else [text])]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# Grid for `make tables`. Its first cell is the run of `make repro`, from DVC's cache; the second is trained.
GRID = """\
preset: null
reference: fadenet
seeds: [42]
common: {}
datasets:
  phantom: {title: Phantom, accuracy: accuracy, params: {}}
models:
  fadenet: {title: FadeNet, params: {}}
  vit: {title: plain, params: {model: {fade: null}, train: {epochs: 1}}}
"""
PORTS = {"5000": free_port(), "5001": free_port()}  # the ports in the README may be in use
# Replacements in commands, so that they take seconds instead of minutes or hours.
SHORTER = {
    "git clone REPOSITORY fadeformer": ("REPOSITORY", "source/project"),
    "make ui": ("ui", f"ui PORT={PORTS['5000']}"),
    "dvc exp run -S train.learning_rate=3e-4 -S train.epochs=5": ("epochs=5", "epochs=1"),
    "dvc exp run -S model.fade.variant=diffusion": ("run", "run train -S train.epochs=1"),
    "dvc exp run -S model.backbone=resnet18 -S model.fade=null": ("run", "run train -S train.epochs=1"),
    "dvc exp run -S dataset.name=folder -S dataset.root=data/own/scans.zip -S preprocess.image_size=64": (
        "run", "run preprocess",
    ),
    "dvc exp run -S dataset.name=bloodmnist -S dataset.mirror=/data/medmnist": ("run", "run -S dataset.size=28"),
    "dvc exp run -S dataset.name=npz -S dataset.root=data/own/scans.npz": ("run", "run preprocess"),
    "make tables GRID=cpu DATA=../data JOBS=2": ("GRID=cpu", "GRID=tiny.yaml"),
}  # fmt: skip
# Commands that run until they are stopped, and a URL where they respond.
SERVERS = {
    "make ui": f"http://127.0.0.1:{PORTS['5000']}/version",
    "fadeformer serve models:/fadenet-phantom@champion --port 5001": f"http://127.0.0.1:{PORTS['5001']}/ping",
}
PROMOTION = "tests/pipeline/test_promotion.py"  # runs these commands and checks more of their output
# Commands that are not run here, the reason, and a check that the reason still holds.
NOT_RUN = {
    "make test": ("CI runs it before these tests", lambda: "make test" in ci()),
    "make test-all": ("it includes these tests", lambda: {"make test", "make test-integration"} <= set(ci())),
    "make check": ("takes minutes, and CI runs it before all tests", lambda: ci().index("make check") == 0),
    "fadeformer sweep rates.yaml": (
        "another test runs, interrupts and resumes it",
        lambda: '["fadeformer", "sweep", "rates.yaml"]' in text("tests/pipeline/test_sweep.py"),
    ),
    "fadeformer registry history": (PROMOTION, lambda: '"registry", "history")' in text(PROMOTION)),
    'fadeformer promote --rollback --reason "misses lesions of the new scanner"': (
        PROMOTION,
        lambda: '"promote", "--rollback", "--reason"' in text(PROMOTION),
    ),
    'fadeformer promote --force --reason "the old one cannot read DICOM"': (
        PROMOTION,
        lambda: '"promote", "--force", "--reason", "the old one cannot read DICOM"' in text(PROMOTION),
    ),
}
# Commands that fail here, and their message.
FAILING = {
    "dvc exp run -S dataset.name=bloodmnist -S dataset.mirror=/data/medmnist": (
        "/data/medmnist/bloodmnist.npz: no such file"
    ),
    "fadeformer drift data/own/scans --model models:/fadenet-phantom@champion": "drift: NOT ASSESSED: ",
}
EXPECTED_OUTPUT = {
    "make repro": "params.yaml is valid",
    "dvc exp show": "Experiment",
    "dvc metrics diff": "test.overall.auc",
    "dvc plots show": "index.html",
    "make preset NAME=paper": "params.yaml now has preset paper",
    "make preset NAME=retinamnist": "params.yaml now has preset retinamnist",
    "python -m pipelines.stages.validate --fix": "nothing to propose",
    "fadeformer predict data/own/scans --model models:/fadenet-phantom@champion --out predictions.csv": (
        "40 images, 0 of them unreadable"
    ),
    "make help": "test-integration",
    "make tables GRID=cpu DATA=../data JOBS=2": "phantom/vit/42: finished earlier",
    "pre-commit install": "pre-commit installed",
}


def ci() -> list[str]:
    """Make commands in .ci/run."""
    return [line for line in text(".ci/run").splitlines() if line.startswith("make ")]


def text(name: str) -> str:
    """Content of a project file."""
    return (ROOT / name).read_text()


class Session:
    """A shell in an empty folder next to the repository to clone.

    Args:
        project: The repository, after its first run.
    """

    def __init__(self, project: Project) -> None:
        self.project, self.base = project, project.folder.parents[1]
        self.folder = self.base / "fadeformer"
        self.state: list[str] = []  # commands that change the state of the shell, repeated before each further command
        self.log = self.base / "log"

    def start(self, command: str) -> subprocess.Popen[str]:
        lines = "\n".join(["set -e", *self.state, command])
        with self.log.open("w") as file:
            return subprocess.Popen(
                ["bash", "-c", lines], cwd=self.base, env=self.project.environment, text=True, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        """Run a command; return its exit status and output."""
        status = self.start(command).wait(500)
        return status, self.log.read_text()

    def serve(self, command: str, address: str) -> None:
        """Start a server, wait until it responds, and stop it."""
        process = self.start(command)
        try:
            wait_until(lambda: responds(address) or process.poll() is not None, describe=self.log.read_text)
            assert process.poll() is None, self.log.read_text()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def session(
    tmp_path_factory: pytest.TempPathFactory, reproduced_project: ReproducedProject, prefect_server: str
) -> Session:
    source = tmp_path_factory.mktemp("readme") / "source"
    source.mkdir()
    project = clone(source)
    project.change(**SMALL_PARAMS)
    project.commit("small parameters")
    project.run("git", "config", "--global", "user.name", "Test")
    project.run("git", "config", "--global", "user.email", "test@example.org")
    project.environment["PREFECT_API_URL"] = prefect_server
    reproduced_project.restore_to(project)
    return Session(project)


def prepare(step: str, session: Session) -> None:
    """Add the files that a step needs and a user would have."""
    folder = session.folder
    if step == "make repro":  # with existing outputs and environment
        shutil.rmtree(folder)
        shutil.copytree(session.project.folder, folder, symlinks=True)
        (folder / ".venv").mkdir()
        for path in set(Path(sys.prefix).iterdir()) - {Path(sys.prefix) / "installed"}:
            (folder / ".venv" / path.name).symlink_to(path)
        (folder / ".venv/installed").touch()
        write_user_data(folder)
    elif step.startswith("make tables"):
        (folder / "tiny.yaml").write_text(GRID)
        (session.base / "data").mkdir()


def write_user_data(folder: Path) -> None:
    """Write a user's images: a folder to predict, a zip of two classes, and an .npz file in MedMNIST's layout."""
    scans, rng = folder / "data/own/scans", np.random.default_rng(0)
    scans.mkdir(parents=True)
    for number, image in enumerate(np.load(folder / "data/processed/test.npy")):
        Image.fromarray(image).save(scans / f"{number}.png")
    with zipfile.ZipFile(folder / "data/own/scans.zip", "w") as archive:
        for number in range(60):
            with archive.open(f"{'ab'[number % 2]}/{number}.png", "w") as file:
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    arrays = {}
    for split, count in {"train": 60, "val": 20, "test": 30}.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
    np.savez(folder / "data/own/scans.npz", **arrays)


def shortened(step: str) -> str:
    """The step with small values and free ports."""
    old, new = SHORTER.get(step, ("", ""))
    command = step.replace(old, new, 1)
    for port, free in PORTS.items():
        command = command.replace(port, str(free))
    if step.startswith("make tables"):  # the server has no deployments; the second time, all cells are finished
        return f"unset PREFECT_API_URL; {command} && {command} && grep 'Table 3' docs/reference/tables.md"
    return command


@pytest.mark.pipeline
@pytest.mark.parametrize("step", STEPS)
def test_readme_step_works(session, step):
    """A command, or a block of Python; steps run in the order of the README."""
    if step in NOT_RUN:
        reason, holds = NOT_RUN[step]
        assert holds(), f"`{step}` is not run here, but the reason is out of date: {reason}"
        return
    if session.state:
        session.run("git checkout --quiet params.yaml")
    prepare(step, session)
    command = shortened(step)
    if step in PYTHON:
        command = f"python - <<'END'\n{step}END"
    elif step.startswith(("cd ", "export ", ". ")):
        session.state.append(command)
    if step in SERVERS:
        session.serve(command, SERVERS[step])
        return
    status, output = session.run("true" if command in session.state else command)
    if step in FAILING:
        assert status != 0
        assert FAILING[step] in output
        assert "Traceback" not in output
    else:
        assert status == 0, output
        assert EXPECTED_OUTPUT.get(step, "") in output


def test_all_exceptions_are_readme_steps():
    assert len(STEPS) > 30
    assert len(PYTHON) == 2
    for steps in (SHORTER, SERVERS, NOT_RUN, FAILING, EXPECTED_OUTPUT):
        assert steps.keys() <= set(STEPS)


def test_search_space_is_valid(tmp_path, config):
    (block,) = re.findall(r"```yaml\n(trials.*?)```", README, flags=re.DOTALL)
    (tmp_path / "rates.yaml").write_text(block)
    assert space.load_sweep_config(tmp_path / "rates.yaml", config).trials == 20


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_exist(link):
    assert (ROOT / link).exists()


def test_help_lists_every_target():
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):.*##", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"^([\w-]+) ", output, flags=re.MULTILINE)) == targets
    assert {"repro", "test", "test-integration", "test-all", "check", "ui", "help", "preset"} <= targets


def test_pre_commit_runs_the_checks_of_make():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff format", "ruff check", "mypy", "lint-imports"):
        assert f".venv/bin/{tool}" in hooks
        assert f"\t{tool}" in (ROOT / "Makefile").read_text()
