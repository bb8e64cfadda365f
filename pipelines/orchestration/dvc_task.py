"""One stage of the pipeline as a Prefect task: `dvc repro` in a process of its own, whose output goes to the run's log.

DVC does not pass on with which status a stage failed, so the stage itself leaves it in a file. Prefect repeats a failed
stage once, unless it needs a person, and a transfer from or to DVC's remote four times: a server that was away may be
back by then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from prefect import State, task
from prefect.runtime import flow_run

from fadeformer.errors import UserError
from pipelines.orchestration import workspace
from pipelines.runner import STATUS_VARIABLE

STOP_TIMEOUT = 15.0  # seconds that a stage may take to stop; Prefect's worker gives the whole run 30
RETRY_DELAYS = [15.0, 30.0, 60.0, 120.0]  # seconds before each further try of a transfer

pull_results = task(
    name="bring results", persist_result=False, retries=len(RETRY_DELAYS), retry_delay_seconds=RETRY_DELAYS
)(workspace.pull_results)
push_experiment = task(
    name="keep results", persist_result=False, retries=len(RETRY_DELAYS), retry_delay_seconds=RETRY_DELAYS
)(workspace.push_experiment)


def _is_retryable(task: object, run: object, state: State[Any]) -> bool:
    return not isinstance(state.data, (TimeoutError, UserError))


@task(
    task_run_name="{stage}", persist_result=False, retries=1, retry_delay_seconds=60, retry_condition_fn=_is_retryable
)
def reproduce(stage: str) -> None:
    """Bring one stage up to date with DVC.

    DVC and the stage get SIGTERM when the run is cancelled or the task's time is over; training writes a checkpoint.

    Raises:
        UserError: the stage failed with status 1 and a message; it would fail again.
        RuntimeError: the stage failed otherwise.
    """
    in_copy = workspace.is_workspace()
    options = ["--pull"] if in_copy and workspace.has_remote() else []
    programs = str(Path(sys.executable).parent)
    with NamedTemporaryFile("r") as status:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *options, stage],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={
                **os.environ, "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]), STATUS_VARIABLE: status.name,
                "PYTHONUNBUFFERED": "1",  # else the lines of a run's page come late and out of order
                **({"MLFLOW_RUN_NAME": flow_run.name} if in_copy and flow_run.name else {}),
            },
            start_new_session=True,  # one process group, so that a signal reaches DVC, its shell and the stage
            close_fds=False,  # DVC inherits the lock of the workspace
        )  # fmt: skip
        last_lines: deque[str] = deque(maxlen=5)
        try:
            for line in process.stdout or ():  # until DVC and all its children have exited
                if line.strip():
                    print(line.rstrip())
                    last_lines.append(line.rstrip())
        except BaseException:  # Prefect's TerminationSignal or time-out, or Ctrl-C
            _stop_process_group(process)
            raise
        if process.wait() != 0:
            failure = UserError if status.read() == "1" else RuntimeError
            raise failure("\n".join([f"stage {stage} failed:", *last_lines]))


def _stop_process_group(process: subprocess.Popen[str]) -> None:
    """Ask a process group to stop; kill it after `GRACE` seconds. Training writes a checkpoint first."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            print(process.communicate(timeout=STOP_TIMEOUT)[0].rstrip())
    finally:
        with suppress(ProcessLookupError):  # all have stopped
            os.killpg(process.pid, signal.SIGKILL)
