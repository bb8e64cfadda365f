"""The Prefect server that flows report to: the one at `PREFECT_API_URL`, or a temporary one.

`python -m pipelines.server COMMAND...` runs a command, such as `dvc repro`, with one server for all its stages.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import NoReturn

import httpx
import psutil

from fadeformer.errors import TransientError, UserError
from pipelines import runner
from pipelines.environment import configure_environment

STARTUP_TIMEOUT = 120  # seconds; the first start creates Prefect's database
DATABASE_FILE = "temporary.db"  # in Prefect's home
CLIENT_RETRIES = "2"  # per request; more would only delay a flow whose temporary server has died
NO_UI_URL = ""  # stops Prefect from printing links to pages that are gone when the command exits
FLUSH_TIMEOUT = 5.0  # seconds to send the last logs and events of flows
POLL_INTERVAL = 1.0  # seconds between two listings of a command's child processes
GROUP_EXIT_TIMEOUT = 1.0  # seconds for the command to exit if its whole process group received SIGTERM


@contextmanager
def temporary_server() -> Iterator[str]:
    """Provide a Prefect server for the block and its child processes, and yield its URL.

    Raises:
        TransientError: The server does not answer.
        UserError: The temporary server does not start.
    """
    existing = os.environ.get("PREFECT_API_URL")
    if existing and not is_reachable(existing):
        raise TransientError(
            f"PREFECT_API_URL is {existing}, but no Prefect server answers there; start it, or unset the variable"
        )
    with nullcontext(existing) if existing else _launch_server() as url:
        try:
            yield url
        except httpx.TransportError as error:
            raise TransientError(f"the Prefect server at {url} no longer answers; run again") from error


@contextmanager
def _launch_server() -> Iterator[str]:
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_HOME,
        PREFECT_SERVER_DATABASE_CONNECTION_URL,
        PREFECT_UI_URL,
        get_current_settings,
        temporary_settings,
    )  # fmt: skip

    # Its own database, unless one is configured: two servers with one SQLite file fail with "database is locked".
    configured = get_current_settings().server.database.model_fields_set & {"connection_url", "driver"}
    url = f"sqlite+aiosqlite:///{PREFECT_HOME.value()}/{DATABASE_FILE}"
    database = {} if configured else {PREFECT_SERVER_DATABASE_CONNECTION_URL: url}
    server = SubprocessASGIServer()
    # The server inherits the mask: it survives signals to the process group, so flows can report their final state.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        try:
            with temporary_settings(database):
                server.start(timeout=STARTUP_TIMEOUT)
        except (RuntimeError, httpx.TransportError) as error:
            raise UserError(f"Prefect's temporary server did not start: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        changes = {
            PREFECT_API_URL: server.api_url,
            PREFECT_CLIENT_MAX_RETRIES: CLIENT_RETRIES,
            PREFECT_UI_URL: NO_UI_URL,
        }
        os.environ.update({setting.name: value for setting, value in changes.items()})
        with temporary_settings(changes):
            try:
                yield server.api_url
            finally:
                APILogWorker.drain_all(timeout=FLUSH_TIMEOUT)
                EventsWorker.drain_all(timeout=FLUSH_TIMEOUT)
    finally:
        for setting in (PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, PREFECT_UI_URL):
            os.environ.pop(setting.name, None)
        if server.server_process:
            server.server_process.kill()  # the states of all runs are in its database
        server.stop()


def is_reachable(url: str) -> bool:
    """Return True if a Prefect server answers at a URL."""
    try:
        return httpx.get(f"{url.rstrip('/')}/health", timeout=5).status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def run_command(command: Sequence[str]) -> NoReturn:
    """Run a command with a Prefect server and exit with its status; SIGTERM is passed on to all its descendants."""
    configure_environment()
    with temporary_server():
        process = psutil.Popen(command)
        processes = [process]
        try:
            while process.poll() is None:
                processes = [process, *process.children(recursive=True)]  # children may outlive the command
                with suppress(psutil.TimeoutExpired):
                    process.wait(POLL_INTERVAL)
        except KeyboardInterrupt as error:  # Ctrl-C reaches them from the terminal
            terminated = isinstance(error, runner.Terminated)
            if terminated and process not in psutil.wait_procs([process], GROUP_EXIT_TIMEOUT)[0]:
                for descendant in processes:
                    with suppress(psutil.NoSuchProcess):
                        descendant.terminate()
            psutil.wait_procs(processes)
        status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    runner.run(" ".join(sys.argv[1:]), partial(run_command, sys.argv[1:]))
