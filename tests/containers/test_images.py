"""The MLflow image, the small one: built, run as in the compose file, and searched for secrets."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import postgresql
from tests.conftest import Project, clone
from tests.pipeline.cluster import basic_auth, responds, status_of, wait_until
from tests.postgresql import PostgreSQL, free_port

pytestmark = pytest.mark.timeout(1200)
BASE, IMAGE = "localhost/python:3.11-bookworm", "localhost/fadeformer-mlflow:latest"
TOOLS = ("buildah", "debootstrap", "unshare", "setpriv")
PIP_OPTIONS = (
    "index-url",
    "extra-index-url",
    "trusted-host",
    "proxy",
    "cert",
)  # copied from this machine's pip configuration


@dataclass
class Built:
    """A built image.

    Attributes:
        project: Project that it was built from.
        environment: Environment for buildah.
        storage: Folder with the layers of all stages.
        secrets: Texts that existed in the project during the build and must not be in the image, by their origin.
    """

    project: Project
    environment: dict[str, str]
    storage: Path
    secrets: dict[str, str]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.project.folder, env={**self.environment, **environment}, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the image with docker/confined.sh and the machine's network."""
        return subprocess.Popen(
            ["docker/confined.sh", IMAGE, str(self.project.temporary), *arguments], cwd=self.project.folder,
            env={**self.environment, "NETWORK": "host", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def search(self, *texts: str) -> set[str]:
        """Return the texts that occur in any file of the storage, which contains all layers."""
        command = ["grep", "--recursive", "--only-matching", "--no-filename", "--fixed-strings", "--text"]
        patterns = [f"--regexp={text}" for text in texts]
        process = subprocess.run([*command, *patterns, self.storage], capture_output=True, text=True, check=False)
        assert process.returncode < 2, process.stderr
        return set(process.stdout.splitlines())

    def inspect(self) -> dict[str, Any]:
        return json.loads(self.run("buildah", "inspect", "--type", "image", IMAGE).stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The image, with a base from Debian packages; needs root, and packages from Debian and PyPI."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in TOOLS if shutil.which(name, path=search) is None]
    if missing or os.geteuid() != 0:
        reason = f"building an image needs root and {', '.join(TOOLS)}; missing: {', '.join(missing) or 'root'}"
        if os.environ.get("FADEFORMER_IMAGES") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    postgresql.require()
    project = clone(tmp_path_factory.mktemp("images"))
    folder = project.folder.parent
    storage, settings = folder / "storage", folder / "storage.conf"
    environment = {
        **os.environ, **project.environment, "PATH": f"{project.environment['PATH']}:/usr/sbin:/sbin",
        "BUILDAH_ISOLATION": "chroot", "CONTAINERS_STORAGE_CONF": str(settings),
    }  # fmt: skip
    texts = {"build folder": str(project.folder), "pip configuration": secrets.token_hex(16)}
    texts |= write_secrets(project)
    flags = pip_flags(folder / "pip.conf", texts["pip configuration"])
    image = Built(project, environment, storage, texts)
    for driver in ("overlay", "vfs"):  # vfs copies complete layers; it works where overlay is not supported
        settings.write_text(f'[storage]\ndriver = "{driver}"\ngraphroot = "{storage}"\nrunroot = "{folder / "run"}"\n')
        if image.run("buildah", "info").returncode == 0:
            break
    try:
        for command in (
            ("docker/base.sh", BASE),
            (
                "make",
                "image-mlflow",
                "DOCKER=",
                f"BASE={BASE}",
                f"FLAGS={flags}",
            ),  # with buildah, even if Docker is installed
        ):
            process = image.run(*command)
            assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
        yield image
    finally:
        image.run("buildah", "rm", "--all")
        shutil.rmtree(storage, ignore_errors=True)


def write_secrets(project: Project) -> dict[str, str]:
    """Write files of a used project that must not be in an image; return their content by file."""
    texts = {}
    for name in ("docker/.env", ".dvc/config.local", "mlruns/notes.txt", "data/own/patient.txt", ".git/note", "notes"):
        texts[name] = secrets.token_hex(16)
        path = project.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {texts[name]}\n")
    return texts


def pip_flags(path: Path, secret: str) -> str:
    """Write this machine's package indexes to a pip configuration; return the build flags that mount it."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", output, re.MULTILINE))
    used = {name: settings[name] for name in PIP_OPTIONS if not settings.get(name, "file:").startswith("file:")}
    lines = [f"{name} = {value}" for name, value in used.items()]
    path.write_text("\n".join(["[global]", f"# {secret}", *lines, ""]))
    mounts = {str(path): "/etc/pip.conf"} | ({used["cert"]: used["cert"]} if "cert" in used else {})
    return " ".join(f"--volume {source}:{target}:ro" for source, target in mounts.items())


def test_image_has_a_user_and_health_check(built):
    docker = built.inspect()["Docker"]["config"]
    assert docker["User"] == "10002:10002"
    assert docker["Entrypoint"][0] == "tini"
    assert "/health" in " ".join(docker["Healthcheck"]["Test"])


def test_image_is_small_without_build_tools(built):
    container = built.run("buildah", "from", IMAGE).stdout.strip()
    root = Path(built.run("buildah", "mount", container).stdout.strip())
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5000
    assert sum(path.stat().st_size for path in files) < 10**9
    assert not {"pip", "pip3", "gcc", "cc", "make", "curl", "wget"} & {path.name for path in files}
    assert not [path for path in files if "/var/lib/apt/lists/" in str(path) or "/.cache/" in str(path)]
    assert {path.name for path in (root / "opt" / "start").iterdir()} == {"credentials.py", "mlflow_start.py"}
    built.run("buildah", "rm", container)


def test_image_configuration_contains_no_secrets(built):
    """The configuration contains the build history."""
    configuration = json.dumps(built.inspect())
    assert "mlflow_start.py" in configuration
    assert not [origin for origin, text in built.secrets.items() if text in configuration]
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", configuration)


def test_image_does_not_start_without_credentials(built):
    process = built.start()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.startswith("MLflow does not start: MLFLOW_BACKEND_STORE_URI is missing")
    assert len(output.splitlines()) == 1


@dataclass
class Served:
    """A running server from the image, with a PostgreSQL server.

    Attributes:
        process: Process that runs the image.
        address: URL of MLflow.
        passwords: Passwords by their use.
    """

    process: subprocess.Popen[str]
    address: str
    passwords: dict[str, str]

    def server_processes(self) -> list[psutil.Process]:
        """The first process of the image and its descendants."""
        descendants = psutil.Process(self.process.pid).children(recursive=True)
        (init,) = [process for process in descendants if process.name() == "tini"]
        return [init, *init.children(recursive=True)]


@pytest.fixture(scope="module")
def served(built: Built) -> Iterator[Served]:
    names = ("postgres", "MLflow's database", "Prefect's database", "admin", "trainer", "signing")
    passwords = {name: secrets.token_hex(16) for name in names}
    database, port = PostgreSQL(passwords["postgres"]), free_port()
    owners = {
        "MLFLOW_DB_PASSWORD": passwords["MLflow's database"], "PREFECT_DB_PASSWORD": passwords["Prefect's database"],
    }  # fmt: skip
    try:
        script = ["sh", str(built.project.folder / "docker" / "postgres-init.sh")]
        subprocess.run(script, env={**database.environment, **owners}, check=True, timeout=60)
        process = built.start(
            "--port", str(port), "--workers", "1",
            MLFLOW_BACKEND_STORE_URI=f"postgresql+psycopg://mlflow@127.0.0.1:{database.port}/mlflow",
            PGPASSWORD=passwords["MLflow's database"], MLFLOW_ARTIFACTS_DESTINATION="/tmp/files",
            MLFLOW_AUTH_ADMIN_PASSWORD=passwords["admin"], MLFLOW_TRAINER_PASSWORD=passwords["trainer"],
            MLFLOW_FLASK_SERVER_SECRET_KEY=passwords["signing"],
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: responds(f"{address}/health") or process.poll() is not None)
            assert process.poll() is None, process.communicate()[0]
            yield Served(process, address, passwords)
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                child.kill()
            process.communicate(timeout=60)
    finally:
        database.remove()


def test_server_requires_a_password(served):
    url, query = f"{served.address}/api/2.0/mlflow/experiments/search", {"max_results": 1}
    assert status_of(url, query) == 401
    assert status_of(url, query, Authorization=basic_auth("trainer", "x" * 32)) == 401
    for user in ("trainer", "admin"):
        assert status_of(url, query, Authorization=basic_auth(user, served.passwords[user])) == 200


def test_server_is_unprivileged_with_read_only_root(served):
    processes = served.server_processes()
    assert len(processes) >= 3
    for process in processes:
        status = (Path("/proc") / str(process.pid) / "status").read_text()
        status = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
        assert set(status["Uid"].split()) == {"10002"}
        assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0]
        assert status["NoNewPrivs"] == "1"
        mounts = (Path("/proc") / str(process.pid) / "mountinfo").read_text().splitlines()
        roots = [options.split(",") for _, _, _, _, target, options, *_ in map(str.split, mounts) if target == "/"]
        assert "ro" in roots[-1]


def test_stopped_server_leaves_no_secrets_in_storage(built, served):
    first, *_ = served.server_processes()
    first.terminate()
    served.process.wait(timeout=60)
    assert built.run("buildah", "containers", "--quiet").stdout == ""
    control = "OBJECT_STORE_TIMEOUT = 60.0"  # a line of mlflow_start.py: shows that the search works
    assert built.search(control, *built.secrets.values(), *served.passwords.values()) == {control}
