"""`fadeformer sweep`: search the values of params.yaml that train best, judged by val alone."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.experiments import engine, runners, space, sweep, sweep_runs
from pipelines.experiments.results import Result
from pipelines.experiments.space import Sweep
from pipelines.tracking import runs, store

FOLDER = Path("mlruns/sweeps")
LOGS = Path(".cache/sweeps")
EVALUATE = "evaluation/evaluate"  # the deployment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which values."""
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to vary; docs/sweeps.md")


def run(arguments: argparse.Namespace) -> str:
    """Search, from wherever an earlier search of that name has stopped."""
    present = schema.load(paths.PARAMS)
    plan = space.load(arguments.space, present)
    metric, _ = space.metric_of(plan, present)
    with runners.runner(LOGS / plan.name) as runner:
        study, storage = sweep.open_study(Path.cwd() / FOLDER, plan, present)
        space_of = {f"space.{key}": str(of_key) for key, of_key in plan.space.items()}
        parent = sweep_runs.begin(plan.name, study.user_attrs[sweep.IDENTITY], space_of)

        def values(number: int, result: Result | None) -> Mapping[int, float]:
            """Of a trial that runs from MLflow; none while that is away."""
            if result:
                return result.by_epoch(metric)
            with suppress(store.Unreachable):
                return sweep_runs.values(parent, number, metric)
            return {}

        if study.trials:
            left = sum(one.state == TrialState.RUNNING for one in study.trials)
            print(f"{plan.name}: {len(study.trials) - left} trials have ended, {left} are resumed", flush=True)
        try:
            trials = sweep.SweepPlan(plan, present, study, storage, parent, values)
            engine.execute(trials, runner, plan.at_once)
        except BaseException:
            with suppress(store.Unreachable):
                runs.mark(parent, "KILLED")
            raise
        on_a_server = isinstance(runner, runners.PrefectRunner)
        return _end(plan, present, study, parent, metric, on_a_server=on_a_server)


def _end(plan: Sweep, present: Params, study: optuna.Study, parent: str, metric: str, *, on_a_server: bool) -> str:
    """Log the result to MLflow; return a summary with the command that evaluates the best trial."""
    made = [one for one in study.trials if sweep.REPEATED not in one.user_attrs]
    done = [one for one in made if one.state == TrialState.COMPLETE]
    if not done:
        runs.mark(parent, "FAILED")
        raise UserError(f"none of the {len(made)} trials of {plan.name} has ended well")
    best, stopped = study.best_trial, sum(one.state == TrialState.PRUNED for one in made)
    value = float(study.best_value)
    sweep_runs.end(parent, metric, value, best.params, study.trials_dataframe())
    command = (
        f"prefect deployment run {EVALUATE} --param of={best.user_attrs[sweep.RUN]}"
        if on_a_server
        else _evaluation(present, {**plan.fixed, **best.params})
    )
    return (
        f"{len(done)} of {len(made)} trials ran to their end, {stopped} were stopped early; no image of test"
        f" was looked at. The best is trial {best.number}: {metric} {value:.4f} with"
        f" {sweep.described(best.params)}. This evaluates and judges it, without another training:\n{command}"
    )


def _evaluation(present: Params, values: Mapping[str, Any]) -> str:
    """Return the command that runs the pipeline with a trial's values; DVC restores its training from the cache."""
    changed = runners.differences(present.nested(), space.values_of(present, values))
    return shlex.join(["dvc", "exp", "run", *[f"--set-param={key}={runners.literal(value)}" for key, value in changed]])
