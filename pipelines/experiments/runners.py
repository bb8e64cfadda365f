"""Runners, which execute runs: `dvc exp run --temp` on this machine, or a deployment on a Prefect server."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, Pending

from fadeformer.config import schema
from fadeformer.errors import TransientError, UserError
from pipelines import paths, server
from pipelines.experiments.engine import PipelineRun, Runner, RunStatus
from pipelines.tracking.runs import TRIAL_VARIABLE

DEPLOYMENT = "experiment/run"
STOP_TIMEOUT = 60.0  # seconds for runs to stop: training writes a checkpoint first


@contextmanager
def open_runner(logs: Path) -> Iterator[Runner]:
    """Yield a runner: Prefect's workers if `PREFECT_API_URL` is set, else DVC with one temporary Prefect server.

    Args:
        logs: Folder for the logs of DVC's runs; it stays locked until this process and all runs have exited.

    Raises:
        TransientError: The folder is locked.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / ".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TransientError(
                f"another command for {logs.name}, or a run that it started, is still active; try again when they have"
                " finished"
            ) from error
        configured = bool(os.environ.get("PREFECT_API_URL"))  # read before the temporary server sets it
        with server.temporary_server():
            if configured:
                yield PrefectRunner(DEPLOYMENT, flow_parameters)
                return
            dvc_runner = DvcRunner(logs)
            try:
                yield dvc_runner
            finally:
                dvc_runner.wait()


def flow_parameters(run: PipelineRun) -> dict[str, Any]:
    """Return the parameters of the deployment `experiment/run` for a run."""
    return {"values": run.params, "last_stage": run.last_stage, "trial": run.trial}


class DvcRunner:
    """Executes each run with `dvc exp run --temp`, in a separate process group.

    Args:
        logs: Folder for the log of each run.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        site_cache = str(Path.cwd() / ".cache/dvc")  # in .dvc/config it is relative to the working directory
        self._environment = {**os.environ, "DVC_SITE_CACHE_DIR": site_cache, "PYTHONUNBUFFERED": "1"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()

    def start(self, run: PipelineRun) -> None:
        """Start a run."""
        base = schema.load_params(paths.PARAMS).as_nested_dict()
        options = [f"--set-param={key}={hydra_literal(value)}" for key, value in diff_params(base, run.params)]
        options += [f"--copy-paths={path}" for path in untracked_inputs(run.params)]
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp", "--name", run.name]
        with self._log(run).open("wb") as log:
            self._processes[run.name] = subprocess.Popen(
                [*command, *options, run.last_stage], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment | ({TRIAL_VARIABLE: run.trial} if run.trial else {}),
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops its runs
                close_fds=False,  # DVC inherits the lock
            )  # fmt: skip

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a started run."""
        code = self._processes[run.name].poll()
        if code is None:
            return RunStatus("Running")
        if code == 0:
            return RunStatus("Completed")
        if run.name in self._stopped:
            return RunStatus("Stopped")
        log = self._log(run)
        last_lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-2:]
        return RunStatus("Failed", "\n".join([f"exit status {code}; {log} ends with:", *last_lines]))

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Interrupt runs; DVC waits until training has written a checkpoint, then removes its temporary folder."""
        for run in runs:
            if run.name not in self._stopped:
                self._stopped.add(run.name)
                _send_signal(self._processes[run.name], signal.SIGINT)

    def wait(self) -> None:
        """Wait until all processes have exited; kill them after `STOP_TIMEOUT` seconds."""
        deadline = time.monotonic() + STOP_TIMEOUT
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _send_signal(process, signal.SIGKILL)

    def _log(self, run: PipelineRun) -> Path:
        return self.logs / f"{run.name}.log"


def _send_signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class PrefectRunner:
    """Executes each run with a deployment on the server at `PREFECT_API_URL`.

    Args:
        deployment: Name of the deployment.
        parameters: Returns the parameters of the deployment for a run.
        idempotency_key: Starts a run of a given name only once per key; without a key, a finished run starts again.
    """

    def __init__(
        self, deployment: str, parameters: Callable[[PipelineRun], dict[str, Any]], idempotency_key: str = ""
    ) -> None:
        self._deployment, self._parameters, self._key = deployment, parameters, idempotency_key
        self.flow_run_ids: dict[str, Any] = {}

    def start(self, run: PipelineRun) -> None:
        """Start a run, or find it if an earlier command has started it."""
        finished = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CANCELLING]
        unfinished = filters.FlowRunFilter(
            name=filters.FlowRunFilterName(any_=[run.name]),
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(not_any_=finished)),
        )
        with _translate_server_errors(), get_client(sync_client=True) as client:
            existing = [] if self._key else client.read_flow_runs(flow_run_filter=unfinished, limit=1)
            flow_run: Any = existing[0] if existing else run_deployment(  # typed as a coroutine, but is none here
                self._deployment, parameters=self._parameters(run), flow_run_name=run.name, timeout=0,
                idempotency_key=f"{self._key}/{run.name}" if self._key else None, as_subflow=False,
            )  # fmt: skip
            self.flow_run_ids[run.name] = flow_run.id

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a run; a crashed run counts as running, because an automation reschedules it."""
        with _translate_server_errors(), get_client(sync_client=True) as client:
            state = client.read_flow_run(self.flow_run_ids[run.name]).state or Pending()
        if state.type is StateType.CANCELLED:
            return RunStatus("Stopped")
        if state.type is StateType.FAILED:
            return RunStatus("Failed", state.message or "")
        return RunStatus("Completed" if state.type is StateType.COMPLETED else "Running")

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Cancel runs; has no effect on finished ones."""
        with _translate_server_errors(), get_client(sync_client=True) as client:
            for run in runs:
                client.set_flow_run_state(self.flow_run_ids[run.name], Cancelling())


@contextmanager
def _translate_server_errors() -> Iterator[None]:
    """Raise errors of Prefect's client as UserError, or as TransientError if the server does not answer."""
    try:
        yield
    except ObjectNotFound as error:
        raise UserError(f"the Prefect server has no such run or deployment; run `make deploy` ({error})") from error
    except httpx.TransportError as error:
        raise TransientError(
            f"the Prefect server does not answer ({error or type(error).__name__}); its runs continue: start it, then"
            " repeat the command"
        ) from error


def diff_params(base: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values that differ from `base`; a section with other keys is yielded as one value."""
    for key, value in values.items():
        base_value = base[key]
        if isinstance(value, Mapping) and isinstance(base_value, Mapping) and value.keys() == base_value.keys():
            yield from diff_params(base_value, value, f"{prefix}{key}.")
        elif value != base_value or isinstance(value, bool) != isinstance(base_value, bool):
            yield f"{prefix}{key}", value


def hydra_literal(value: Any) -> str:
    """Format a value in the Hydra grammar of DVC's `--set-param`: JSON with unquoted keys.

    Raises:
        UserError: A string contains characters with a special meaning in that grammar.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_literal(inner)}" for key, inner in value.items()) + "}"
    text = json.dumps(value, ensure_ascii=False)
    if "\\" in text or "${" in text:
        raise UserError(f"params.yaml: {text} cannot be passed to DVC: it has a backslash, a double quote or ${{")
    return text


def untracked_inputs(values: Mapping[str, Any]) -> list[str]:
    """List input files that git may not track: the user's images, splits and weights, and the recorded checksums."""
    dataset = values["dataset"]
    images = [dataset["root"]] if dataset["name"] in ("folder", "npz") else []
    names = [
        *images,
        values["split"]["adopted"],
        values["split"]["exclude"],
        values["model"]["weights"],
        str(paths.DATASET_LOCK),
        str(paths.HASH_SALT),
    ]
    return [name for name in names if not Path(name).is_absolute() and Path(name).exists()]
