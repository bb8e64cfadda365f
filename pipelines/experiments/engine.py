"""The scheduler of many runs: starts them, some at a time, skips those that are finished, and reports how each ended.

A plan (a list or a sweep) says which run comes next. A runner carries them: DVC on this machine, or Prefect's workers.
A finished run is a DVC experiment; its name holds a digest of everything that decides its results, so that the same run
is found again and no other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from fadeformer.errors import PassingError
from fadeformer.files import checksum
from fadeformer.params import Params
from pipelines.experiments import results
from pipelines.experiments.results import Result

INTERVAL = 2.0  # seconds between two looks at the runs
DATA = ("dataset", "split", "validate", "preprocess")  # sections of params.yaml that decide the images
TRAINING = ("seed", "model", "augment", "train")  # and the model
WITHOUT_INFLUENCE = ("preprocess.threads",)


@dataclass(frozen=True)
class Run:
    """One run of the pipeline.

    Attributes:
        name: of the DVC experiment.
        values: all of params.yaml, nested.
        until: the last stage: preprocess, train or evaluate; empty for a run that is never taken from its experiment.
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
    """State of a run, why it failed, and the experiment of a completed one."""

    state: State
    message: str = ""
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
        """Returns when all that was asked to stop has stopped."""


class Plan(Protocol):
    """Decides which runs there are."""

    def next(self) -> Run | None:
        """The next run; None if there is none, or none before another has ended."""

    def hopeless(self, run: Run) -> bool:
        """Return True if a run is not worth its remaining epochs."""

    def ended(self, run: Run, status: Status) -> None:
        """Takes note of how a run ended."""


class Listed:
    """A plan of runs that are known from the start, some of which need another one's results.

    Attributes:
        statuses: of runs that have ended, by the keys of the list.
    """

    def __init__(
        self, runs: Mapping[str, Run], needs: Mapping[str, str] | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Takes the runs by any key, the key of the run that another one needs, and what prints a line."""
        self._waiting, self._needs, self._say = dict(runs), needs or {}, say
        self._keys = {run: key for key, run in runs.items()}
        self.statuses: dict[str, Status] = {}

    def next(self) -> Run | None:
        """The first run whose needs are met; one whose needs have failed fails too."""
        for key in list(self._waiting):
            needed = self.statuses.get(self._needs.get(key, ""))
            if key not in self._needs or (needed and needed.result):
                return self._waiting.pop(key)
            if needed:
                self.statuses[key] = Status(State.FAILED, f"{self._needs[key]} has failed")
                del self._waiting[key]
        return None

    def hopeless(self, run: Run) -> bool:
        """No run is."""
        return False

    def ended(self, run: Run, status: Status) -> None:
        """Keeps the status; the other runs go on."""
        self.statuses[self._keys[run]] = status
        self._say(f"{self._keys[run]}: {status.message or status.state.value.lower()}")


def execute(plan: Plan, runner: Runner, at_once: int) -> None:
    """Runs everything that a plan asks for.

    Args:
        plan: says what.
        runner: carries the runs. When this function is left by a signal or an error, all runs are stopped, except for
            those of a detached runner whose server does not answer.
        at_once: runs side by side.
    """
    running: list[Run] = []
    try:
        while True:
            while len(running) < at_once and (run := plan.next()):
                if run.until and (result := results.find(run.name)):
                    plan.ended(run, Status(State.COMPLETED, "finished before", result))
                else:
                    runner.start(run)
                    running.append(run)
            if not running:
                return
            for run in list(running):
                status = runner.status(run)
                if status.state is State.RUNNING:
                    if plan.hopeless(run):
                        runner.stop([run])
                    continue
                running.remove(run)
                if status.state is State.COMPLETED and run.until:
                    result = results.find(run.name)
                    lost = Status(State.FAILED, "it left no DVC experiment in this repository")
                    status = Status(State.COMPLETED, result=result) if result else lost
                plan.ended(run, status)
            time.sleep(INTERVAL)
    except BaseException as error:  # Ctrl-C and SIGTERM too
        if not (runner.detached and isinstance(error, PassingError)):
            runner.stop(running)
            runner.wait()
        raise


def digest(config: Params, sections: Iterable[str] = (*DATA, *TRAINING)) -> str:
    """Fingerprint of sections of params.yaml, and of the content of a user's own file."""
    chosen = {name: value for name, value in config.flat().items() if name.split(".")[0] in set(sections)}
    for name in WITHOUT_INFLUENCE:
        chosen.pop(name, None)
    root = Path(config.dataset.root)
    if root.is_file():
        chosen["content"] = checksum(root, "sha256")
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
