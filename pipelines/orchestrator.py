"""Prefect's server for the flows of one `dvc repro`: that of `PREFECT_API_URL`, or else a temporary one they share.

Prefect starts a temporary server by itself too, but one for each flow, and only when the flow begins, importing the
whole server into the flow's process, and it leaves the server behind if that process is killed. Here one comes up while
data are validated, or the first flow's stage loads its libraries (`python -m pipelines STAGE`), and a note in
`.prefect/` tells the next stage where it answers. It ends with its owner, the dvc that runs the stages or, without one,
the stage itself, however that ends, and sooner when a stage fails or is the last with a flow.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from fadeformer.errors import PassingError, UserError
from fadeformer.files import read_json, write_json

HOME = Path(".prefect")
RUN = "FADEFORMER_RUN"  # names the process of a run of a deployment to dvc and the stages of it
GRID = "pipelines.tables"
PREPARING = ("download", "validate", "preprocess")  # stages before the first with a flow
STARTUP = 120.0  # seconds; the very first start creates Prefect's database
POLL = 0.25  # seconds between two looks at whether a process is still there
ENDING = 1.5  # seconds that a server may take to end
CLOCK = 2.0  # seconds by which two processes may differ on when a third one began


@dataclass(frozen=True)
class Server:
    """A temporary server.

    Attributes:
        url: where it answers.
        process: in which it runs.
        note: what tells the next stage of it.
        ends: with this stage; else it goes on for the next.
    """

    url: str
    process: psutil.Process
    note: Path
    ends: bool


_started: list[Server] = []
_given: list[psutil.Process] = []


def start(last: bool = False) -> None:
    """Begins to start a temporary server, or finds the one of this `dvc repro`; does nothing if there is a server.

    Args:
        last: no stage with a flow comes after this one.
    """
    if os.environ.get("PREFECT_API_URL") or _started:
        return
    this = psutil.Process()
    owner = dvc() or this
    note = HOME / f"server.{owner.pid}.json"
    _forget_the_dead()
    noted = _read(note)
    process = found(noted.get("server"))
    if process and found(noted["owner"]) == owner and (answers(noted["url"]) or _comes_up(process)):
        url = noted["url"]
    else:
        if process:  # one that does not answer
            process.kill()
        url, process = _spawn(note, owner)
    names = {"server": named(process), "owner": named(owner), "stage": named(this)}
    write_json(note, {"url": url, **names})
    _started.append(Server(url, process, note, ends=last or owner == this))


def start_early(stage: str) -> None:
    """Begins to start it before it is needed, since the first start takes longest, if a stage with a flow comes."""
    owner = dvc()
    if owner and flow_follows(stage, owner):
        start()


def flow_follows(stage: str, owner: psutil.Process) -> bool:
    """Whether a dvc that runs a stage may come to one with a flow after it.

    Not one that was asked for this stage, or for data alone; nor a grid, whose trainings run in other folders.
    """
    return not {stage, *PREPARING, GRID} & set(owner.cmdline())


def leave() -> None:
    """Leaves a server that was begun to the next stage."""
    if _started and not _started[0].ends:
        _started.clear()


def _spawn(note: Path, owner: psutil.Process) -> tuple[str, psutil.Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.orchestrator", str(port), str(note), json.dumps(named(owner))]
    bare = {
        "PREFECT_UI_ENABLED": "false", "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
        "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    }  # fmt: skip
    HOME.mkdir(exist_ok=True)
    with (HOME / "server.log").open("ab") as log:  # the terminal, or a pipe, may close before the server ends
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **bare},
            start_new_session=True,  # Ctrl-C reaches the stage alone, which then still tells how its flow ended
        )  # fmt: skip
    return f"http://127.0.0.1:{port}/api", psutil.Process(process.pid)


@contextmanager
def orchestrated() -> Iterator[str]:
    """A server answers while the block runs; gives its address.

    Raises:
        PassingError: the server of `PREFECT_API_URL` does not answer.
        UserError: the temporary one does not start.
    """
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    given = os.environ.get("PREFECT_API_URL")
    if given:
        if not answers(given):
            raise PassingError(
                f"PREFECT_API_URL is {given}, but no Prefect server answers there; start it, or unset it"
            )
        yield given
        return
    start()
    server = _started[0]
    ends = True  # a stage that fails is the last, and takes the server with it
    try:
        deadline = time.monotonic() + STARTUP
        while not answers(server.url):
            if not alive(server.process) or time.monotonic() > deadline:
                raise UserError(f"Prefect's temporary server did not start; {HOME / 'server.log'} tells why")
            time.sleep(0.05)
        logging.getLogger("prefect.flow_runs").addFilter(_not_a_link)
        # Nobody listens to a heartbeat there, and a flow that has one ends only on the next full second.
        with temporary_settings({PREFECT_API_URL: server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            try:
                yield server.url
            finally:
                APILogWorker.drain_all(timeout=5)  # what was logged goes to the server while it is there
        ends = server.ends
        if not ends:
            _started.clear()
    finally:
        give_up()


@contextmanager
def temporary_server() -> Iterator[str]:
    """A Prefect server for the duration of a command; `PREFECT_API_URL` names it."""
    with orchestrated() as address:
        given = os.environ.get("PREFECT_API_URL")
        os.environ["PREFECT_API_URL"] = address
        try:
            yield address
        finally:
            if given is None:
                del os.environ["PREFECT_API_URL"]


def give_up() -> None:
    """Ends a server that was begun, of a stage that ends before its flow does."""
    while _started:
        _end(_started.pop())


def _end(server: Server) -> None:
    if alive(server.process):
        server.process.terminate()
        deadline = time.monotonic() + 2 * ENDING
        while alive(server.process):
            if time.monotonic() > deadline:
                server.process.kill()
            time.sleep(0.02)
    server.note.unlink(missing_ok=True)


def dvc() -> psutil.Process | None:
    """The dvc that runs this stage: the nearest ancestor of that name, as dvc puts a shell in between.

    Or the grid of `pipelines.tables`, which runs stages likewise.
    """
    if _given:
        return _given[0]
    for ancestor in psutil.Process().parents():
        try:
            words = ancestor.cmdline()
        except psutil.Error:  # another user's, or gone
            continue
        if "dvc" in [Path(word).name for word in words[:2]] or {("-m", "dvc"), ("-m", GRID)} & set(pairwise(words)):
            return ancestor
    return None


def belongs_to(dvc: psutil.Process) -> None:
    """Tells which dvc runs this stage, where it is not above it."""
    _given.append(dvc)


def alive(process: psutil.Process | None) -> bool:
    """Whether it still runs: neither is gone, nor waits for its parent to take note of its end."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def named(process: psutil.Process) -> dict[str, float]:
    """By which `found` knows a process again, also when its number was given to another since."""
    return {"pid": process.pid, "created": process.create_time()}


def found(name: dict[str, Any] | None) -> psutil.Process | None:
    """The process that `named` named, if it still runs."""
    try:
        process = psutil.Process(name["pid"]) if name else None
        same = process and name and abs(process.create_time() - name["created"]) < CLOCK
    except psutil.NoSuchProcess:
        return None
    return process if same and alive(process) else None


def orphaned(environment: Mapping[str, str]) -> bool:
    """Whether a process of this environment belongs to a run whose own process is gone, and nobody waits for it."""
    return RUN in environment and not found(json.loads(environment[RUN]))


def _read(note: Path) -> dict[str, Any]:
    try:
        return dict(read_json(note))
    except (OSError, ValueError):  # none there, or a damaged one: it tells of no server
        return {}


def _forget_the_dead() -> None:
    """Removes the notes of servers that were killed."""
    for note in HOME.glob("server.*.json"):
        if not found(_read(note).get("server")):
            note.unlink(missing_ok=True)


def _not_a_link(record: logging.LogRecord) -> bool:
    """Leaves out Prefect's link to the run's page: a temporary server shows no pages."""
    return not record.getMessage().startswith("View at ")


def answers(url: str) -> bool:
    """Whether a Prefect server is at an address."""
    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=5) as response:  # noqa: S310  an address of the user's own
            return bool(response.status == 200)
    except (OSError, ValueError):  # nobody there, or no address
        return False


def _comes_up(process: psutil.Process) -> bool:
    """Whether a server that does not answer yet may do so still."""
    return time.time() - process.create_time() < STARTUP


def _serve(port: int, note: Path, owner: psutil.Process | None) -> None:
    """Serves until its owner has ended, and so has the stage that is noted: it may have to tell its end yet."""

    def watch() -> None:
        while alive(owner) or found(_read(note).get("stage")):
            time.sleep(POLL)
        note.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENDING)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error",
        timeout_graceful_shutdown=1,
    )  # fmt: skip


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), found(json.loads(sys.argv[3])))
