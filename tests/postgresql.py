"""Temporary PostgreSQL server from the Debian package: on loopback, with a password, can be stopped and restarted."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require() -> None:
    """Skip the test without PostgreSQL, or fail if FADEFORMER_POSTGRESQL is `required`."""
    if not PROGRAMS:
        if os.environ.get("FADEFORMER_POSTGRESQL") == "required":
            pytest.fail("PostgreSQL is not installed, but FADEFORMER_POSTGRESQL requires it")
        pytest.skip("needs PostgreSQL (apt-get install postgresql)")


class PostgreSQL:
    """A running server with the administrator `postgres`.

    Args:
        password: Password of the administrator.
    """

    def __init__(self, password: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="fadeformer-postgresql-", dir="/tmp"))
        self.log = self.folder / "log"
        self._user = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "postgres", "postgres")
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        self.environment = {
            "PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGPASSWORD": password, "PATH": os.environ["PATH"],
        }  # fmt: skip
        with tempfile.NamedTemporaryFile("w", dir=self.folder) as file:
            file.write(password)
            file.flush()
            if self._user:
                shutil.chown(file.name, "postgres")
            options = ("--auth=scram-sha-256", f"--pwfile={file.name}", "--username=postgres", "--no-sync")
            self._run("initdb", "--encoding=UTF8", "--locale=C.UTF-8", *options)
        self.start()

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c max_connections=200"
        self._run("pg_ctl", "--wait", "--log", str(self.log), "--options", options, "start")

    def stop(self) -> None:
        """Stop immediately, as in a power failure."""
        self._run("pg_ctl", "--mode", "immediate", "stop")

    def execute(self, statement: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Execute a statement as the administrator."""
        command = [
            str(PROGRAMS[-1] / "psql"),
            "--no-psqlrc",
            "--username",
            "postgres",
            *options,
            "--command",
            statement,
        ]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(PROGRAMS[-1] / program), "--pgdata", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL, timeout=120, **self._user)
