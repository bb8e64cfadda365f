"""Who carries runs: `dvc exp run --temp` on this machine, or a deployment on a Prefect server."""

from __future__ import annotations

import os
import re
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
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from fadeformer import params
from fadeformer.errors import PassingError, UserError
from pipelines import orchestrator, paths
from pipelines.experiments.engine import Run, Runner, State, Status
from pipelines.tracking import PLACE

DEPLOYMENT = "experiment/run"
TIMEOUT = 60.0  # seconds that runs may take to stop: training writes a checkpoint
ENDS = {
    StateType.COMPLETED: State.COMPLETED, StateType.CANCELLED: State.STOPPED, StateType.FAILED: State.FAILED,
}  # fmt: skip


@contextmanager
def runner(logs: Path) -> Iterator[Runner]:
    """Prefect's workers if `PREFECT_API_URL` names a server, else DVC, with one temporary Prefect server for all runs.

    Args:
        logs: folder for what runs of DVC print.
    """
    configured = bool(os.environ.get("PREFECT_API_URL"))  # before the temporary server sets it
    with orchestrator.temporary_server():
        yield PrefectRunner(DEPLOYMENT, experiment) if configured else DvcRunner(logs)


def experiment(run: Run) -> dict[str, Any]:
    """Parameters of the deployment for a run."""
    return {"values": run.values, "until": run.until, "trial": run.trial}


class DvcRunner:
    """Runs `dvc exp run --temp` for each run, in a process group of its own.

    Attributes:
        logs: folder of what each run prints.
    """

    detached = False

    def __init__(self, logs: Path) -> None:
        """Takes the folder of the logs."""
        self.logs = logs
        site = str(Path.cwd() / ".cache/dvc")  # .dvc/config names it relative to this folder
        self._environment = {**os.environ, "DVC_SITE_CACHE_DIR": site, "PYTHONUNBUFFERED": "1"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()

    def start(self, run: Run) -> None:
        """Starts a run."""
        self.logs.mkdir(parents=True, exist_ok=True)
        present = params.load(paths.PARAMS).nested()
        options = [f"--set-param={key}={literal(value)}" for key, value in differences(present, run.values)]
        options += [f"--copy-paths={path}" for path in untracked(run.values)]
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", "--temp", "--name", run.name]
        with (self.logs / f"{run.name}.log").open("wb") as log:
            self._processes[run.name] = subprocess.Popen(
                [*command, *options, run.until], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment | ({PLACE: run.trial} if run.trial else {}),
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops its runs
            )  # fmt: skip

    def status(self, run: Run) -> Status:
        """State of a run that was started."""
        code = self._processes[run.name].poll()
        if code is None:
            return Status(State.RUNNING)
        if code == 0:
            return Status(State.COMPLETED)
        if run.name in self._stopped:
            return Status(State.STOPPED)
        log = self.logs / f"{run.name}.log"
        return Status(State.FAILED, f"{reason(log.read_text(errors='replace'), code)}; the log is {log}")

    def stop(self, runs: Iterable[Run]) -> None:
        """Interrupts runs: DVC waits for its stage, which writes a checkpoint, and removes its temporary folder."""
        for run in runs:
            if run.name not in self._stopped:
                self._stopped.add(run.name)
                self._signal(self._processes[run.name], signal.SIGINT)

    def wait(self) -> None:
        """Returns when all processes have ended; those that take too long are killed."""
        deadline = time.monotonic() + TIMEOUT
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._signal(process, signal.SIGKILL)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


class PrefectRunner:
    """Runs a deployment on the server of `PREFECT_API_URL` for each run."""

    detached = True

    def __init__(self, deployment: str, parameters: Callable[[Run], dict[str, Any]], group: str = "") -> None:
        """Takes what is run.

        Args:
            deployment: its name.
            parameters: of the deployment for a run.
            group: tag of runs whose names alone do not tell them from those of other commands.
        """
        self._deployment, self._parameters, self._tags = deployment, parameters, [group] if group else []
        self.ids: dict[str, Any] = {}

    def start(self, run: Run) -> None:
        """Starts a run, or finds it where an earlier command has started it."""
        tags = FlowRunFilterTags(all_=self._tags) if self._tags else None
        filters = FlowRunFilter(name=FlowRunFilterName(any_=[run.name]), tags=tags)
        with _answering(), get_client(sync_client=True) as client:
            newest = FlowRunSort.EXPECTED_START_TIME_DESC
            known = client.read_flow_runs(flow_run_filter=filters, sort=newest, limit=1)
            ended = (StateType.FAILED, StateType.CANCELLED, StateType.CANCELLING)
            if known and known[0].state_type not in ended:
                self.ids[run.name] = known[0].id
                return
            try:
                started: Any = run_deployment(  # which the types say is a coroutine
                    self._deployment, parameters=self._parameters(run), flow_run_name=run.name, timeout=0,
                    tags=self._tags, as_subflow=False,
                )  # fmt: skip
                self.ids[run.name] = started.id
            except ObjectNotFound as error:
                missing = f"the Prefect server has no deployment {self._deployment}; run `make deploy`"
                raise UserError(missing) from error

    def status(self, run: Run) -> Status:
        """State of a run that was started; a crashed run counts as running, since an automation reschedules it."""
        try:
            with _answering(), get_client(sync_client=True) as client:
                found: FlowRun = client.read_flow_run(self.ids[run.name])
        except ObjectNotFound:
            return Status(State.FAILED, f"run {self.ids[run.name]} was deleted in Prefect")
        state = State.RUNNING if found.state_type is None else ENDS.get(found.state_type, State.RUNNING)
        return Status(state, (found.state.message or "") if found.state else "")

    def stop(self, runs: Iterable[Run]) -> None:
        """Cancels runs; one that has ended stays as it is."""
        with _answering(), get_client(sync_client=True) as client:
            for run in runs:
                state = client.read_flow_run(self.ids[run.name]).state
                if state is None or not (state.is_final() or state.is_cancelling()):
                    client.set_flow_run_state(self.ids[run.name], Cancelling())

    def wait(self) -> None:
        """Returns at once: the workers see to it."""


@contextmanager
def _answering() -> Iterator[None]:
    """Raises PassingError where Prefect's server does not answer."""
    try:
        yield
    except httpx.TransportError as error:
        raise PassingError(
            f"the Prefect server does not answer ({error or type(error).__name__}); its runs go on: start it, then"
            " repeat the command"
        ) from error


def differences(present: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys whose values differ; a section with other keys is replaced as a whole."""
    for key, value in values.items():
        before = present[key]
        if isinstance(value, Mapping) and isinstance(before, Mapping) and value.keys() == before.keys():
            yield from differences(before, value, f"{prefix}{key}.")
        elif value != before or isinstance(value, bool) != isinstance(before, bool):
            yield f"{prefix}{key}", value


def literal(value: Any) -> str:
    """A value in the grammar of DVC's `--set-param`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value) + "'"
    return repr(value)


def untracked(values: Mapping[str, Any]) -> list[str]:
    """What a run needs of this folder that git may not have: the user's own images, splits, weights and checksums."""
    dataset = values["dataset"]
    own = [dataset["root"]] if dataset["name"] in ("folder", "npz") else []
    named = [*own, values["split"]["adopted"], values["model"]["weights"], str(paths.PINS), str(paths.SALT)]
    return [name for name in named if not Path(name).is_absolute() and Path(name).exists()]


def reason(printed: str, code: int) -> str:
    """Why a run failed: the last line that its stage printed, before DVC's own errors."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    of_stage = [line for line in lines if not line.startswith("ERROR: failed to reproduce")]
    return of_stage[-1] if of_stage else f"exit status {code}, and nothing was printed"
