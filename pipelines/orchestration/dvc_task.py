"""Prefect task that runs one pipeline stage: `dvc repro` in a subprocess, with its output in the run's log.

DVC does not pass on the exit status of a stage, so the stage writes it to a file. Prefect retries a failed stage once,
unless the user has to act first, and transfers from or to DVC's remote four times, because an unreachable server may
recover.
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

STOP_TIMEOUT = 15.0  # seconds for a stage to stop; Prefect's worker allows 30 for the whole run
RETRY_DELAYS = [15.0, 30.0, 60.0, 120.0]  # seconds before each retry of a transfer

pull_results = task(
    name="pull results", persist_result=False, retries=len(RETRY_DELAYS), retry_delay_seconds=RETRY_DELAYS
)(workspace.pull_results)
push_experiment = task(
    name="push results", persist_result=False, retries=len(RETRY_DELAYS), retry_delay_seconds=RETRY_DELAYS
)(workspace.push_experiment)


def _is_retryable(task: object, run: object, state: State[Any]) -> bool:
    return not isinstance(state.data, (TimeoutError, UserError))


@task(
    task_run_name="{stage}", persist_result=False, retries=1, retry_delay_seconds=60, retry_condition_fn=_is_retryable
)
def reproduce(stage: str) -> None:
    """Bring one stage up to date with `dvc repro`.

    DVC and the stage receive SIGTERM when the run is canceled or times out; training then writes a checkpoint.

    Raises:
        UserError: The stage reported a user error (status 1); a retry would fail again.
        RuntimeError: The stage failed for another reason.
    """
    in_workspace = workspace.is_workspace()
    options = ["--pull"] if in_workspace and workspace.has_remote() else []
    programs = str(Path(sys.executable).parent)
    with NamedTemporaryFile("r") as status:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *options, stage],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={
                **os.environ,
                "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
                STATUS_VARIABLE: status.name,
                "PYTHONUNBUFFERED": "1",  # otherwise lines reach the run's log late and out of order
                **({"MLFLOW_RUN_NAME": flow_run.name} if in_workspace and flow_run.name else {}),
            },
            start_new_session=True,  # one process group: signals reach DVC, its shell and the stage
            close_fds=False,  # DVC inherits the workspace lock
        )  # fmt: skip
        last_lines: deque[str] = deque(maxlen=5)
        try:
            for line in process.stdout or ():  # ends when DVC and all its children have exited
                if line.strip():
                    print(line.rstrip())
                    last_lines.append(line.rstrip())
        except BaseException:  # Prefect's TerminationSignal or timeout, or Ctrl-C
            _stop_process_group(process)
            raise
        if process.wait() != 0:
            failure = UserError if status.read() == "1" else RuntimeError
            raise failure("\n".join([f"stage {stage} failed:", *last_lines]))


def _stop_process_group(process: subprocess.Popen[str]) -> None:
    """Stop a process group with SIGTERM, so that training writes a checkpoint; kill it after `STOP_TIMEOUT` seconds."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            print(process.communicate(timeout=STOP_TIMEOUT)[0].rstrip())
    finally:
        with suppress(ProcessLookupError):  # all processes have exited
            os.killpg(process.pid, signal.SIGKILL)
