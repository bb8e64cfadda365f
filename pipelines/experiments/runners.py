"""How runs are executed: by `dvc exp run --temp` on this machine, or by a deployment on a Prefect server."""

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
STOP_TIMEOUT = 60.0  # seconds that runs may take to stop: training writes a checkpoint


@contextmanager
def open_runner(logs: Path) -> Iterator[Runner]:
    """Prefect's workers if `PREFECT_API_URL` names a server, else DVC, with one temporary Prefect server for all runs.

    Args:
        logs: folder for what runs of DVC print. It is locked until this process and all these runs have ended.

    Raises:
        PassingError: the folder is locked.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / ".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TransientError(
                f"another command works on {logs.name}, or runs that it started go on; repeat this one when they have"
                " ended"
            ) from error
        configured = bool(os.environ.get("PREFECT_API_URL"))  # before the temporary server sets it
        with server.temporary_server():
            if configured:
                yield PrefectRunner(DEPLOYMENT, flow_parameters)
                return
            local = DvcRunner(logs)
            try:
                yield local
            finally:
                local.wait()


def flow_parameters(run: PipelineRun) -> dict[str, Any]:
    """Parameters of the deployment for a run."""
    return {"values": run.params, "until": run.last_stage, "trial": run.trial}


class DvcRunner:
    """Runs `dvc exp run --temp` for each run, in a process group of its own.

    Args:
        logs: folder of what each run prints.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        site = str(Path.cwd() / ".cache/dvc")  # .dvc/config names it relative to this folder
        self._environment = {**os.environ, "DVC_SITE_CACHE_DIR": site, "PYTHONUNBUFFERED": "1"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()

    def start(self, run: PipelineRun) -> None:
        """Start a run."""
        present = schema.load_params(paths.PARAMS).as_nested_dict()
        options = [f"--set-param={key}={hydra_literal(value)}" for key, value in diff_params(present, run.params)]
        options += [f"--copy-paths={path}" for path in untracked_inputs(run.params)]
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp", "--name", run.name]
        with self._log(run).open("wb") as log:
            self._processes[run.name] = subprocess.Popen(
                [*command, *options, run.last_stage], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment | ({TRIAL_VARIABLE: run.trial} if run.trial else {}),
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops its runs
                close_fds=False,  # DVC inherits the lock
            )  # fmt: skip

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a run that was started."""
        code = self._processes[run.name].poll()
        if code is None:
            return RunStatus("Running")
        if code == 0:
            return RunStatus("Completed")
        if run.name in self._stopped:
            return RunStatus("Stopped")
        log = self._log(run)
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-2:]
        return RunStatus("Failed", "\n".join([f"exit status {code}; {log} ends with:", *last]))

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Interrupt runs: DVC waits for its stage, which writes a checkpoint, and removes its temporary folder."""
        for run in runs:
            if run.name not in self._stopped:
                self._stopped.add(run.name)
                _send_signal(self._processes[run.name], signal.SIGINT)

    def wait(self) -> None:
        """Return when all processes have ended; those that take too long are killed."""
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
    """Runs a deployment on the server of `PREFECT_API_URL` for each run.

    Args:
        deployment: its name.
        parameters: of the deployment for a run.
        key: of whoever starts the runs: with the same key, a run of the same name is started only once. Without one,
            it is started again after it has ended.
    """

    def __init__(self, deployment: str, parameters: Callable[[PipelineRun], dict[str, Any]], key: str = "") -> None:
        self._deployment, self._parameters, self._key = deployment, parameters, key
        self.flow_run_ids: dict[str, Any] = {}

    def start(self, run: PipelineRun) -> None:
        """Start a run, or find it where an earlier command has started it."""
        over = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CANCELLING]
        unfinished = filters.FlowRunFilter(
            name=filters.FlowRunFilterName(any_=[run.name]),
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(not_any_=over)),
        )
        with _translate_server_errors(), get_client(sync_client=True) as client:
            known = [] if self._key else client.read_flow_runs(flow_run_filter=unfinished, limit=1)
            started: Any = known[0] if known else run_deployment(  # which the types say is a coroutine
                self._deployment, parameters=self._parameters(run), flow_run_name=run.name, timeout=0,
                idempotency_key=f"{self._key}/{run.name}" if self._key else None, as_subflow=False,
            )  # fmt: skip
            self.flow_run_ids[run.name] = started.id

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a run; a crashed run counts as running, since an automation reschedules it."""
        with _translate_server_errors(), get_client(sync_client=True) as client:
            state = client.read_flow_run(self.flow_run_ids[run.name]).state or Pending()
        if state.type is StateType.CANCELLED:
            return RunStatus("Stopped")
        if state.type is StateType.FAILED:
            return RunStatus("Failed", state.message or "")
        return RunStatus("Completed" if state.type is StateType.COMPLETED else "Running")

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Cancel runs; Prefect leaves those that have ended as they are."""
        with _translate_server_errors(), get_client(sync_client=True) as client:
            for run in runs:
                client.set_flow_run_state(self.flow_run_ids[run.name], Cancelling())


@contextmanager
def _translate_server_errors() -> Iterator[None]:
    """Raise PassingError where Prefect's server does not answer."""
    try:
        yield
    except ObjectNotFound as error:
        raise UserError(f"the Prefect server has no such run or deployment; run `make deploy` ({error})") from error
    except httpx.TransportError as error:
        raise TransientError(
            f"the Prefect server does not answer ({error or type(error).__name__}); its runs go on: start it, then"
            " repeat the command"
        ) from error


def diff_params(present: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys whose values differ; a section with other keys is replaced as a whole."""
    for key, value in values.items():
        before = present[key]
        if isinstance(value, Mapping) and isinstance(before, Mapping) and value.keys() == before.keys():
            yield from diff_params(before, value, f"{prefix}{key}.")
        elif value != before or isinstance(value, bool) != isinstance(before, bool):
            yield f"{prefix}{key}", value


def hydra_literal(value: Any) -> str:
    """A value in the grammar of DVC's `--set-param`: JSON, but for the keys of a section.

    Raises:
        UserError: a text holds a character that the grammar has another use for.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_literal(inner)}" for key, inner in value.items()) + "}"
    text = json.dumps(value, ensure_ascii=False)
    if "\\" in text or "${" in text:
        raise UserError(f"params.yaml: {text} cannot be passed to DVC: it has a backslash, a double quote or ${{")
    return text


def untracked_inputs(values: Mapping[str, Any]) -> list[str]:
    """What a run needs of this folder that git may not have: the user's own images, splits, weights and checksums."""
    dataset = values["dataset"]
    own = [dataset["root"]] if dataset["name"] in ("folder", "npz") else []
    named = [
        *own,
        values["split"]["adopted"],
        values["model"]["weights"],
        str(paths.DATASET_LOCK),
        str(paths.HASH_SALT),
    ]
    return [name for name in named if not Path(name).is_absolute() and Path(name).exists()]
