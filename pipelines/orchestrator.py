"""Prefect's server for one stage: the one of `PREFECT_API_URL`, or else a temporary one that ends with the stage.

Prefect starts a temporary server by itself too, but only when a flow begins, importing the whole server into the
flow's process, and leaves it behind if that process is killed. Here it comes up while the stage loads its libraries
(`python -m pipelines STAGE`), and it ends when the pipe to the process that started it closes, however that happens.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.request import urlopen

from fadeformer.errors import UserError

STARTUP = 120.0  # seconds; the very first start creates Prefect's database


@dataclass(frozen=True)
class Server:
    """A temporary server: where it answers, and its process."""

    url: str
    process: subprocess.Popen[bytes]


_started: list[Server] = []


def start() -> None:
    """Begins to start a temporary server, unless `PREFECT_API_URL` names one or it has begun already."""
    if os.environ.get("PREFECT_API_URL") or _started:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.orchestrator", str(port)]
    quiet = {"PREFECT_UI_ENABLED": "false", "PREFECT_LOGGING_SERVER_LEVEL": "ERROR"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **quiet})
    _started.append(Server(f"http://127.0.0.1:{port}/api", process))


@contextmanager
def orchestrated() -> Iterator[None]:
    """A server answers while the block runs.

    Raises:
        UserError: the server of `PREFECT_API_URL` does not answer, or the temporary one does not start.
    """
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    given = os.environ.get("PREFECT_API_URL")
    if given:
        if not _answers(given):
            raise UserError(f"PREFECT_API_URL is {given}, but no Prefect server answers there; start it, or unset it")
        yield
        return
    start()
    server = _started[0]
    try:
        deadline = time.monotonic() + STARTUP
        while not _answers(server.url):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise UserError("Prefect's temporary server did not start; `prefect server start` tells why")
            time.sleep(0.1)
        logging.getLogger("prefect.flow_runs").addFilter(_not_a_link)
        with temporary_settings({PREFECT_API_URL: server.url}):
            try:
                yield
            finally:
                APILogWorker.drain_all(timeout=5)  # what was logged goes to the server while it is there
    finally:
        _started.clear()
        server.process.communicate()  # closes the pipe, and waits


def _not_a_link(record: logging.LogRecord) -> bool:
    """Leaves out Prefect's link to the run's page: a temporary server shows no pages."""
    return not record.getMessage().startswith("View at ")


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=5) as response:  # noqa: S310  an address of the user's own
            return bool(response.status == 200)
    except (OSError, ValueError):  # nobody there, or no address
        return False


def _serve(port: int) -> None:
    """Serves until standard input ends."""
    import uvicorn

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
