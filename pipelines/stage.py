"""Runs one stage: errors meant for people are printed alone, and the exit status tells."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

import psutil

from fadeformer.errors import Interrupted, PassingError, UserError
from fadeformer.files import FULL
from pipelines import orchestrator

LAST = 60.0  # seconds for what a stage does at its end, such as a checkpoint, once nobody waits for it
TELLING = 5.0  # seconds for telling Prefect's server how a flow has ended, once nobody waits for it
FLOWS = ("train", "evaluate")  # stages of which Prefect is told
_idle = threading.Event()  # set while a stage does nothing that it would lose


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come. As Ctrl-C, it is not an `Exception`: no reader that stumbles takes it for a damaged image."""


class _OneLine(logging.Filter):
    """Takes the traceback from what Prefect logs of an error that is meant for people."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], (UserError, Interrupted)):
            record.msg, record.args, record.exc_info = "stopped, the reason is told below", (), None
        return True


class Ended(NamedTuple):
    """How a command ended that may end well in more than one way.

    Attributes:
        summary: for people.
        status: of the process; 0 says that all is well, 1 is that of errors.
    """

    summary: str
    status: int


def run(name: str, main: Callable[[], str | Ended]) -> None:
    """Runs `main`, prints the summary it returns, and exits with its status if it returns one.

    Ends the process with one message, and status 1 on a UserError, 75 on a PassingError,
    or 128 and its number where a signal asked for it.
    """
    status, dvc = 0, orchestrator.dvc()
    for logger in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(logger).addFilter(_OneLine())
    if name in FLOWS:
        _idle.set()
    else:
        _idle.clear()
    try:
        with _terminable(), _ends_with(dvc):
            ended = main()
            summary, status = ended if isinstance(ended, Ended) else (ended, 0)
            print(f"{name}: {summary}", flush=True)
    except PassingError as error:
        _exit(f"{name}: {error}", os.EX_TEMPFAIL)
    except UserError as error:
        _exit(f"{name}: {error}")
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more before it exits
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in FULL:
            where = f"{error.filename}: " if error.filename else ""
            _exit(f"{name}: {where}{error.strerror}; free some space, then run again: finished stages are kept")
        if error.filename is None:
            raise
        _exit(f"{name}: {error.filename}: {error.strerror}; mend the path or its permissions, then run again")
    except Interrupted as error:
        _exit(f"{name}: {error}", 128 + error.signal_number)
    except _Terminated:
        leave_by(name, signal.SIGTERM)
    except KeyboardInterrupt:
        leave_by(name, signal.SIGINT)
    finally:
        gc.freeze()  # else the interpreter searches every object of torch, Prefect and MLflow before it exits: 2 s
        _exit_in_time(sys.exception(), status, dvc)
    if status:
        sys.exit(status)


def leave_by(name: str, number: signal.Signals) -> NoReturn:
    """Ends the process as a stage that a signal has stopped."""
    if number == signal.SIGINT:
        told = "interrupted"
    else:
        told = f"stopped by {number.name}; run again: finished stages are kept"
    _exit(f"{name}: {told}", 128 + number)


@contextmanager
def body() -> Iterator[None]:
    """For the function of a flow: before and after it there is nothing to do but to tell Prefect's server."""
    _idle.clear()
    try:
        yield
    finally:
        _idle.set()


def _waited_for(dvc: psutil.Process) -> bool:
    """Whether somebody takes what the stage makes."""
    return orchestrator.alive(dvc) and not orchestrator.orphaned(os.environ)


def _exit(message: str, status: int = 1) -> NoReturn:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(status)


def _exit_in_time(error: BaseException | None, status: int, dvc: psutil.Process | None) -> None:
    """Sees to it that the process exits: there Prefect waits for ever to tell something to a server that is gone."""
    code = error.code if isinstance(error, SystemExit) else 1 if error else status

    def wait() -> None:
        deadline = time.monotonic() + LAST
        while time.monotonic() < deadline:
            time.sleep(min(orchestrator.POLL, LAST))
            if dvc and not _waited_for(dvc):
                deadline = min(deadline, time.monotonic() + TELLING)
        os._exit(code)

    # Before what Prefect has registered so, and not where more comes after a stage.
    threading._register_atexit(threading.Thread(target=wait, daemon=True).start)


def _nobody_reads() -> bool:
    """Whether the output goes to a pipe whose reader has enough of it, as `head` has."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


@contextmanager
def _terminable() -> Iterator[None]:
    """Raises `_Terminated` on the first SIGTERM; what ends is not to be disturbed by another.

    Inside a flow Prefect's own handler comes first, tells the server, and sends the signal on to this one.
    """
    came = False

    def terminate(number: int, frame: object) -> None:
        nonlocal came
        if not came:
            came = True
            raise _Terminated

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        """A signal that came just while garbage was collected: what its handler raised there went no further."""
        nonlocal came
        error = lost.exc_value
        if isinstance(error, Interrupted):
            number = error.signal_number
        elif isinstance(error, _Terminated) or type(error).__name__ == "TerminationSignal":  # Prefect's
            number = signal.SIGTERM
        elif isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        else:
            hook_before(lost)
            return
        came = False
        threading.Timer(0.05, os.kill, [os.getpid(), number]).start()

    hook_before, sys.unraisablehook = sys.unraisablehook, send_again
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook_before


@contextmanager
def _ends_with(dvc: psutil.Process | None) -> Iterator[None]:
    """Sends this process SIGTERM when dvc is gone: nobody would take what the stage makes, and it would run on unseen.

    Likewise when the process of its run is gone, which a worker that ends kills without asking. Where the signal that
    ended dvc came to this process too, it is ending already and is left in peace. One that does not end by that is
    ended all the same: Prefect asks a server that is gone as well for a minute or more, in which nobody else can take
    up what the stage was at.
    """
    if dvc is None:
        yield
        return
    signals, wakeup = socket.socketpair()  # Python writes to it whatever handler, such as Prefect's, a signal has
    wakeup.setblocking(False)

    def watch() -> None:
        there = True
        while not select.select([signals], [], [], orchestrator.POLL)[0]:
            if not there:
                os.kill(os.getpid(), signal.SIGTERM)
                break
            there = _waited_for(dvc)
        while not ended.wait(orchestrator.POLL):
            if not _waited_for(dvc):
                _idle.wait(LAST)
                if not ended.wait(TELLING):
                    os._exit(128 + signal.SIGTERM)

    ended = threading.Event()
    before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        _idle.set()
        signal.set_wakeup_fd(before)
        wakeup.close()  # ends the watch
        watcher.join()
        signals.close()
