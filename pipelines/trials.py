"""The trials of a sweep: each is a run of the deployment `trial/sweep`, and an MLflow run below that of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Scheduled

from fadeformer.errors import PassingError, UserError
from fadeformer.params import Params
from pipelines import space, store, sweep_runs
from pipelines.space import Sweep
from pipelines.sweeping import Look, State

DEPLOYMENT = "trial/sweep"
ENDS = {StateType.COMPLETED: State.COMPLETED, StateType.CANCELLED: State.CANCELLED, StateType.FAILED: State.FAILED}


class PrefectTrials:
    """Runs trials on the server of `PREFECT_API_URL`, and reads in MLflow what they measure."""

    def __init__(self, plan: Sweep, present: Params, parent: str) -> None:
        """Takes what a trial is given.

        Args:
            plan: the sweep.
            present: params.yaml, of which a trial changes what the sweep says.
            parent: the sweep's MLflow run.
        """
        self._plan, self._present, self._parent = plan, present, parent
        self._metric, _ = space.metric_of(plan, present)

    def begin(self, number: int, attempt: int, changes: Mapping[str, Any]) -> str:
        """Begins a trial and gives its Prefect run; the same number and attempt once more give the same run."""
        try:
            run = run_deployment(
                DEPLOYMENT, timeout=0, flow_run_name=_name(self._plan, number),
                idempotency_key=f"{self._parent} {number} {attempt}", as_subflow=False,
                parameters={
                    "changes": space.values_of(self._present, changes), "parent": self._parent, "number": number
                },
            )  # fmt: skip
        except ObjectNotFound as error:
            raise UserError(f"the Prefect server has no deployment {DEPLOYMENT}; `make deploy` makes it") from error
        except httpx.TransportError as error:
            raise _away(error) from error
        return str(run.id)

    def look(self, run: str, number: int) -> Look:
        """What is seen of a run; of values none while MLflow is away, as the trial itself keeps them until later."""
        try:
            with get_client(sync_client=True) as client:
                found = client.read_flow_run(UUID(run))
        except ObjectNotFound:
            return Look(State.FAILED, {}, f"Prefect's run {run} was deleted")
        except httpx.TransportError as error:
            raise _away(error) from error
        state = _state(found)
        try:
            values = sweep_runs.values(self._parent, number, self._metric)
        except store.Unreachable:
            if state == State.COMPLETED:
                raise
            values = {}
        return Look(state, values, (found.state.message or "") if found.state else "")

    def stop(self, run: str) -> None:
        """Cancels a run, whose training then writes a checkpoint; one that has ended stays as it is."""
        try:
            with get_client(sync_client=True) as client:
                if _state(client.read_flow_run(UUID(run))) == State.BEGUN:
                    client.set_flow_run_state(UUID(run), Cancelling())
        except httpx.TransportError as error:
            raise _away(error) from error

    def take_up(self, run: str) -> None:
        """Schedules a run again that nobody carries any more, since the worker that did was killed, or ends it."""
        with get_client(sync_client=True) as client:
            found = client.read_flow_run(UUID(run))
            if found.state_type == StateType.CANCELLING:
                client.set_flow_run_state(UUID(run), Cancelled(), force=True)
            elif found.state_type in (StateType.RUNNING, StateType.PENDING, StateType.CRASHED):
                client.set_flow_run_state(UUID(run), Scheduled(), force=True)


def experiment(plan: Sweep, number: int, run: str) -> str:
    """Name of the DVC experiment that a trial has left."""
    return f"{_name(plan, number)}-{run[:8]}"


def _name(plan: Sweep, number: int) -> str:
    return f"{plan.name}-{number:03d}"


def _state(run: FlowRun) -> State:
    """One that has crashed is scheduled again, by an automation."""
    return State.BEGUN if run.state_type is None else ENDS.get(run.state_type, State.BEGUN)


def _away(error: Exception) -> PassingError:
    return PassingError(
        f"Prefect's server does not answer ({error or type(error).__name__}); the trials that run go on: start it, then"
        " begin the sweep again"
    )
