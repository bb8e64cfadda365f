"""Run a stage or command: report expected errors as one message without a traceback, and set the exit status."""

import atexit
import gc
import logging
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from fadeformer.errors import StageInterrupted, TransientError, UserError
from fadeformer.io.atomic import DISK_FULL_ERRNOS

STATUS_VARIABLE = "FADEFORMER_STATUS"  # environment variable: file for the exit status, which DVC does not pass on


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Not an `Exception`, so that code which skips damaged images does not catch it."""


class CommandResult(NamedTuple):
    """The summary of a command and its exit status, for commands that return another one than 0 or 1."""

    summary: str
    status: int


def run(name: str, main: Callable[[], str | CommandResult]) -> None:
    """Run `main` and print the summary it returns.

    Exits with one message and status 1 on a `UserError`, 75 on a `TransientError`, or 128 + n after signal n. Inside a
    flow, Prefect handles SIGTERM first, reports it, and sends it again.
    """
    atexit.register(gc.freeze)  # skip the final garbage collections, which take seconds with torch and MLflow
    for logger in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(logger).addFilter(_drop_traceback)
    warnings.showwarning = _print_warning
    # A file is read, or reported by name as unreadable; these warnings name no file and may quote values of a patient.
    warnings.filterwarnings("ignore", module=r"(pydicom|PIL|fadeformer\.data)\b")
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        result = main()
        summary, status = result if isinstance(result, CommandResult) else (result, 0)
        print(f"{name}: {summary}", flush=True)
    except UserError as error:
        _exit_with_message(f"{name}: {error}", os.EX_TEMPFAIL if isinstance(error, TransientError) else 1)
    except StageInterrupted as error:
        _exit_with_message(f"{name}: {error}", 128 + error.signal_number)
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS and error.filename is None:
            raise
        remedy = "free some space" if error.errno in DISK_FULL_ERRNOS else "fix the path or its permissions"
        where = f"{error.filename}: " if error.filename else ""
        _exit_with_message(f"{name}: {where}{error.strerror}; {remedy}, then run again: finished stages are kept")
    except Terminated:
        _exit_with_message(f"{name}: stopped by SIGTERM; run again: finished stages are kept", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        _exit_with_message(f"{name}: interrupted", 128 + signal.SIGINT)
    if status:
        sys.exit(status)


def _raise_terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning without the line of code that issued it, which says nothing to a user."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _drop_traceback(record: logging.LogRecord) -> bool:
    """Shorten Prefect's log record of an error: `run` prints the message when the process exits."""
    if record.exc_info:
        record.msg, record.args, record.exc_info = "stopped, the reason is printed below", (), None
    return True


def _exit_with_message(message: str, status: int = 1) -> NoReturn:
    print(f"\n{message}", file=sys.stderr)
    if file := os.environ.get(STATUS_VARIABLE):
        Path(file).write_text(str(status))
    sys.exit(status)


def _is_stdout_closed() -> bool:
    """Return True if stdout is a pipe whose reader has closed it, as `head` does."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))
