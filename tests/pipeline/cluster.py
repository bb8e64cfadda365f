"""A deployment on one machine without containers: the servers of docker/compose.yaml, and as many passwords.

PostgreSQL and an S3 server hold what MLflow's server and Prefect's keep. Two workers stand for two machines: each has a
folder, a home and a temporary folder of its own, and both share what machines of a deployment share, which is
`FADEFORMER_HOME` on a network drive, and a bare git repository for a git server. A third one, for the queue `default`,
can be added. `environment` is that of a person who deploys from a clone of the repository.
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

TIMEOUT = 300  # seconds until a server must answer
ARTIFACTS, RESULTS = "artifacts", "results"  # buckets: MLflow's files, and DVC's remote
QUIET = {
    "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip


class Cluster:
    """The servers, their credentials, and a project whose runs they carry.

    Attributes:
        project: clone of a person who deploys.
        repository: what runs are cloned from, and where their experiments go.
        home: what the workers share.
        prefect: address of Prefect's API.
        mlflow: address of MLflow's server.
        objects: address of the S3 server.
        secrets: every password and key, by what it is for.
        keys: of each bucket's user.
        environment: what a person needs to deploy and to ask.
    """

    def __init__(self, project: Project) -> None:
        """Makes folders and passwords; `running` starts what there is."""
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
        """Starts all servers, commits DVC's remote to the repository, deploys and starts two workers."""
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
            wait_until(lambda address=address: responds(address), TIMEOUT, self.tell)
        self.run("python", "-m", "pipelines.orchestration.deploy", "--concurrency", "2")
        for name in ("worker-1", "worker-2"):
            self.start_worker(name, "training")

    def run(self, *command: str, check: bool = True, timeout: float = 500) -> str:
        """Runs a command of a person in the project."""
        return self.project.run(*command, check=check, timeout=timeout, **self.environment)

    def start_worker(self, name: str, queue: str) -> None:
        """Starts a worker as on a machine of its own; as the documentation says, one for each GPU."""
        folder = self.folder / name
        environment = {**self.project.environment, **self.environment, **self.keys[RESULTS]}
        for variable in ("HOME", "TMPDIR", "PREFECT_HOME", "PWD"):
            place = folder / variable.lower()
            place.mkdir(parents=True, exist_ok=True)
            environment[variable] = str(place)
        environment["FADEFORMER_HOME"] = str(self.home)
        environment["PREFECT_CLIENT_RETRY_EXTRA_CODES"] = "500"  # as in docker/compose.yaml
        environment["PREFECT_WORKER_QUERY_SECONDS"] = "2"  # between two looks for a run, else 10
        options = ("--pool", "local", "--name", name, "--work-queue", queue, "--limit", "1")
        self._begin(name, "prefect", "worker", "start", *options, folder=folder / "pwd", environment=environment)

    def keep_to(self, name: str, cores: list[int]) -> None:
        """Gives a worker, and all that it starts from now on, these cores alone."""
        for thread in psutil.Process(self._running[name].pid).threads():
            os.sched_setaffinity(thread.id, cores)

    def kill_worker(self, name: str) -> None:
        """Kills it and all that it has started, as when its machine loses its power."""
        worker = psutil.Process(self._running.pop(name).pid)
        for process in (worker, *worker.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop_objects(self) -> None:
        self._tell_objects("stop")

    def start_objects(self) -> None:
        self._tell_objects("start")

    def close(self) -> None:
        """Ends all that was started, workers first: they have something to tell the servers."""
        for name in reversed(list(self._running)):
            process = self._running.pop(name)
            below = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # a worker that hangs when told so just after a run has ended
                process.kill()
                process.wait()
            for left in below:  # a stage in the middle of a run has a session of its own
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        self.postgresql.remove()

    def ask(self, what: str, **wanted: object) -> list[dict]:
        """All that Prefect's server has of a kind, such as flow_runs."""
        found: list[dict] = []
        while page := _ask(f"{self.prefect}/{what}/filter", self._prefect_login, {**wanted, "offset": len(found)}):
            found += page
        return found

    def ask_mlflow(self, path: str, body: object = None) -> dict:
        """What MLflow's server answers to its user `trainer`."""
        return _ask(f"{self.mlflow}/api/2.0/mlflow/{path}", f"trainer:{self.secrets['trainer']}", body)

    def bucket(self, name: str) -> dict[str, int]:
        """Sizes of a bucket's objects by name, read with the keys of its user."""
        pages = self.s3(name).get_paginator("list_objects_v2").paginate(Bucket=name)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", ())}

    def s3(self, bucket: str) -> object:
        keys = {name.lower(): value for name, value in self.keys[bucket].items()}
        return boto3.client("s3", endpoint_url=self.objects, region_name="us-east-1", **keys)

    def every_secret(self) -> dict[str, str]:
        """Each of them, by what it is for; logins also as HTTP has them."""
        logins = {"prefect": "admin", "admin": "admin", "trainer": "trainer"}
        encoded = {f"login {name}": basic_auth(user, self.secrets[name])[6:] for name, user in logins.items()}
        return {
            **self.secrets,
            **encoded,
            **{f"secret key of {name}": keys["AWS_SECRET_ACCESS_KEY"] for name, keys in self.keys.items()},
        }

    def log(self, name: str) -> str:
        """What a server or worker has printed."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def tell(self) -> str:
        """The ends of all logs, for a failure."""
        return "\n".join(f"=== {path.stem}\n{path.read_text(errors='replace')[-3000:]}" for path in self.logs.iterdir())

    def _start_objects(self) -> None:
        place = self.folder / "keys.json"
        words = (str(self._ports["objects"]), str(place), ARTIFACTS, RESULTS)
        with (self.logs / "objects.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.pipeline.objects", *words], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._running["objects"] = process
        assert process.stdout.readline().strip() == "start", self.log("objects")
        self.keys = json.loads(place.read_text())
        place.unlink()
        self.s3(RESULTS).create_bucket(Bucket=RESULTS)  # MLflow's start makes its own

    def _tell_objects(self, what: str) -> None:
        process = self._running["objects"]
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == what

    def _start_prefect(self) -> None:
        """As its container does, but on loopback."""
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
        words = ("--host", "127.0.0.1", "--port", str(self._ports["prefect"]))
        self._begin("prefect", "prefect", "server", "start", *words, folder=self.folder, environment=environment)

    def _start_mlflow(self) -> None:
        """As its image starts it."""
        environment = {
            **self.project.environment, **QUIET, **self.keys[ARTIFACTS],
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg://mlflow@127.0.0.1:{self.postgresql.port}/mlflow",
            "PGPASSWORD": self.secrets["mlflow database"],
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{ARTIFACTS}/files",
            "MLFLOW_S3_ENDPOINT_URL": self.objects,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes, which its image has no package for either
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets["admin"],
            "MLFLOW_TRAINER_PASSWORD": self.secrets["trainer"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets["signing"],
        }  # fmt: skip
        script, port = str(ROOT / "docker" / "mlflow_start.py"), str(self._ports["mlflow"])
        words = ("python", script, "--host", "127.0.0.1", "--port", port, "--workers", "1")
        self._begin("mlflow", *words, folder=self.folder, environment=environment)

    def _prepare_repository(self) -> None:
        """The address of DVC's remote is in git; where its server is on this machine, in the home of the workers."""
        self.project.run("dvc", "remote", "add", "--default", RESULTS, f"s3://{RESULTS}/dvc")
        self.project.commit("results go to an object store")
        self.project.run("dvc", "remote", "modify", "--local", RESULTS, "endpointurl", self.objects)
        settings = (self.project.folder / ".dvc" / "config.local").read_text()
        (self.home / ".dvc" / "config.local").write_text(settings)
        self.project.run("git", "clone", "--quiet", "--bare", str(self.project.folder), str(self.repository))
        self.project.run("git", "remote", "add", "origin", str(self.repository))

    def _begin(self, name: str, *command: str, folder: Path, environment: dict[str, str]) -> None:
        def heed_signals() -> None:  # a worker that is told to end sends itself one that a shell may have had ignored
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with (self.logs / f"{name}.log").open("a") as log:
            self._running[name] = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
                preexec_fn=heed_signals,
            )  # fmt: skip


@contextmanager
def running(project: Project) -> Iterator[Cluster]:
    """A cluster for the project, up while the block runs."""
    cluster = Cluster(project)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def _ask(url: str, login: str, body: object) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": basic_auth(*login.split(":"))}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data=data, headers=headers), timeout=60) as response:
        return json.load(response)


def basic_auth(user: str, password: str) -> str:
    """The header that shows a name and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def status_of(url: str, data: object = None, **headers: str) -> int:
    """With which status a server answers."""
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
    true: Callable[[], object], patience: float = TIMEOUT, tell: Callable[[], str] = str, pause: float = 0.3
) -> object:
    """Waits until something is true, and gives it; else fails with what there is to tell."""
    deadline = time.monotonic() + patience
    while not (value := true()):
        assert time.monotonic() < deadline, tell()
        time.sleep(pause)
    return value
