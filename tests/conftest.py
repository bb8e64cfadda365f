"""Shared by all tests: the project's own params.yaml made small, copies of the project, and the real data beside it."""

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

# No deadline: how fast a machine is says nothing about the code. Always the same examples, so that a test fails or not.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("project")

ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "datasets"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVERY_CORE = {"OMP_NUM_THREADS": str(CORES)}  # where the same bytes are asked for, whichever thread comes first
# The shipped params.yaml, made small: every key that is not here keeps its value.
SMALL = {
    "dataset": {"images": 200, "size": 16},
    "train": {"epochs": 6, "batch_size": 32, "device": "cpu"},
    "evaluate": {"figure_dpi": 50},
    "promote": {
        "min_auc": 0.0,
        "min_class_auc": None,
        "min_subgroup_auc": None,
        "max_ece": None,
        "min_sensitivity": None,
    },
}


# Files whose tests take longest, longest first: a worker that started one of them last would keep the others waiting.
LONGEST = (
    "test_readme.py", "pipeline/test_cluster.py", "pipeline/test_deployment.py", "pipeline/test_resume.py",
    "pipeline/test_sweep.py", "containers/test_images.py", "pipeline/test_first_run.py", "pipeline/test_reproduce.py",
    "pipeline/test_real_data.py", "pipeline/test_promotion.py", "pipeline/test_errors.py", "pipeline/test_dicom.py",
    "test_server.py", "data/test_bad_data.py", "data/test_manifest.py", "test_benchmarks.py",
    "reporting/test_report.py",
)  # fmt: skip
# What a test needs, by the fixtures that it uses, directly or not.
MARKERS = {
    "prefect_server": "server", "started": "server", "cluster": "server", "browser": "browser", "built": "container",
    "real_data": "real_data",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, and put the files that take longest first; the tests of a file keep their order."""
    for item in items:
        for fixture in MARKERS.keys() & set(item.fixturenames):
            item.add_marker(MARKERS[fixture])
    rank = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def config() -> Params:
    """params.yaml as it is shipped."""
    return schema.load_params(ROOT / "params.yaml")


@pytest.fixture
def small_params(tmp_path: Path) -> Path:
    """A copy of params.yaml that makes every stage quick."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    overrides.apply_overrides(path, SMALL)
    return path


@pytest.fixture
def without_data_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data gate writes no pages of great-expectations, which take most of its time."""
    monkeypatch.setattr("great_expectations.checkpoint.UpdateDataDocsAction.run", lambda *_, **__: {})


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data sets; the test is skipped where there is none, and fails where CI says there must be."""
    if not REAL_DATA.is_dir():
        if os.environ.get("FADEFORMER_REAL_DATA") == "required":
            pytest.fail(f"{REAL_DATA} is not there, but FADEFORMER_REAL_DATA requires it")
        pytest.skip("the real data sets do not lie beside this project")
    return REAL_DATA


@pytest.fixture(scope="module")
def interruptible() -> Iterator[None]:
    """Processes that a test starts receive SIGINT, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_background() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python with arguments, in a process group of its own; what is left of it ends with the test."""
    running = []

    def start(*arguments: str, cwd: Path, env: dict[str, str], **streams: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=env, text=True, start_new_session=True,
            **{"stdout": subprocess.PIPE, **streams},
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An MLflow store of a module, in whose folder its tests run; each of them uses another model name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("store"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect()
        yield


def benchmark(name: str) -> ModuleType:
    """The module of a benchmark."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Project:
    """A copy of the project in its own git repository, whose commands run as a user's would."""

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
        """Runs a command in the project's folder and returns all it printed; `code` keeps its exit status."""
        done = subprocess.run(
            command, cwd=self.folder, env={**self.environment, **environment}, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        self.code = done.returncode
        assert not check or done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def change(self, **sections: object) -> None:
        """Changes keys of params.yaml."""
        overrides.apply_overrides(self.folder / "params.yaml", sections)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "-m", message)

    def stages(self, *names: str) -> str:
        """Run stages in one process, all by default, without DVC: dvc.lock stays as it is."""
        return self.run("python", "-m", "pipelines", *(names or STAGES), **EVERY_CORE)

    def make(self, *arguments: str, **options: object) -> str:
        """Runs make with the environment that is there already."""
        return self.run("make", "--old-file=.venv/installed", *arguments, **options)


def ran(output: str) -> list[str]:
    """Names of the stages that DVC ran."""
    return re.findall(r"Running stage '(\w+)'", output)


def read(project: Project, name: str) -> Any:
    """The content of a JSON file of a project."""
    return json.loads((project.folder / name).read_text())


def known() -> list[str]:
    """Tracked files of the project, and untracked ones that git does not ignore; without dvc.lock."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in {*listed} - {"dvc.lock"} if (ROOT / name).is_file())


def clone(folder: Path) -> Project:
    """Copies what git knows of the project, as it lies in the working tree, into a repository of its own."""
    project = Project(folder)
    for name in known():
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project.folder / name)
    project.run("git", "init", "--quiet", "--initial-branch=main")
    project.run("git", "config", "user.name", "Test")
    project.run("git", "config", "user.email", "test@example.org")
    project.commit("the project as it is")
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project with small params.yaml, committed; shared by the tests of a module."""
    copy = clone(tmp_path_factory.mktemp("project"))
    copy.change(**SMALL)
    copy.commit("small")
    return copy


class Kept:
    """A reproduced project: the first module that needs one makes it, later modules and sessions copy it.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, FileLock(folder.with_suffix(".lock"))

    def give(self, project: Project) -> None:
        """Brings a project to where it is after one `make repro`."""
        with self.lock:
            if self.folder.is_dir():
                shutil.rmtree(project.folder)
                shutil.copytree(self.folder, project.folder, symlinks=True)
            else:
                project.make("repro", **EVERY_CORE)
                self.take(project)

    def take(self, project: Project) -> None:
        """Keeps a copy of a project that was reproduced, if none is kept yet."""
        with self.lock:
            if not self.folder.is_dir():
                begun = self.folder.with_suffix(".begun")
                shutil.rmtree(begun, ignore_errors=True)  # of a session that was killed
                shutil.copytree(project.folder, begun, symlinks=True)
                begun.rename(self.folder)


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config) -> Kept:
    """In pytest's cache, under a digest of the project's files; those of other digests are removed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in known():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    folder = pytestconfig.cache.mkdir("reproduced") / digest.hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other.stem != folder.name:
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)
    return Kept(folder)


@pytest.fixture(scope="module")
def reproduced(project: Project, kept: Kept) -> Project:
    """The same after one `make repro`; its tests run in their order, each from where the one before left it."""
    kept.give(project)
    return project


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, driven by playwright; the test is skipped where there is none, and fails where CI asks for one."""
    if CHROMIUM is None:
        if os.environ.get("FADEFORMER_BROWSER") == "required":
            pytest.fail("no Chromium on this machine, and FADEFORMER_BROWSER asks for one")
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright  # only where there is a browser

    with sync_playwright() as driver:
        kept = str(tmp_path_factory.mktemp("chromium"))  # else it leaves folders in the user's home
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"],
            env={**os.environ, "HOME": kept, "XDG_CONFIG_HOME": kept, "XDG_CACHE_HOME": kept},
        )  # fmt: skip
        yield started
        started.close()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server for tests that are not about how a project starts and ends its own, which takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with server.temporary_server() as url:
            patch.delenv("PREFECT_API_URL")  # the tests that use it set it for their project
            yield url


@pytest.fixture
def shared_server(project: Project, prefect_server: str) -> Iterator[None]:
    """The flows of the project run on that server, for one test."""
    project.environment["PREFECT_API_URL"] = prefect_server
    yield
    del project.environment["PREFECT_API_URL"]
