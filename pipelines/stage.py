"""Runs one stage: errors meant for people are printed alone, and the exit status tells."""

from __future__ import annotations

import errno
import gc
import logging
import sys
from collections.abc import Callable

from fadeformer.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or the largest file allowed


class _OneLine(logging.Filter):
    """Takes the traceback from what Prefect logs of an error that is meant for people."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UserError):
            record.msg, record.args, record.exc_info = "stopped by an error, told below", (), None
        return True


def run(name: str, main: Callable[[], str]) -> None:
    """Runs `main` and prints the summary it returns; ends the process with status 1 and one message on a UserError."""
    for logger in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(logger).addFilter(_OneLine())
    try:
        print(f"{name}: {main()}")
    except UserError as error:
        sys.exit(f"\n{name}: {error}")
    except OSError as error:
        if error.errno in FULL:
            where = f"{error.filename}: " if error.filename else ""
            sys.exit(f"\n{name}: {where}{error.strerror}; free some space, then run again: finished stages are kept")
        if error.filename is None:
            raise
        sys.exit(f"\n{name}: {error.filename}: {error.strerror}; mend the path or its permissions, then run again")
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: interrupted")
    finally:
        gc.freeze()  # else the interpreter searches every object of torch, Prefect and MLflow before it exits: 2 s
