"""The commands and the Python of the README, run one after the other in one project, as a newcomer would."""

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
# Of `make tables`. Its first cell is the run of `make repro`, which DVC has in its cache; the second is trained.
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
PORTS = {"5000": free_port(), "5001": free_port()}  # those of the README may be taken
# What is added to a command, or replaces a part of it, so that it takes seconds instead of minutes or hours.
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
# Commands that go on until they are stopped, and where they answer.
SERVERS = {
    "make ui": f"http://127.0.0.1:{PORTS['5000']}/version",
    "fadeformer serve models:/fadenet-phantom@champion --port 5001": f"http://127.0.0.1:{PORTS['5001']}/ping",
}
PROMOTION = "tests/pipeline/test_promotion.py"  # runs these commands, and asserts more of what they print
# Commands that are not run here, why, and what shows that this is still so.
NOT_RUN = {
    "make test": ("CI runs it, and these tests after it", lambda: "make test" in ci()),
    "make test-all": ("these tests are a part of it", lambda: {"make test", "make test-integration"} <= set(ci())),
    "make check": ("takes minutes, and CI runs it before all tests", lambda: ci().index("make check") == 0),
    "fadeformer sweep rates.yaml": (
        "another test runs it, interrupts it and runs it again",
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
# Commands that end with another status than 0 here, and their message.
FAILING = {
    "dvc exp run -S dataset.name=bloodmnist -S dataset.mirror=/data/medmnist": (
        "/data/medmnist/bloodmnist.npz: no such file"
    ),
    "fadeformer drift data/own/scans --model models:/fadenet-phantom@champion": "drift: DRIFT of ",
}
PRINTED = {
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
    """The make commands of CI."""
    return [line for line in text(".ci/run").splitlines() if line.startswith("make ")]


def text(name: str) -> str:
    """Content of a file of the project."""
    return (ROOT / name).read_text()


class Session:
    """A shell in an empty folder next to the repository that is cloned.

    Args:
        project: the repository, with what its first run left (tests/pipeline/test_first_run.py).
    """

    def __init__(self, project: Project) -> None:
        self.project, self.base = project, project.folder.parents[1]
        self.folder = self.base / "fadeformer"
        self.state: list[str] = []  # lines that change the shell itself, and count for all that follow
        self.log = self.base / "log"

    def start(self, command: str) -> subprocess.Popen[str]:
        lines = "\n".join(["set -e", *self.state, command])
        with self.log.open("w") as file:
            return subprocess.Popen(
                ["bash", "-c", lines], cwd=self.base, env=self.project.environment, text=True, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and all that was printed."""
        status = self.start(command).wait(500)
        return status, self.log.read_text()

    def serve(self, command: str, address: str) -> None:
        """Start a server, wait until it answers, and stop it."""
        process = self.start(command)
        try:
            wait_until(lambda: responds(address) or process.poll() is not None, tell=self.log.read_text)
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
    project.commit("small")
    project.run("git", "config", "--global", "user.name", "Test")
    project.run("git", "config", "--global", "user.email", "test@example.org")
    project.environment["PREFECT_API_URL"] = prefect_server
    reproduced_project.restore_to(project)
    return Session(project)


def prepare(step: str, session: Session) -> None:
    """Put into the cloned project what a step needs and a newcomer would have."""
    folder = session.folder
    if step == "make repro":  # from the outputs and the environment that are there already
        shutil.rmtree(folder)
        shutil.copytree(session.project.folder, folder, symlinks=True)
        (folder / ".venv").mkdir()
        for path in set(Path(sys.prefix).iterdir()) - {Path(sys.prefix) / "installed"}:
            (folder / ".venv" / path.name).symlink_to(path)
        (folder / ".venv/installed").touch()
        own_data(folder)
    elif step.startswith("make tables"):
        (folder / "tiny.yaml").write_text(GRID)
        (session.base / "data").mkdir()


def own_data(folder: Path) -> None:
    """Images of the user's own: a folder to predict, a zip of two classes, an archive in MedMNIST's layout."""
    scans, random = folder / "data/own/scans", np.random.default_rng(0)
    scans.mkdir(parents=True)
    for number, image in enumerate(np.load(folder / "data/processed/test.npy")):
        Image.fromarray(image).save(scans / f"{number}.png")
    with zipfile.ZipFile(folder / "data/own/scans.zip", "w") as archive:
        for number in range(60):
            with archive.open(f"{'ab'[number % 2]}/{number}.png", "w") as file:
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    arrays = {}
    for split, count in {"train": 60, "val": 20, "test": 30}.items():
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3)[:, None]
    np.savez(folder / "data/own/scans.npz", **arrays)


def shortened(step: str) -> str:
    """The step, of small values and at ports that are free."""
    before, after = SHORTER.get(step, ("", ""))
    command = step.replace(before, after, 1)
    for port, free in PORTS.items():
        command = command.replace(port, str(free))
    if step.startswith("make tables"):  # the server has no deployments; the second time, all cells are finished
        return f"unset PREFECT_API_URL; {command} && {command} && grep 'Table 3' docs/reference/tables.md"
    return command


@pytest.mark.pipeline
@pytest.mark.parametrize("step", STEPS)
def test_step(session, step):
    """One command, or one block of Python; the steps run in the order of the README."""
    if step in NOT_RUN:
        reason, holds = NOT_RUN[step]
        assert holds(), f"`{step}` is not run because: {reason}"
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
        assert PRINTED.get(step, "") in output


def test_every_exception_is_a_step_of_the_readme():
    assert len(STEPS) > 30
    assert len(PYTHON) == 2
    for steps in (SHORTER, SERVERS, NOT_RUN, FAILING, PRINTED):
        assert steps.keys() <= set(STEPS)


def test_the_search_space_is_valid(tmp_path, config):
    (block,) = re.findall(r"```yaml\n(trials.*?)```", README, flags=re.DOTALL)
    (tmp_path / "rates.yaml").write_text(block)
    assert space.load_sweep_config(tmp_path / "rates.yaml", config).trials == 20


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):.*##", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"^([\w-]+) ", listed, flags=re.MULTILINE)) == targets
    assert {"repro", "test", "test-integration", "test-all", "check", "ui", "help", "preset"} <= targets


def test_pre_commit_runs_what_make_check_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff format", "ruff check", "mypy", "lint-imports"):
        assert f".venv/bin/{tool}" in hooks
        assert f"\t{tool}" in (ROOT / "Makefile").read_text()
