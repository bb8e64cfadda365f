"""Scheduler for many pipeline runs: starts them, a few in parallel, skips finished ones, and records their status.

A plan (a list or a sweep) yields the next run. A runner executes runs: DVC on this machine, or Prefect's workers.
A finished run is a DVC experiment whose name ends in a digest of all parameters that determine its results.
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

POLL_INTERVAL = 2.0  # seconds between two status checks
DATA_SECTIONS = ("dataset", "split", "validate", "preprocess")  # sections of params.yaml that determine the images
TRAINING_SECTIONS = (*DATA_SECTIONS, "seed", "model", "augment", "train")  # ... and the model


@dataclass(frozen=True)
class PipelineRun:
    """One run of the pipeline.

    Attributes:
        name: Name of the DVC experiment.
        params: All of params.yaml, nested.
        last_stage: preprocess, train or evaluate; empty if the results are not read from the DVC experiment.
        trial: MLflow run of the sweep and number of the trial, such as `RUN/3`; empty for other runs.
    """

    name: str
    params: Mapping[str, Any] = field(compare=False)
    last_stage: str = "evaluate"
    trial: str = ""


@dataclass(frozen=True)
class RunStatus:
    """State of a run (scheduled runs count as running), reason of a failure, and result of a completed run."""

    state: Literal["Running", "Completed", "Stopped", "Failed"]
    message: str = ""
    result: RunResult | None = None


class Runner(Protocol):
    """Executes runs."""

    def start(self, run: PipelineRun) -> None:
        """Start a run, or find it if an earlier command has started it."""

    def status(self, run: PipelineRun) -> RunStatus:
        """Return the status of a started run."""

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        """Request that runs stop; training writes a checkpoint first."""


class Plan(Protocol):
    """Yields the runs of an experiment."""

    def next_run(self) -> PipelineRun | None:
        """Return the next run, or None if there are no more."""

    def should_prune(self, run: PipelineRun) -> bool:
        """Return True if a run should be stopped early."""
        return False

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Record the final status of a run."""


class ListPlan(Plan):
    """Plan with a fixed list of runs, by key.

    Attributes:
        statuses: Status of each finished run, by key.
    """

    def __init__(self, runs: Mapping[str, PipelineRun]) -> None:
        self._keys = {run: key for key, run in runs.items()}
        self._waiting = iter(runs.values())
        self.statuses: dict[str, RunStatus] = {}

    def next_run(self) -> PipelineRun | None:
        """Return the next run of the list."""
        return next(self._waiting, None)

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Record and print the status; a failure does not stop the other runs."""
        self.statuses[self._keys[run]] = status
        print(f"{self._keys[run]}: {status.message or status.state.lower()}", flush=True)


def execute(plan: Plan, runner: Runner, max_parallel: int) -> None:
    """Execute all runs of a plan.

    A signal or an error stops all runs, except a `TransientError`: the runner's server is unreachable, its runs
    continue, and the next call finds them.

    Args:
        plan: Yields the runs.
        runner: Executes them.
        max_parallel: Maximum number of parallel runs.
    """
    running: list[PipelineRun] = []
    try:
        while True:
            while len(running) < max_parallel and (run := plan.next_run()):
                if run.last_stage and (result := results.find_result(run.name)):
                    plan.on_run_end(run, RunStatus("Completed", "finished earlier", result))
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
                    missing = RunStatus("Failed", "the run left no DVC experiment in this repository")
                    status = RunStatus("Completed", result=result) if result else missing
                plan.on_run_end(run, status)
            time.sleep(POLL_INTERVAL)
    except TransientError:
        raise
    except BaseException:  # Ctrl-C and SIGTERM too
        runner.stop(running)
        raise


def params_digest(config: Params, sections: Iterable[str] = TRAINING_SECTIONS) -> str:
    """Hash sections of params.yaml, and the content of the dataset if it is a single file; 8 hexadecimal digits."""
    values = config.as_nested_dict()
    hashed = {name: values[name] for name in sections}
    root = Path(config.dataset.root)
    if root.is_file():
        hashed["content"] = checksum(root, "sha256")
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]
