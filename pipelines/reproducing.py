"""One stage of the pipeline as a Prefect task: `dvc repro` in a process of its own, its output going to the log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from prefect import State, task
from prefect.runtime import flow_run

from fadeformer.errors import PassingError
from pipelines import orchestrator, working_copy

GRACE = 15.0  # seconds that a stage may take to end; Prefect's worker gives the whole run 30
PAUSES = [15.0, 30.0, 60.0, 120.0]  # seconds before each further attempt
PASSING = re.compile(rf"exited with {os.EX_TEMPFAIL}\b")  # as DVC tells of a stage that may go well next time
OF_A_REMOTE = re.compile(r"ERROR: (unexpected error - |failed to (connect|download|fetch|pull|transfer)\b)")


def _may_pass(task: object, run: object, state: State[Any]) -> bool:
    """Whether another attempt makes sense: not of a shut data gate, a wrong file or a diverged training."""
    return isinstance(state.data, PassingError)


RETRIED: dict[str, Any] = {
    "persist_result": False, "retries": len(PAUSES), "retry_delay_seconds": PAUSES, "retry_condition_fn": _may_pass,
}  # fmt: skip
pull = task(working_copy.pull, name="bring results", task_run_name="bring results", **RETRIED)
keep = task(working_copy.keep, name="keep results", task_run_name="keep results", **RETRIED)


@task(task_run_name="{stage}", **RETRIED)
def reproduce(stage: str, hours: float | None = None) -> None:
    """Brings one stage up to date by DVC; a signal to end goes on to DVC and the stage.

    Args:
        stage: its name.
        hours: after which it is asked to end, as a signal would; training writes a checkpoint first.

    Raises:
        PassingError: what the stage needs, or DVC's remote, does not answer; it is tried again.
        RuntimeError: it failed, or took too long.
    """
    pulls = working_copy.here() and working_copy.has_remote()
    command = [sys.executable, "-m", "dvc", "repro", *(["--pull"] if pulls else []), stage]
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    name = flow_run.name if working_copy.here() else None  # where each trains a model of its own
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={
            **os.environ, "PATH": search, orchestrator.RUN: json.dumps(orchestrator.named(psutil.Process())),
            **({"MLFLOW_RUN_NAME": name} if name else {}),
            "PYTHONUNBUFFERED": "1",  # else a pipe holds lines back, and a run's page shows them late and in disorder
        },
        start_new_session=True,  # a group of their own, so that a signal reaches DVC, its shell and the stage
    )  # fmt: skip
    clock = threading.Timer(hours * 3600, _signal, [process, signal.SIGTERM]) if hours else None
    try:
        if clock:
            clock.start()
        printed = _print(process)
    except BaseException:  # Prefect's TerminationSignal when the run is cancelled or its worker stops, or Ctrl-C
        _terminate(process)
        raise
    finally:
        late = clock is not None and clock.finished.is_set()
        if clock:
            clock.cancel()
    if process.wait() == 0:
        return
    if late:
        raise RuntimeError(f"stage {stage} had not ended after {hours:g} h; run again to go on from where it was")
    told = next((line for line in printed if line.startswith(("ERROR: ", f"{stage}: "))), (printed or [""])[-1])
    if any(PASSING.search(line) for line in printed):
        raise PassingError(told)
    if pulls and OF_A_REMOTE.match(told) and not working_copy.IN_VAIN.search(told):
        raise PassingError(told)
    raise RuntimeError(f"stage {stage} failed: {told}")


def _print(process: subprocess.Popen[str]) -> list[str]:
    """Prints what a process and those below it print, until all have ended, and gives the last lines."""
    last: list[str] = []
    for line in process.stdout or ():
        if line.strip():
            print(line.rstrip())
            last = [*last[-20:], line.strip()]
    return last


def _terminate(process: subprocess.Popen[str]) -> None:
    """Asks a group of processes to end and waits until they have: training writes a checkpoint first."""
    last_resort = threading.Timer(GRACE, _signal, [process, signal.SIGKILL])
    last_resort.start()
    _signal(process, signal.SIGTERM)
    _print(process)
    process.wait()
    last_resort.cancel()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
