"""The scheduler of many runs: starts them, some at a time, skips those that are finished, and reports how each ended.

A plan (a grid or a sweep) says which run comes next. A runner carries them: DVC on this machine, or Prefect's workers.
A finished run is a DVC experiment; its name holds a digest of everything that decides its results, so that the same run
is found again and no other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from fadeformer.errors import PassingError
from fadeformer.files import checksum
from fadeformer.params import Params
from pipelines import paths
from pipelines.experiments import results
from pipelines.experiments.results import Result

INTERVAL = 2.0  # seconds between two looks at the runs
DATA = ("dataset", "split", "validate", "preprocess")  # sections of params.yaml that decide the images
TRAINING = ("seed", "model", "augment", "train")  # and the model
WITHOUT_INFLUENCE = ("preprocess.threads",)
RESULTS = {"preprocess": paths.PROCESSED / "meta.json", "train": paths.RUN, "evaluate": paths.PREDICTIONS}


@dataclass(frozen=True)
class Run:
    """One run of the pipeline.

    Attributes:
        name: of the DVC experiment.
        values: all of params.yaml, nested.
        until: the last stage: preprocess, train or evaluate; empty for a run that is never resumed from its results.
        trial: MLflow run of the sweep and number of the trial, such as `RUN/3`; empty for other runs.
    """

    name: str
    values: Mapping[str, Any] = field(compare=False)
    until: str = "evaluate"
    trial: str = ""


class State(Enum):
    """How far a run is."""

    RUNNING = "Running"  # or scheduled
    COMPLETED = "Completed"
    STOPPED = "Stopped"
    FAILED = "Failed"


@dataclass(frozen=True)
class Status:
    """State of a run.

    Attributes:
        state: how far it is.
        message: why it failed.
        seconds: that it took, where this process has started it.
        result: files of a completed run.
    """

    state: State
    message: str = ""
    seconds: float | None = None
    result: Result | None = None


class Runner(Protocol):
    """Carries runs."""

    detached: bool  # runs go on without this process

    def start(self, run: Run) -> None:
        """Starts a run; a detached runner first looks for one of that name that was started before."""

    def status(self, run: Run) -> Status:
        """State of a run that was started."""

    def stop(self, runs: Iterable[Run]) -> None:
        """Asks runs to stop; training writes a checkpoint first."""

    def wait(self) -> None:
        """Returns when everything that was asked to stop has stopped, or after a timeout."""


class Plan(Protocol):
    """Decides which runs there are."""

    def next(self) -> Run | None:
        """The next run; None if there is none, or none before another has ended."""

    def hopeless(self, run: Run) -> bool:
        """Return True if a run is not worth its remaining epochs."""

    def ended(self, run: Run, status: Status) -> None:
        """Takes note of how a run ended."""


class Listed:
    """A plan of runs that are known from the start.

    Attributes:
        statuses: of those that have ended, by name.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._waiting = list(runs)
        self.statuses: dict[str, Status] = {}

    def next(self) -> Run | None:
        """The next run of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def hopeless(self, run: Run) -> bool:
        """No run is."""
        return False

    def ended(self, run: Run, status: Status) -> None:
        """Keeps the status."""
        self.statuses[run.name] = status


def execute(plan: Plan, runner: Runner, at_once: int) -> None:
    """Runs everything that a plan asks for.

    Args:
        plan: a grid or a sweep.
        runner: carries the runs. When this function is left by a signal or an error, all runs are stopped, except for
            those of a detached runner whose server does not answer.
        at_once: runs side by side.
    """
    running: dict[Run, float] = {}
    try:
        while True:
            while len(running) < at_once and (run := plan.next()):
                if result := _result(run):
                    plan.ended(run, Status(State.COMPLETED, result=result))
                else:
                    runner.start(run)
                    running[run] = time.monotonic()
            if not running:
                return
            for run, start in list(running.items()):
                status = runner.status(run)
                if status.state is not State.RUNNING:
                    del running[run]
                    plan.ended(run, _with_result(run, status, time.monotonic() - start))
                elif plan.hopeless(run):
                    runner.stop([run])
            time.sleep(INTERVAL)
    except BaseException as error:  # Ctrl-C and SIGTERM too
        if not (runner.detached and isinstance(error, PassingError)):
            runner.stop(running)
            runner.wait()
        raise


def _result(run: Run) -> Result | None:
    return results.find(run.name, RESULTS[run.until]) if run.until else None


def _with_result(run: Run, status: Status, seconds: float) -> Status:
    if status.state is not State.COMPLETED or not run.until:
        return status
    result = _result(run)
    if result is None:
        message = f"it completed, but neither this repository nor DVC's cache or remote has {RESULTS[run.until]} of it"
        return Status(State.FAILED, message)
    return Status(State.COMPLETED, seconds=seconds, result=result)


def digest(config: Params, sections: Iterable[str] = (*DATA, *TRAINING)) -> str:
    """Fingerprint of sections of params.yaml, and of the content of a user's own file."""
    chosen = {name: value for name, value in config.flat().items() if name.split(".")[0] in set(sections)}
    for name in WITHOUT_INFLUENCE:
        chosen.pop(name, None)
    root = Path(config.dataset.root)
    if root.is_file():
        chosen["content"] = checksum(root, "sha256")
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
