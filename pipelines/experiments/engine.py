"""The scheduler of many runs: starts them, some at a time, skips those that are finished, and reports how each ended.

A plan (a list or a sweep) says which run comes next. A runner executes them: DVC on this machine, or Prefect's workers.
A finished run is a DVC experiment whose name ends in a digest of everything that decides its results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fadeformer.config.schema import Params
from fadeformer.errors import TransientError
from fadeformer.io.atomic import checksum
from pipelines.experiments import results
from pipelines.experiments.results import RunResult

POLL_INTERVAL = 2.0  # seconds between two looks at the runs
DATA_SECTIONS = ("dataset", "split", "validate", "preprocess")  # sections of params.yaml that decide the images
TRAINING_SECTIONS = (*DATA_SECTIONS, "seed", "model", "augment", "train")  # and the model


@dataclass(frozen=True)
class PipelineRun:
    """One run of the pipeline.

    Attributes:
        name: of the DVC experiment.
        values: all of params.yaml, nested.
        until: the last stage: preprocess, train or evaluate; empty for a run that is never taken from its experiment.
        trial: MLflow run of the sweep and number of the trial, such as `RUN/3`; empty for other runs.
    """

    name: str
    params: Mapping[str, Any] = field(compare=False)
    last_stage: str = "evaluate"
    trial: str = ""


@dataclass(frozen=True)
class RunStatus:
    """State of a run (a scheduled one is running), why it failed, and the experiment of a completed one."""

    state: Literal["Running", "Completed", "Stopped", "Failed"]
    message: str = ""
    result: RunResult | None = None


class Runner(Protocol):
    """Executes runs."""

    def start(self, run: PipelineRun) -> None:
        """Start a run, or find it where an earlier command has started it."""

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a run that was started."""

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Ask runs to stop; training writes a checkpoint first."""


class Plan(Protocol):
    """Decides which runs there are."""

    def next_run(self) -> PipelineRun | None:
        """Return the next run; None if there is none."""

    def should_prune(self, run: PipelineRun) -> bool:
        """Return True if a run is not worth its remaining epochs."""
        return False

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Take note of how a run ended."""


class ListPlan(Plan):
    """A plan of runs that are known from the start, by any key.

    Attributes:
        statuses: of the runs that have ended, by key.
    """

    def __init__(self, runs: Mapping[str, PipelineRun]) -> None:
        self._keys = {run: key for key, run in runs.items()}
        self._waiting = iter(runs.values())
        self.statuses: dict[str, RunStatus] = {}

    def next_run(self) -> PipelineRun | None:
        """Return the next run of the list."""
        return next(self._waiting, None)

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Keep the status; the other runs go on."""
        self.statuses[self._keys[run]] = status
        print(f"{self._keys[run]}: {status.message or status.state.lower()}", flush=True)


def execute(plan: Plan, runner: Runner, max_parallel: int) -> None:
    """Run everything that a plan asks for.

    Args:
        plan: says what.
        runner: executes it. A signal or an error stops all runs, except a `PassingError`: their server is away, they
            go on, and the next call finds them.
        max_parallel: runs side by side.
    """
    running: list[PipelineRun] = []
    try:
        while True:
            while len(running) < max_parallel and (run := plan.next_run()):
                if run.last_stage and (result := results.find_result(run.name)):
                    plan.on_run_end(run, RunStatus("Completed", "finished before", result))
                else:
                    runner.start(run)
                    running.append(run)
            if not running:
                return
            for run in list(running):
                status = runner.status(run)
                if status.state == "Running":
                    if plan.should_prune(run):
                        runner.stop([run])
                    continue
                running.remove(run)
                if status.state == "Completed" and run.last_stage:
                    result = results.find_result(run.name)
                    lost = RunStatus("Failed", "it left no DVC experiment in this repository")
                    status = RunStatus("Completed", result=result) if result else lost
                plan.on_run_end(run, status)
            time.sleep(POLL_INTERVAL)
    except TransientError:
        raise
    except BaseException:  # Ctrl-C and SIGTERM too
        runner.stop(running)
        raise


def params_digest(config: Params, sections: Iterable[str] = TRAINING_SECTIONS) -> str:
    """Fingerprint of sections of params.yaml, and of the content of a user's own file."""
    values = config.as_nested_dict()
    chosen = {name: values[name] for name in sections}
    root = Path(config.dataset.root)
    if root.is_file():
        chosen["content"] = checksum(root, "sha256")
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
