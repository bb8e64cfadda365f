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
from pipelines.experiments.results import RunResult
from pipelines.experiments.space import SweepConfig
from pipelines.tracking import runs, store

STUDIES_FOLDER = Path("mlruns/sweeps")
LOGS_FOLDER = Path(".cache/sweeps")
EVALUATE_DEPLOYMENT = "evaluation/evaluate"  # the deployment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which values."""
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="what to vary; docs/how-to/sweeps.md")


def run(arguments: argparse.Namespace) -> str:
    """Search, from wherever an earlier search of that name has stopped."""
    present = schema.load_params(paths.PARAMS)
    plan = space.load_sweep_config(arguments.space, present)
    metric, _ = space.objective_of(plan, present)
    with runners.open_runner(LOGS_FOLDER / plan.name) as runner:
        study, storage = sweep.open_study(Path.cwd() / STUDIES_FOLDER, plan, present)
        space_of = {f"space.{key}": str(of_key) for key, of_key in plan.space.items()}
        parent = sweep_runs.start_sweep_run(plan.name, study.user_attrs[sweep.IDENTITY_ATTRIBUTE], space_of)

        def values(number: int, result: RunResult | None) -> Mapping[int, float]:
            """Of a trial that runs from MLflow; none while that is away."""
            if result:
                return result.metric_history(metric)
            with suppress(store.MLflowUnreachable):
                return sweep_runs.trial_metric_history(parent, number, metric)
            return {}

        if study.trials:
            left = sum(one.state == TrialState.RUNNING for one in study.trials)
            print(f"{plan.name}: {len(study.trials) - left} trials have ended, {left} are resumed", flush=True)
        try:
            trials = sweep.SweepPlan(plan, present, study, storage, parent, values)
            engine.execute(trials, runner, plan.at_once)
        except BaseException:
            with suppress(store.MLflowUnreachable):
                runs.set_status(parent, "KILLED")
            raise
        on_a_server = isinstance(runner, runners.PrefectRunner)
        return _finish(plan, present, study, parent, metric, on_a_server=on_a_server)


def _finish(
    plan: SweepConfig, present: Params, study: optuna.Study, parent: str, metric: str, *, on_a_server: bool
) -> str:
    """Log the result to MLflow; return a summary with the command that evaluates the best trial."""
    made = [one for one in study.trials if sweep.REPEATED_ATTRIBUTE not in one.user_attrs]
    done = [one for one in made if one.state == TrialState.COMPLETE]
    if not done:
        runs.set_status(parent, "FAILED")
        raise UserError(f"none of the {len(made)} trials of {plan.name} has ended well")
    best, stopped = study.best_trial, sum(one.state == TrialState.PRUNED for one in made)
    value = float(study.best_value)
    sweep_runs.finish_sweep_run(parent, metric, value, best.params, study.trials_dataframe())
    command = (
        f"prefect deployment run {EVALUATE_DEPLOYMENT} --param of={best.user_attrs[sweep.RUN_ATTRIBUTE]}"
        if on_a_server
        else _evaluation_command(present, {**plan.fixed, **best.params})
    )
    return (
        f"{len(done)} of {len(made)} trials ran to their end, {stopped} were stopped early; no image of test"
        f" was looked at. The best is trial {best.number}: {metric} {value:.4f} with"
        f" {sweep.format_values(best.params)}. This evaluates and judges it, without another training:\n{command}"
    )


def _evaluation_command(present: Params, values: Mapping[str, Any]) -> str:
    """Return the command that runs the pipeline with a trial's values; DVC restores its training from the cache."""
    changed = runners.diff_params(present.as_nested_dict(), space.params_with_overrides(present, values))
    return shlex.join(
        ["dvc", "exp", "run", *[f"--set-param={key}={runners.hydra_literal(value)}" for key, value in changed]]
    )
