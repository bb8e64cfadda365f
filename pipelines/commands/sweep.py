"""`fadeformer sweep`: search the values of params.yaml that train best, judged by val alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from fadeformer import params
from fadeformer.errors import UserError
from pipelines import local_worker, orchestrator, overrides, paths, places, space, store, sweep_runs, sweeping, tracking
from pipelines.space import Sweep
from pipelines.trials import PrefectTrials, experiment

FOLDER = Path("mlruns/sweeps")
LOG = Path(".prefect/worker.log")
EVALUATE = "evaluation/evaluate"  # the deployment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which values."""
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to vary; docs/sweeps.md")
    parser.add_argument("--apply", action="store_true", help="write the best trial so far into params.yaml instead")


def run(arguments: argparse.Namespace) -> str:
    """Searches, from wherever an earlier search of that name has come to."""
    present = params.load(paths.PARAMS)
    plan = space.load(arguments.space, present)
    folder = places.project() / FOLDER
    if arguments.apply and not (folder / f"{plan.name}.jsonl").is_file():
        raise UserError(f"there is no sweep {plan.name} yet; `fadeformer sweep` without --apply makes it")
    study = sweeping.open_study(folder, plan, present)
    if arguments.apply:
        return _apply(plan, study)
    try:
        with FileLock(folder / f"{plan.name}.lock", timeout=0), _server(plan.at_once) as own:
            parent = _search(plan, study, present, own)
            metric, _ = space.metric_of(plan, present)
            return _end(plan, study, parent, metric, arguments.space if own else None)
    except Timeout as error:
        raise UserError(f"another `fadeformer sweep` works on {plan.name}") from error


def _apply(plan: Sweep, study: optuna.Study) -> str:
    if not any(one.state == TrialState.COMPLETE for one in study.trials):
        raise UserError(f"no trial of {plan.name} has ended well yet; `fadeformer sweep` without --apply makes them")
    best = study.best_trial
    overrides.apply(paths.PARAMS, overrides.nested({**plan.fixed, **best.params}))
    return f"{paths.PARAMS} has trial {best.number} of {plan.name}: {sweeping.described({**plan.fixed, **best.params})}"


def _search(plan: Sweep, study: optuna.Study, present: params.Params, own: bool) -> str:
    """Runs what is left of the trials, and gives the sweep's run in MLflow."""
    space_of = {f"space.{key}": str(of_key) for key, of_key in plan.space.items()}
    parent = sweep_runs.begin(plan.name, study.user_attrs[sweeping.IDENTITY], space_of)
    trials = PrefectTrials(plan, present, parent)
    running = [one.user_attrs.get(sweeping.RUN) for one in study.trials if one.state == TrialState.RUNNING]
    if study.trials:
        print(f"{plan.name}: {len(study.trials) - len(running)} trials have ended, {len(running)} go on")
    for one in running if own else ():
        if one:
            trials.take_up(one)
    try:
        if own:
            with local_worker.working(plan.at_once, LOG):
                sweeping.search(plan, study, trials, _say)
        else:
            sweeping.search(plan, study, trials, _say)
    except BaseException:
        with suppress(store.Unreachable):
            tracking.mark(parent, "KILLED")
        raise
    return parent


def _end(plan: Sweep, study: optuna.Study, parent: str, metric: str, file: Path | None) -> str:
    """Notes in MLflow what was found; tells it, and how the best is judged: in this folder by `file`, or by a run."""
    made = [one for one in study.trials if sweeping.SAME not in one.user_attrs]
    done = [one for one in made if one.state == TrialState.COMPLETE]
    if not done:
        tracking.mark(parent, "FAILED")
        raise UserError(f"none of the {len(made)} trials of {plan.name} has ended well")
    best, stopped = study.best_trial, sum(one.state == TrialState.PRUNED for one in made)
    value = float(study.best_value)
    sweep_runs.end(parent, metric, value, best.params, study.trials_dataframe())
    kept = experiment(plan, best.number, best.user_attrs[sweeping.RUN])
    judged = (
        f"`fadeformer sweep {file} --apply` writes it into {paths.PARAMS}, and `dvc repro` then evaluates and"
        " judges it, without another training"
        if file
        else f"`prefect deployment run {EVALUATE} --param of={kept}` evaluates and judges it"
    )
    return (
        f"{len(done)} of {len(made)} trials ran to their end, {stopped} were stopped early; no image of test"
        f" was looked at. The best is trial {best.number}: {metric} {value:.4f} with"
        f" {sweeping.described(best.params)}. {judged}"
    )


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _server(at_once: int) -> Iterator[bool]:
    """A Prefect server with the deployments; gives whether it is one of this command's own, which has no worker yet."""
    if os.environ.get("PREFECT_API_URL"):
        with orchestrator.temporary_server():
            yield False
        return
    with orchestrator.temporary_server() as address, _in_environment("PREFECT_API_URL", address):
        command = [sys.executable, "-m", "pipelines.deploy", "--at-once", str(at_once)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"`{' '.join(command[1:])}` failed:\n{done.stderr.strip() or done.stdout.strip()}")
        yield True


@contextmanager
def _in_environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
