"""Runs one stage: errors meant for people are printed alone, and the exit status tells."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from fadeformer.errors import UserError


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
        if error.errno is None or error.filename is None:
            raise
        sys.exit(
            f"\n{name}: {error.filename}: {error.strerror}; free some space or mend its permissions, then run again"
        )
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: interrupted")
