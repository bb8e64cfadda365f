"""One stage of the pipeline as a Prefect task: `dvc repro` in a process of its own, whose output goes to the run's log.

DVC does not pass on with which status a stage failed. So Prefect repeats a failed stage once, whatever the cause, and a
transfer from or to DVC's remote four times: a server that was away may be back by then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import State, task
from prefect.runtime import flow_run

from pipelines import working_copy

GRACE = 15.0  # seconds that a stage may take to stop; Prefect's worker gives the whole run 30
PAUSES = [15.0, 30.0, 60.0, 120.0]  # seconds before each further try of a transfer

pull = task(name="bring results", persist_result=False, retries=len(PAUSES), retry_delay_seconds=PAUSES)(
    working_copy.pull
)
keep = task(name="keep results", persist_result=False, retries=len(PAUSES), retry_delay_seconds=PAUSES)(
    working_copy.keep
)


def _failed_in_time(task: object, run: object, state: State[Any]) -> bool:
    return not isinstance(state.data, TimeoutError)


@task(
    task_run_name="{stage}", persist_result=False, retries=1, retry_delay_seconds=60, retry_condition_fn=_failed_in_time
)
def reproduce(stage: str) -> None:
    """Bring one stage up to date with DVC.

    DVC and the stage get SIGTERM when the run is cancelled or the task's time is over; training writes a checkpoint.

    Raises:
        RuntimeError: the stage failed.
    """
    in_copy = working_copy.here()
    options = ["--pull"] if in_copy and working_copy.has_remote() else []
    programs = str(Path(sys.executable).parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", *options, stage],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",  # else the lines of a run's page come late and out of order
            **({"MLFLOW_RUN_NAME": flow_run.name} if in_copy and flow_run.name else {}),
        },
        start_new_session=True,  # one process group, so that a signal reaches DVC, its shell and the stage
        close_fds=False,  # DVC inherits the lock of the workspace
    )  # fmt: skip
    try:
        last_lines = _print(process)
    except BaseException:  # Prefect's TerminationSignal or time-out, or Ctrl-C
        _terminate(process)
        raise
    if process.wait() != 0:
        raise RuntimeError(f"stage {stage} failed:\n{last_lines}")


def _print(process: subprocess.Popen[str]) -> str:
    """Print the output of a process and its children until all have exited; return the last lines."""
    last: deque[str] = deque(maxlen=5)
    for line in process.stdout or ():
        if line.strip():
            print(line.rstrip())
            last.append(line.rstrip())
    return "\n".join(last)


def _terminate(process: subprocess.Popen[str]) -> None:
    """Ask a process group to stop and wait until it has: training writes a checkpoint first."""
    last_resort = threading.Timer(GRACE, _signal, [process, signal.SIGKILL])
    last_resort.start()
    _signal(process, signal.SIGTERM)
    _print(process)
    process.wait()
    last_resort.cancel()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
