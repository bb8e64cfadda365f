"""A deployment on one machine without containers: the servers of docker/compose.yaml with their passwords.

MLflow and Prefect use a PostgreSQL and an S3 server. Two workers represent two machines: each has a separate working,
home and temporary folder; both share `FADEFORMER_HOME`, as on a network drive, and a bare git repository. More workers
can be added. `environment` is that of a user who deploys from a clone of the repository.
"""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import boto3
import psutil

from tests.conftest import ROOT, Project
from tests.postgresql import PostgreSQL, free_port

TIMEOUT = 300  # seconds until a server must respond
ARTIFACTS, RESULTS = "artifacts", "results"  # buckets: artifacts of MLflow, and remote of DVC
QUIET = {
    "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip


class Cluster:
    """Servers, workers and credentials of a deployment of a project.

    Attributes:
        project: Clone of the user who deploys.
        repository: Repository that runs are cloned from and push experiments to.
        home: `FADEFORMER_HOME` of the workers.
        prefect: URL of Prefect's API.
        mlflow: URL of the MLflow server.
        objects: URL of the S3 server.
        secrets: Passwords and keys by their use.
        keys: Keys of each bucket's user.
        environment: Environment of the user.
    """

    def __init__(self, project: Project) -> None:
        """Create folders and passwords; `start` starts the servers."""
        self.project, folder = project, project.folder.parent
        self.folder, self.repository, self.home = folder / "cluster", folder / "repository.git", folder / "shared"
        self.logs = self.folder / "logs"
        for path in (self.logs, self.home / ".dvc"):
            path.mkdir(parents=True)
        names = ("postgres", "mlflow database", "prefect database", "admin", "trainer", "signing", "prefect")
        self.secrets = {name: secrets.token_hex(16) for name in names}
        self.keys: dict[str, dict[str, str]] = {}
        self.postgresql = PostgreSQL(self.secrets["postgres"])
        self._ports = {name: free_port() for name in ("objects", "mlflow", "prefect")}
        self.prefect = f"http://127.0.0.1:{self._ports['prefect']}/api"
        self.mlflow, self.objects = (f"http://127.0.0.1:{self._ports[name]}" for name in ("mlflow", "objects"))
        self._prefect_login = f"admin:{self.secrets['prefect']}"
        self.environment = {
            **QUIET,
            "PREFECT_API_URL": self.prefect, "PREFECT_API_AUTH_STRING": self._prefect_login,
            "MLFLOW_TRACKING_URI": self.mlflow, "MLFLOW_TRACKING_USERNAME": "trainer",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["trainer"],
            "FADEFORMER_REPOSITORY": str(self.repository),
        }  # fmt: skip
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Start all servers, commit DVC's remote to the repository, deploy, and start two workers."""
        passwords = {
            "MLFLOW_DB_PASSWORD": self.secrets["mlflow database"],
            "PREFECT_DB_PASSWORD": self.secrets["prefect database"],
        }
        environment = {**self.postgresql.environment, **passwords}
        subprocess.run(["sh", ROOT / "docker" / "postgres-init.sh"], env=environment, check=True, timeout=60)
        self._start_objects()
        self._start_prefect()
        self._start_mlflow()
        self._prepare_repository()
        for address in (f"{self.prefect}/health", f"{self.mlflow}/health"):
            wait_until(lambda address=address: responds(address), TIMEOUT, self.describe)
        self.run("python", "-m", "pipelines.orchestration.deploy", "--concurrency", "2")
        for name in ("worker-1", "worker-2"):
            self.start_worker(name, "training")

    def run(self, *command: str, check: bool = True, timeout: float = 500) -> str:
        """Run a command of the user in the project."""
        return self.project.run(*command, check=check, timeout=timeout, **self.environment)

    def start_worker(self, name: str, queue: str) -> None:
        """Start a worker as on a separate machine."""
        folder = self.folder / name
        environment = {**self.project.environment, **self.environment, **self.keys[RESULTS]}
        for variable in ("HOME", "TMPDIR", "PREFECT_HOME", "PWD"):
            path = folder / variable.lower()
            path.mkdir(parents=True, exist_ok=True)
            environment[variable] = str(path)
        environment["FADEFORMER_HOME"] = str(self.home)
        environment["PREFECT_CLIENT_RETRY_EXTRA_CODES"] = "500"  # as in docker/compose.yaml
        environment["PREFECT_WORKER_QUERY_SECONDS"] = "2"  # polling interval; default: 10
        options = ("--pool", "local", "--name", name, "--work-queue", queue, "--limit", "1")
        self._begin(name, "prefect", "worker", "start", *options, folder=folder / "pwd", environment=environment)

    def set_cpu_affinity(self, name: str, cores: list[int]) -> None:
        """Restrict a worker and its future child processes to some cores."""
        for thread in psutil.Process(self._running[name].pid).threads():
            os.sched_setaffinity(thread.id, cores)

    def kill_worker(self, name: str) -> None:
        """Kill a worker and its descendants, as in a power failure."""
        worker = psutil.Process(self._running.pop(name).pid)
        for process in (worker, *worker.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop_objects(self) -> None:
        self._control_objects("stop")

    def start_objects(self) -> None:
        self._control_objects("start")

    def close(self) -> None:
        """Stop all processes; workers first, so that they can report to the servers."""
        for name in reversed(list(self._running)):
            process = self._running.pop(name)
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # a worker can hang if it is stopped just after a run
                process.kill()
                process.wait()
            for descendant in descendants:  # running stages have separate sessions
                with suppress(psutil.NoSuchProcess):
                    descendant.kill()
        self.postgresql.remove()

    def query_prefect(self, kind: str, **filters: object) -> list[dict]:
        """Read all objects of a kind, such as flow_runs, from the Prefect server."""
        objects: list[dict] = []
        while page := _request(
            f"{self.prefect}/{kind}/filter", self._prefect_login, {**filters, "offset": len(objects)}
        ):
            objects += page
        return objects

    def query_mlflow(self, path: str, body: object = None) -> dict:
        """Send a request of user `trainer` to the MLflow server."""
        return _request(f"{self.mlflow}/api/2.0/mlflow/{path}", f"trainer:{self.secrets['trainer']}", body)

    def bucket(self, name: str) -> dict[str, int]:
        """Return sizes of a bucket's objects by name, with the keys of its user."""
        pages = self.s3(name).get_paginator("list_objects_v2").paginate(Bucket=name)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}

    def s3(self, bucket: str) -> object:
        keys = {name.lower(): value for name, value in self.keys[bucket].items()}
        return boto3.client("s3", endpoint_url=self.objects, region_name="us-east-1", **keys)

    def all_secrets(self) -> dict[str, str]:
        """Return all secrets by their use; logins also as HTTP headers."""
        logins = {"prefect": "admin", "admin": "admin", "trainer": "trainer"}
        encoded = {f"login {name}": basic_auth(user, self.secrets[name])[6:] for name, user in logins.items()}
        return {
            **self.secrets,
            **encoded,
            **{f"secret key of {name}": keys["AWS_SECRET_ACCESS_KEY"] for name, keys in self.keys.items()},
        }

    def log(self, name: str) -> str:
        """Return the log of a server or worker."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def describe(self) -> str:
        """Return the last lines of all logs, for failure messages."""
        return "\n".join(f"=== {path.stem}\n{path.read_text(errors='replace')[-3000:]}" for path in self.logs.iterdir())

    def _start_objects(self) -> None:
        keys_file = self.folder / "keys.json"
        arguments = (str(self._ports["objects"]), str(keys_file), ARTIFACTS, RESULTS)
        with (self.logs / "objects.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.pipeline.objects", *arguments], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._running["objects"] = process
        assert process.stdout.readline().strip() == "start", self.log("objects")
        self.keys = json.loads(keys_file.read_text())
        keys_file.unlink()
        self.s3(RESULTS).create_bucket(Bucket=RESULTS)  # MLflow's entry point creates the other bucket

    def _control_objects(self, command: str) -> None:
        process = self._running["objects"]
        process.stdin.write(f"{command}\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == command

    def _start_prefect(self) -> None:
        """Start the server as in its container, but on loopback."""
        environment = {
            **self.project.environment, **QUIET, "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": self._prefect_login,
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.postgresql.port),
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
            "PREFECT_SERVER_DATABASE_USER": "prefect",
            "PREFECT_SERVER_DATABASE_PASSWORD": self.secrets["prefect database"],
        }  # fmt: skip
        options = ("--host", "127.0.0.1", "--port", str(self._ports["prefect"]))
        self._begin("prefect", "prefect", "server", "start", *options, folder=self.folder, environment=environment)

    def _start_mlflow(self) -> None:
        """Start the server with the entry point of its image."""
        environment = {
            **self.project.environment, **QUIET, **self.keys[ARTIFACTS],
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg://mlflow@127.0.0.1:{self.postgresql.port}/mlflow",
            "PGPASSWORD": self.secrets["mlflow database"],
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{ARTIFACTS}/files",
            "MLFLOW_S3_ENDPOINT_URL": self.objects,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as in its image; saves eight processes
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["admin"],
            "MLFLOW_TRAINER_PASSWORD": self.secrets["trainer"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["signing"],
        }  # fmt: skip
        script, port = str(ROOT / "docker" / "mlflow_start.py"), str(self._ports["mlflow"])
        command = ("python", script, "--host", "127.0.0.1", "--port", port, "--workers", "1")
        self._begin("mlflow", *command, folder=self.folder, environment=environment)

    def _prepare_repository(self) -> None:
        """Commit DVC's remote to git, and write the URL of its server to the home of the workers."""
        self.project.run("dvc", "remote", "add", "--default", RESULTS, f"s3://{RESULTS}/dvc")
        self.project.commit("store results in an object store")
        self.project.run("dvc", "remote", "modify", "--local", RESULTS, "endpointurl", self.objects)
        settings = (self.project.folder / ".dvc" / "config.local").read_text()
        (self.home / ".dvc" / "config.local").write_text(settings)
        self.project.run("git", "clone", "--quiet", "--bare", str(self.project.folder), str(self.repository))
        self.project.run("git", "remote", "add", "origin", str(self.repository))

    def _begin(self, name: str, *command: str, folder: Path, environment: dict[str, str]) -> None:
        def restore_sigint() -> None:  # a stopping worker sends itself SIGINT, which a shell may have set to be ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with (self.logs / f"{name}.log").open("a") as log:
            self._running[name] = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
                preexec_fn=restore_sigint,
            )  # fmt: skip


@contextmanager
def running(project: Project) -> Iterator[Cluster]:
    """Run a cluster for a project during a `with` block."""
    cluster = Cluster(project)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def _request(url: str, login: str, body: object) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": basic_auth(*login.split(":"))}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data=data, headers=headers), timeout=60) as response:
        return json.load(response)


def basic_auth(user: str, password: str) -> str:
    """Return the Authorization header for a user and password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def status_of(url: str, data: object = None, **headers: str) -> int:
    """Return the status code of a response."""
    body = None if data is None else json.dumps(data).encode()
    request = Request(url, data=body, headers={"Content-Type": "application/json", **headers})
    try:
        with urlopen(request, timeout=30) as response:
            return response.status
    except HTTPError as error:
        return error.code


def responds(url: str) -> bool:
    try:
        return status_of(url) == 200
    except (URLError, OSError):
        return False


def wait_until(
    condition: Callable[[], object],
    timeout: float = TIMEOUT,
    describe: Callable[[], str] = str,
    interval: float = 0.3,
) -> object:
    """Wait until a condition has a true value and return it; fail after the timeout with a description."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, describe()
        time.sleep(interval)
    return value
