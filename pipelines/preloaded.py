"""Libraries are loaded once for the stages of a `dvc repro`, by a process from which the stages are forked.

Reading torch, Prefect and MLflow takes longer than most that stages of a small data set do, and each would do it anew.
So the first stage begins a process that reads them while data are prepared, on another core (`begin`). `python -m
pipelines train` then asks it for a copy of itself, hands it its own streams, folder and signals, and ends as the copy
ends (`run`): for dvc, a terminal or `kill` it is the stage. A keeper between the two ends the copy at once when the one
who asked is gone. The project's modules that make results are read by each copy, as they lie there by then. A run of a
deployment, which asks dvc for one stage after the other, has such a process for all of them.

A stage loads everything itself, as ever, where nothing could be gained or something might be lost: without dvc, or with
one that was asked for a single stage; with an accelerator, whose driver does not survive a fork; in another environment
than that of the first stage; on other systems than Linux; and with `FADEFORMER_PRELOAD=no`.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

from pipelines import beside, orchestrator, stage

RUN = "FADEFORMER_RUN"  # names the process of a run of a deployment to the stages of it
COMMAND = (sys.executable, "-m", "pipelines.preloaded")
FORKED = ("train", "evaluate", "promote")
BEFORE = (*orchestrator.PREPARING, "train")  # any of which may be the first that dvc runs
OWN = ("DVC_STAGE", "SHLVL", "_")  # variables that each stage has a value of its own for
ACCELERATORS = ("nvidia[0-9]*", "kfd", "dxg", "accel*")  # in /dev
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT)
READY = b"ready"
SIZE = 65536  # bytes of a message
PATIENCE = 10.0  # seconds for one that was begun to be sent
PR_SET_PDEATHSIG = 1  # prctl(2)
# What the stages in `FORKED` load, also late and only some of them; what these load in turn is not named.
LIBRARIES = (
    "torch", "timm", "timm.optim", "torchvision.transforms.v2.functional", "lightning_fabric", "scipy.stats", "pandas",
    "sklearn.covariance", "sklearn.decomposition", "sklearn.metrics", "prefect", "prefect.flow_engine",
    "prefect.task_engine", "prefect.utilities.visualization", "git", "mlflow", "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "pyarrow.parquet",
    "ruamel.yaml", "captum.attr", "matplotlib.pyplot", "jinja2", "rich.console",
)  # fmt: skip


class Asked(NamedTuple):
    """What a copy is to do.

    Attributes:
        stage: by its name.
        folder: to work in.
        environment: variables of this stage alone.
        digest: of all other variables.
        dvc: that runs it, as `orchestrator` names a process.
    """

    stage: str
    folder: str
    environment: dict[str, str]
    digest: str
    dvc: dict[str, float]


def begin(name: str) -> None:
    """Begins to load libraries, if others follow after this stage and none before it has begun to."""
    owner = _owner()
    if name not in BEFORE or not owner or not _possible():
        return
    if RUN not in os.environ and not orchestrator.flow_follows(name, owner):
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
    if name not in FORKED or not owner or not dvc or not _possible():
        return None
    with ExitStack() as open_here:
        connection = open_here.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        own = {variable: os.environ[variable] for variable in OWN if variable in os.environ}
        asked = Asked(name, str(Path.cwd()), own, _environment(), orchestrator.named(dvc))
        try:
            connection.connect(_address(owner))
        except OSError:  # nobody there
            return None
        if not _of_this_user(connection):
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
    run = os.environ.get(RUN)
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


def _environment() -> str:
    """A digest of the variables that stages share."""
    shared = sorted((name, value) for name, value in os.environ.items() if name not in OWN)
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()


def _of_this_user(connection: socket.socket) -> bool:
    """Whether who answers or asks is of the same user: names of addresses are free to all."""
    known = struct.calcsize("3i")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, known))[1] == os.getuid()


def _serve(listening: socket.socket, owner: psutil.Process | None) -> Asked | None:
    """Loads libraries, then forks until the owner has ended.

    Returns:
        What is asked for, in the copy that is to do it; None in the process itself, at its end.
    """
    environment = _environment()
    gc.disable()  # as in `pipelines.__main__`
    for library in LIBRARIES:
        if not orchestrator.alive(owner):
            return None
        importlib.import_module(library)
    gc.freeze()
    if threading.active_count() > 1 or "/libcuda.so" in Path("/proc/self/maps").read_text():
        return None  # what a library has begun would be lacking in a copy
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how keepers ended
    while orchestrator.alive(owner):
        if select.select([listening], [], [], orchestrator.POLL)[0]:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    listening.close()
                    return _keep(connection, environment)
    return None


def _keep(connection: socket.socket, environment: str) -> Asked:
    """Makes a copy, in which it returns; tells how that ends, and ends it if nobody is there any more to be told."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(PATIENCE)
    told, streams = b"", []
    with suppress(OSError):  # nobody waits any more
        connection.send(READY)
        told, streams, _, _ = socket.recv_fds(connection, SIZE, 3)
    asked = Asked(*json.loads(told)) if told and _of_this_user(connection) else None
    if asked is None or asked.digest != environment:
        os._exit(0)  # so that who asked loads for itself
    keeper, copy = os.getpid(), os.fork()
    if copy == 0:
        connection.close()
        _take_over(asked, streams, keeper)
        return asked
    for stream in streams:
        os.close(stream)
    process = os.pidfd_open(copy)
    try:
        socket.send_fds(connection, [b"forked"], [process])
        ended = select.select([process, connection], [], [])[0]
    except OSError:
        ended = []
    if process not in ended:
        os.kill(copy, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    with suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _take_over(asked: Asked, streams: list[int], keeper: int) -> None:
    """Makes this process, in all that it finds about itself, that of who asked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != keeper:
        os._exit(1)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=output is sys.stderr or output.isatty())  # type: ignore[union-attr]
    if "prefect" in sys.modules:  # when it was loaded there was no terminal for its colours
        from prefect.logging.configuration import setup_logging

        setup_logging(incremental=False)
    os.chdir(asked.folder)
    os.environ.update(asked.environment)
    sys.argv = [sys.argv[0], asked.stage]
    importlib.invalidate_caches()


def main() -> None:
    """Loads and serves; each copy runs its stage and ends with it."""
    number, owner = sys.argv[1:]
    listening = socket.socket(fileno=int(number))
    asked = _serve(listening, orchestrator.found(json.loads(owner)))
    if asked is None:
        os._exit(0)
    from pipelines.__main__ import load_and_run

    dvc = orchestrator.found(asked.dvc)
    if dvc is None:
        sys.exit(f"{asked.stage}: the dvc that runs it is gone")
    orchestrator.belongs_to(dvc)
    if asked.stage in beside.OF_STAGE:
        beside.start(beside.OF_STAGE[asked.stage], "fork")
    stage.run(asked.stage, partial(load_and_run, asked.stage))


if __name__ == "__main__":
    main()
