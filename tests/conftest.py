"""Shared fixtures: params.yaml with small values, copies of the project, servers, a browser, and real datasets."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

from fadeformer.config import schema
from fadeformer.config.schema import Params
from pipelines import server
from pipelines.config import overrides
from pipelines.stages import STAGES
from pipelines.tracking import store
from tests import CORES

# No deadline, because the speed of a machine is not tested. Fixed examples make failures reproducible.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "datasets"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALL_CORES = {
    "OMP_NUM_THREADS": str(CORES)
}  # for tests that compare bytes: the number of threads changes floating-point sums
# Overrides of params.yaml that make all stages fast.
SMALL_PARAMS = {
    "dataset": {"images": 200, "size": 16},
    "train": {"epochs": 6, "batch_size": 32, "device": "cpu"},
    "evaluate": {"figure_dpi": 50},
    "promote": {
        "min_auc": 0.0,
        "min_class_auc": None,
        "min_subgroup_auc": None,
        "max_ece": None,
        "min_sensitivity": None,
        "min_cases": 2,
        "class_margin": None,
        "recall_margin": None,
    },
}


# The slowest test files, slowest first, so that no worker starts one of them last.
SLOWEST = (
    "test_readme.py", "pipeline/test_cluster.py", "pipeline/test_deployment.py", "pipeline/test_resume.py",
    "pipeline/test_sweep.py", "containers/test_images.py", "pipeline/test_first_run.py", "pipeline/test_reproduce.py",
    "pipeline/test_real_data.py", "pipeline/test_promotion.py", "pipeline/test_errors.py", "pipeline/test_dicom.py",
    "test_server.py", "data/test_bad_data.py", "data/test_manifest.py", "test_benchmarks.py",
    "reporting/test_report.py",
)  # fmt: skip
# Markers by (direct or indirect) fixture.
MARKERS = {
    "prefect_server": "server", "started": "server", "cluster": "server", "browser": "browser", "built": "container",
    "real_data": "real_data",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add markers, and sort slow files first; the order in a file is kept."""
    for item in items:
        for fixture in MARKERS.keys() & set(item.fixturenames):
            item.add_marker(MARKERS[fixture])
    rank = {ROOT / "tests" / name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def config() -> Params:
    """Parsed params.yaml."""
    return schema.load_params(ROOT / "params.yaml")


@pytest.fixture
def small_params(tmp_path: Path) -> Path:
    """Path of a copy of params.yaml with `SMALL_PARAMS`."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    overrides.apply_overrides(path, SMALL_PARAMS)
    return path


@pytest.fixture
def without_data_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the pages of Great Expectations, which take most of the time of data validation."""
    monkeypatch.setattr("great_expectations.checkpoint.UpdateDataDocsAction.run", lambda *_, **__: {})


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """Folder with real datasets; without it the test is skipped, or fails if FADEFORMER_REAL_DATA is `required`."""
    if not REAL_DATA.is_dir():
        if os.environ.get("FADEFORMER_REAL_DATA") == "required":
            pytest.fail(f"{REAL_DATA} does not exist, but FADEFORMER_REAL_DATA requires it")
        pytest.skip("needs the real datasets next to this project")
    return REAL_DATA


@pytest.fixture(scope="module")
def interruptible() -> Iterator[None]:
    """Let child processes receive SIGINT, which is ignored if pytest runs in the background of a shell."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def in_background() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python in a new process group, which is killed at the end of the test."""
    processes = []

    def start(*arguments: str, cwd: Path, env: dict[str, str], **streams: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=env, text=True, start_new_session=True,
            **{"stdout": subprocess.PIPE, **streams},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow store in a temporary current directory, shared by a module: each test must use another model name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("store"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect()
        yield


def load_benchmark(name: str) -> ModuleType:
    """Import a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Project:
    """A copy of the project in a separate git repository, with a clean environment for its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.home = folder / "home"
        self.temporary = folder / "tmp"
        self.home.mkdir()
        self.temporary.mkdir()
        search = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
        self.environment = {
            "PATH": search, "HOME": str(self.home), "TMPDIR": str(self.temporary), "PWD": str(self.folder),
            "LANG": "C.UTF-8", "TERM": "dumb",
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
        }  # fmt: skip

    def run(self, *command: str, check: bool = True, timeout: float = 500, **environment: str) -> str:
        """Run a command in the project's folder and return its output; `code` is its exit status."""
        process = subprocess.run(
            command, cwd=self.folder, env={**self.environment, **environment}, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        self.code, output = process.returncode, process.stdout
        assert not check or self.code == 0, f"{' '.join(command)} exited with {self.code}:\n{output}"
        return output

    def change(self, **sections: object) -> None:
        """Change keys of params.yaml."""
        overrides.apply_overrides(self.folder / "params.yaml", sections)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "-m", message)

    def stages(self, *names: str) -> str:
        """Run stages (default: all) in one process without DVC; dvc.lock is not changed."""
        return self.run("python", "-m", "pipelines", *(names or STAGES), **ALL_CORES)

    def make(self, *arguments: str, **options: object) -> str:
        """Run make with the existing environment."""
        return self.run("make", "--old-file=.venv/installed", *arguments, **options)


def stages_run(output: str) -> list[str]:
    """Names of the stages in the output of `dvc repro`."""
    return re.findall(r"Running stage '(\w+)'", output)


def read_json_file(project: Project, name: str) -> Any:
    """Content of a JSON file of a project."""
    return json.loads((project.folder / name).read_text())


def list_project_files() -> list[str]:
    """List tracked and untracked files of the project, without ignored ones and dvc.lock."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in {*output.splitlines()} - {"dvc.lock"} if (ROOT / name).is_file())


def clone(folder: Path) -> Project:
    """Copy the project's files from the working tree to a new repository."""
    project = Project(folder)
    for name in list_project_files():
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project.folder / name)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "config", "user.name", "Test")
    project.run("git", "config", "user.email", "test@example.org")
    project.commit("initial commit")
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Copy of the project with small parameters, committed; shared by the tests of a module."""
    copy = clone(tmp_path_factory.mktemp("project"))
    copy.change(**SMALL_PARAMS)
    copy.commit("small parameters")
    return copy


class ReproducedProject:
    """Cache of a project after `make repro`, which the first module creates and later modules and sessions copy.

    Args:
        folder: Location of the cached project.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, FileLock(folder.with_suffix(".lock"))

    def restore_to(self, project: Project) -> None:
        """Bring a project to its state after `make repro`."""
        with self.lock:
            if self.folder.is_dir():
                shutil.rmtree(project.folder)
                shutil.copytree(self.folder, project.folder, symlinks=True)
            else:
                project.make("repro", **ALL_CORES)
                self.save(project)

    def save(self, project: Project) -> None:
        """Cache a reproduced project, unless there is one."""
        with self.lock:
            if not self.folder.is_dir():
                partial = self.folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed session
                shutil.copytree(project.folder, partial, symlinks=True)
                partial.rename(self.folder)


@pytest.fixture(scope="session")
def reproduced_project(pytestconfig: pytest.Config) -> ReproducedProject:
    """Reproduced project in pytest's cache, named after a digest of the project's files; others are removed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in list_project_files():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    folder = pytestconfig.cache.mkdir("reproduced") / digest.hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other.stem != folder.name:
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
    return ReproducedProject(folder)


@pytest.fixture(scope="module")
def reproduced(project: Project, reproduced_project: ReproducedProject) -> Project:
    """The project after `make repro`; tests of a module run in order and change it one after the other."""
    reproduced_project.restore_to(project)
    return project


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with playwright; without it the test is skipped, or fails if FADEFORMER_BROWSER is `required`."""
    if CHROMIUM is None:
        if os.environ.get("FADEFORMER_BROWSER") == "required":
            pytest.fail("Chromium is not installed, but FADEFORMER_BROWSER requires it")
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright  # not needed without a browser

    with sync_playwright() as driver:
        home = str(tmp_path_factory.mktemp("chromium"))  # otherwise Chromium leaves folders in the home folder
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"],
            env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
        )  # fmt: skip
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a shared Prefect server: starting one takes long, and most tests do not test that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with server.temporary_server() as url:
            patch.delenv("PREFECT_API_URL")  # tests set it for their project
            yield url


@pytest.fixture
def shared_server(project: Project, prefect_server: str) -> Iterator[None]:
    """Let the project use the shared Prefect server in one test."""
    project.environment["PREFECT_API_URL"] = prefect_server
    yield
    del project.environment["PREFECT_API_URL"]
