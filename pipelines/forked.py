"""A stage whose libraries are loaded already: it is forked from the process that has them, `pipelines.preloaded`.

Reading torch, Prefect and MLflow takes longer than most that stages of a small data set do, and each would do it anew.
So the first stage begins a process that reads them while data are prepared, on another core (`begin`). `python -m
pipelines train` then asks it for a copy of itself, hands it its own streams, folder and signals, and ends as the copy
ends (`run`): for dvc, a terminal or `kill` it is the stage. A run of a deployment, which asks dvc for one stage after
the other, has such a process for all of them.

A stage loads everything itself, as ever, where nothing could be gained or something might be lost: without dvc, or with
one that was asked for a single stage or for data alone; with an accelerator, whose driver does not survive a fork; in
another environment than that of the first stage; on other systems than Linux; and with `FADEFORMER_PRELOAD=no`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import psutil

from pipelines import orchestrator, preloaded, stage
from pipelines.preloaded import OWN, READY, SIZE, STAGES, Asked

COMMAND = (sys.executable, "-m", "pipelines.preloaded")
BEFORE = (*orchestrator.PREPARING, "train")  # any of which may be the first that dvc runs
ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "accel*")  # in /dev
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT)


def begin(name: str) -> None:
    """Begins to load libraries, if others follow after this stage and none before it has begun to."""
    owner = _owner()
    if name not in BEFORE or not owner or not _possible():
        return
    if orchestrator.RUN not in os.environ and not orchestrator.flow_follows(name, owner):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        try:
            listening.bind(_address(owner))
        except OSError:  # by an earlier stage
            return
        listening.listen()
        arguments = [str(listening.fileno()), json.dumps(orchestrator.named(owner))]
        subprocess.Popen(
            [*COMMAND, *arguments], pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,  # signals reach the stage, which passes them on
        )  # fmt: skip


def run(name: str) -> int | None:
    """Runs a stage in a copy of the process that has its libraries loaded.

    Returns:
        Its exit status; None if there is no such process, and nothing was run.
    """
    owner, dvc = _owner(), orchestrator.dvc()
    if name not in STAGES or not owner or not dvc or not _possible():
        return None
    with ExitStack() as open_here:
        connection = open_here.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        own = {variable: os.environ[variable] for variable in OWN if variable in os.environ}
        asked = Asked(name, str(Path.cwd()), own, preloaded.environment_digest(), orchestrator.named(dvc))
        try:
            connection.connect(_address(owner))
        except OSError:  # nobody there
            return None
        if not preloaded.of_this_user(connection):
            return None
        signals, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        open_here.enter_context(signals)
        open_here.enter_context(wakeup)
        signal.set_wakeup_fd(wakeup.fileno())
        open_here.callback(signal.set_wakeup_fd, -1)
        for number in PASSED_ON:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                signal.signal(number, _noted)
                open_here.callback(signal.signal, number, before)
        code = _waited_for(asked, connection, signals)
    if code is not None and code < 0:
        _end_by(-code)
    return code


def _waited_for(asked: Asked, connection: socket.socket, signals: socket.socket) -> int | None:
    """Asks for a copy as soon as there is somebody to be asked, and passes signals on to it until it ends.

    Returns:
        Its exit code; None if none was made.
    """
    copy: int | None = None
    while True:
        ready, _, _ = select.select([connection, signals], [], [])
        if connection in ready:
            try:
                told, files, _, _ = socket.recv_fds(connection, SIZE, 1)
            except ConnectionResetError:  # gone before it took the connection
                told, files = b"", []
            if told == READY:  # not before: what is sent to nobody keeps the streams open after this process
                try:
                    socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
                except OSError:  # a stream that is closed
                    return None
            elif files:
                copy = files[0]
            elif told:
                return int(told)
            elif copy is None:
                return None
            else:
                select.select([copy], [], [])
                sys.exit(
                    f"{asked.stage}: the process that waits for it was killed; run again: finished stages are kept"
                )
        if signals in ready:
            for number in signals.recv(SIZE):
                if copy is None:
                    stage.leave_by(asked.stage, signal.Signals(number))
                _pass_on(copy, number)


def _pass_on(copy: int, number: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(copy, signal.SIGSTOP if number == signal.SIGTSTP else number)
    if number == signal.SIGTSTP:
        os.kill(os.getpid(), signal.SIGSTOP)


def _noted(number: int, frame: object) -> None:
    """The handler of a signal that is read from `set_wakeup_fd` instead, in its turn."""


def _end_by(number: int) -> NoReturn:
    """Ends this process as a signal ended the copy."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


def _owner() -> psutil.Process | None:
    """What runs the stages, and with which the process that has loaded their libraries ends."""
    run = os.environ.get(orchestrator.RUN)
    return orchestrator.found(json.loads(run)) if run else orchestrator.dvc()


def _possible() -> bool:
    if sys.platform != "linux" or os.environ.get("FADEFORMER_PRELOAD") == "no":
        return False
    try:
        this = os.pidfd_open(os.getpid())
        signal.pidfd_send_signal(this, 0)  # nothing is sent
        os.close(this)
    except OSError:  # an old kernel, or a container that forbids it
        return False
    return not any(next(Path("/dev").glob(pattern), None) for pattern in ACCELERATORS)


def _address(owner: psutil.Process) -> str:
    """Where the process of a dvc listens: a name that no file has, and that containers of one network do not share."""
    spaces = [Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("mnt", "pid")]
    began = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc_pid_stat(5), no rounding
    return "\0" + "-".join(["fadeformer", *map(str, [*spaces, owner.pid, began])])
