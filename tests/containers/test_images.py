"""MLflow's image, the small one: really built, run as the compose file runs it, and searched for what is nobody's."""

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
WAYS = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert")  # of pip's configuration


@dataclass
class Built:
    """An image and how it came to be.

    Attributes:
        project: the folder that it was built from.
        environment: in which buildah finds it.
        storage: where its layers lie, those of its first stage too.
        hidden: what lay about when it was built and must not be in it, by what it is.
    """

    project: Project
    environment: dict[str, str]
    storage: Path
    hidden: dict[str, str]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.project.folder, env={**self.environment, **environment}, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip

    def begin(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Runs the image, confined, with the machine's network."""
        return subprocess.Popen(
            ["docker/confined.sh", IMAGE, str(self.project.temporary), *words], cwd=self.project.folder,
            env={**self.environment, "NETWORK": "host", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def standing(self, *texts: str) -> set[str]:
        """Those of some texts that stand in any file of the storage, those of every layer among them."""
        command = ["grep", "--recursive", "--only-matching", "--no-filename", "--fixed-strings", "--text"]
        patterns = [f"--regexp={text}" for text in texts]
        found = subprocess.run([*command, *patterns, self.storage], capture_output=True, text=True, check=False)
        assert found.returncode < 2, found.stderr
        return set(found.stdout.splitlines())

    def inspect(self) -> dict[str, Any]:
        return json.loads(self.run("buildah", "inspect", "--type", "image", IMAGE).stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The image, on a base of Debian's packages; needs root and packages from Debian and PyPI."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in TOOLS if shutil.which(name, path=search) is None]
    if missing or os.geteuid() != 0:
        told = f"an image is built by root with {', '.join(TOOLS)}; missing: {', '.join(missing) or 'root'}"
        if os.environ.get("FADEFORMER_IMAGES") == "required":
            pytest.fail(told)
        pytest.skip(told)
    postgresql.require()
    project = clone(tmp_path_factory.mktemp("images"))
    folder = project.folder.parent
    storage, settings = folder / "storage", folder / "storage.conf"
    environment = {
        **os.environ, **project.environment, "PATH": f"{project.environment['PATH']}:/usr/sbin:/sbin",
        "BUILDAH_ISOLATION": "chroot", "CONTAINERS_STORAGE_CONF": str(settings),
    }  # fmt: skip
    hidden = {"the folder that it was built in": str(project.folder), "pip's settings": secrets.token_hex(16)}
    hidden |= lay_about(project)
    flags = pip_settings(folder / "pip.conf", hidden["pip's settings"])
    made = Built(project, environment, storage, hidden)
    for driver in ("overlay", "vfs"):  # the latter copies whole layers, and works wherever the former does not
        settings.write_text(f'[storage]\ndriver = "{driver}"\ngraphroot = "{storage}"\nrunroot = "{folder / "run"}"\n')
        if made.run("buildah", "info").returncode == 0:
            break
    try:
        for command in (
            ("docker/base.sh", BASE),
            ("make", "image-mlflow", "DOCKER=", f"BASE={BASE}", f"FLAGS={flags}"),  # by buildah, Docker or not
        ):
            done = made.run(*command)
            assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        yield made
    finally:
        made.run("buildah", "rm", "--all")
        shutil.rmtree(storage, ignore_errors=True)


def lay_about(project: Project) -> dict[str, str]:
    """Writes what lies about in a project that is used, and is in no image: what stands in it, by file."""
    said = {}
    for name in ("docker/.env", ".dvc/config.local", "mlruns/notes.txt", "data/own/patient.txt", ".git/note", "notes"):
        said[name] = secrets.token_hex(16)
        path = project.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {said[name]}\n")
    return said


def pip_settings(path: Path, secret: str) -> str:
    """Writes a file that tells a builder's pip where packages are, as this machine's knows; gives the flags for it."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    used = {name: known[name] for name in WAYS if not known.get(name, "file:").startswith("file:")}
    lines = [f"{name} = {value}" for name, value in used.items()]
    path.write_text("\n".join(["[global]", f"# {secret}", *lines, ""]))
    mounted = {str(path): "/etc/pip.conf"} | ({used["cert"]: used["cert"]} if "cert" in used else {})
    return " ".join(f"--volume {here}:{there}:ro" for here, there in mounted.items())


def test_its_user_is_not_root_and_its_health_is_asked_for(built):
    docker = built.inspect()["Docker"]["config"]
    assert docker["User"] == "10002:10002"
    assert docker["Entrypoint"][0] == "tini"
    assert "/health" in " ".join(docker["Healthcheck"]["Test"])


def test_it_is_small_and_cannot_install_or_compile(built):
    container = built.run("buildah", "from", IMAGE).stdout.strip()
    root = Path(built.run("buildah", "mount", container).stdout.strip())
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5000
    assert sum(path.stat().st_size for path in files) < 10**9
    assert not {"pip", "pip3", "gcc", "cc", "make", "curl", "wget"} & {path.name for path in files}
    assert not [path for path in files if "/var/lib/apt/lists/" in str(path) or "/.cache/" in str(path)]
    assert {path.name for path in (root / "opt" / "start").iterdir()} == {"credentials.py", "mlflow_start.py"}
    built.run("buildah", "rm", container)


def test_nothing_that_lay_about_is_noted(built):
    """What the storage notes of an image: its configuration and history."""
    told = json.dumps(built.inspect())
    assert "mlflow_start.py" in told
    assert not [what for what, text in built.hidden.items() if text in told]
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", told)


def test_it_refuses_without_credentials(built):
    process = built.begin()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert printed.startswith("MLflow does not start: MLFLOW_BACKEND_STORE_URI is missing")
    assert len(printed.splitlines()) == 1


@dataclass
class Served:
    """A server of the image on a PostgreSQL server, which runs.

    Attributes:
        process: what runs the image.
        address: of MLflow.
        passwords: by what they are for.
    """

    process: subprocess.Popen[str]
    address: str
    passwords: dict[str, str]

    def server(self) -> list[psutil.Process]:
        """The image's first process, and all below it."""
        (first,) = [one for one in psutil.Process(self.process.pid).children(recursive=True) if one.name() == "tini"]
        return [first, *first.children(recursive=True)]


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
        process = built.begin(
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
            for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                left.kill()
            process.communicate(timeout=60)
    finally:
        database.remove()


def test_it_serves_those_alone_who_have_a_password(served):
    runs, asked = f"{served.address}/api/2.0/mlflow/experiments/search", {"max_results": 1}
    assert status_of(runs, asked) == 401
    assert status_of(runs, asked, Authorization=basic_auth("trainer", "x" * 32)) == 401
    for user in ("trainer", "admin"):
        assert status_of(runs, asked, Authorization=basic_auth(user, served.passwords[user])) == 200


def test_it_runs_as_its_user_without_capabilities_on_a_root_that_cannot_be_written_to(served):
    processes = served.server()
    assert len(processes) >= 3
    for process in processes:
        status = (Path("/proc") / str(process.pid) / "status").read_text()
        status = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
        assert set(status["Uid"].split()) == {"10002"}
        assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [0, 0, 0]
        assert status["NoNewPrivs"] == "1"
        mounts = (Path("/proc") / str(process.pid) / "mountinfo").read_text().splitlines()
        roots = [options.split(",") for _, _, _, _, place, options, *_ in map(str.split, mounts) if place == "/"]
        assert "ro" in roots[-1]


def test_it_ends_and_its_storage_holds_no_secret(built, served):
    """Looks through the storage once for all, which takes its time."""
    first, *_ = served.server()
    first.terminate()
    served.process.wait(timeout=60)
    assert built.run("buildah", "containers", "--quiet").stdout == ""
    known = "PATIENCE = 60.0"  # a line of mlflow_start.py: what is there is found
    assert built.standing(known, *built.hidden.values(), *served.passwords.values()) == {known}
