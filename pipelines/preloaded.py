"""The process that has the libraries of stages loaded, and from which `pipelines.forked` has a stage forked.

It loads them and waits until it is asked, or until what runs the stages has ended. Each stage gets a keeper, which is
forked first, tells how the stage's own process ended, and ends that at once when the one who asked is gone. Libraries
alone are loaded before a fork: the project's modules that make results are read by each copy, as they lie there then.
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
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from pipelines import beside, orchestrator, stage

OWN = ("DVC_STAGE", "SHLVL", "_")  # variables that each stage has a value of its own for
STAGES = ("train", "evaluate", "promote")  # in their order
READY = b"ready"
SIZE = 65536  # bytes of a message
PATIENCE = 10.0  # seconds for one that was begun to be sent
PR_SET_PDEATHSIG = 1  # prctl(2)
# What the stages in `STAGES` load, also late and only some of them; what these load in turn is not named.
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


def environment_digest() -> str:
    """A digest of the variables that stages share: all but those in `OWN`."""
    shared = sorted((name, value) for name, value in os.environ.items() if name not in OWN)
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()


def of_this_user(connection: socket.socket) -> bool:
    """Whether who answers or asks is of the same user: names of addresses are free to all."""
    known = struct.calcsize("3i")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, known))[1] == os.getuid()


def _serve(listening: socket.socket, owner: psutil.Process | None) -> Asked | None:
    """Loads libraries, then forks until the owner has ended, or the last stage has begun.

    Returns:
        What is asked for, in the copy that is to do it; None in the process itself, at its end.
    """
    digest = environment_digest()
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
                    return _keep(connection, digest)
    return None


def _keep(connection: socket.socket, digest: str) -> Asked:
    """Makes a copy, in which it returns; tells how that ends, and ends it if nobody is there any more to be told."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(PATIENCE)
    told, streams = b"", []
    with suppress(OSError):  # nobody waits any more
        connection.send(READY)
        told, streams, _, _ = socket.recv_fds(connection, SIZE, 3)
    asked = Asked(*json.loads(told)) if told and of_this_user(connection) else None
    if asked is None or asked.digest != digest:
        os._exit(0)  # so that who asked loads for itself
    if asked.stage == STAGES[-1]:
        os.kill(os.getppid(), signal.SIGTERM)  # nobody will ask any more
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
