"""`fadeformer sweep`: search hyperparameters in params.yaml by their metric on val."""

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
EVALUATE_DEPLOYMENT = "evaluation/evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the search space."""
    parser.add_argument("space", type=Path, metavar="SPACE.yaml", help="search space; see docs/how-to/sweeps.md")


def run(arguments: argparse.Namespace) -> str:
    """Run the sweep, or resume an interrupted one of the same name."""
    base = schema.load_params(paths.PARAMS)
    config = space.load_sweep_config(arguments.space, base)
    metric, _ = space.objective_of(config, base)
    with runners.open_runner(LOGS_FOLDER / config.name) as runner:
        study, storage = sweep.open_study(Path.cwd() / STUDIES_FOLDER, config, base)
        params = {f"space.{key}": str(definition) for key, definition in config.space.items()}
        parent = sweep_runs.start_sweep_run(config.name, study.user_attrs[sweep.IDENTITY_ATTRIBUTE], params)

        def read_history(number: int, result: RunResult | None) -> Mapping[int, float]:
            """Read the metric of a running trial from MLflow; empty while MLflow is unreachable."""
            if result:
                return result.metric_history(metric)
            with suppress(store.MLflowUnreachable):
                return sweep_runs.trial_metric_history(parent, number, metric)
            return {}

        if study.trials:
            unfinished = sum(trial.state == TrialState.RUNNING for trial in study.trials)
            finished = len(study.trials) - unfinished
            print(f"{config.name}: {finished} trials are finished, {unfinished} are resumed", flush=True)
        try:
            plan = sweep.SweepPlan(config, base, study, storage, parent, read_history)
            engine.execute(plan, runner, config.parallel_trials)
        except BaseException:
            with suppress(store.MLflowUnreachable):
                runs.set_status(parent, "KILLED")
            raise
        on_server = isinstance(runner, runners.PrefectRunner)
        return _finish(config, base, study, parent, metric, on_server=on_server)


def _finish(
    config: SweepConfig, base: Params, study: optuna.Study, parent: str, metric: str, *, on_server: bool
) -> str:
    """Log the result to MLflow; return a summary with the command that evaluates the best trial."""
    trials = [trial for trial in study.trials if sweep.REPEATED_ATTRIBUTE not in trial.user_attrs]
    completed = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if not completed:
        runs.set_status(parent, "FAILED")
        raise UserError(f"none of the {len(trials)} trials of {config.name} has completed")
    best, pruned = study.best_trial, sum(trial.state == TrialState.PRUNED for trial in trials)
    value = float(study.best_value)
    sweep_runs.finish_sweep_run(parent, metric, value, best.params, study.trials_dataframe())
    command = (
        f"prefect deployment run {EVALUATE_DEPLOYMENT} --param experiment={best.user_attrs[sweep.RUN_ATTRIBUTE]}"
        if on_server
        else _evaluation_command(base, {**config.fixed, **best.params})
    )
    return (
        f"{completed} of {len(trials)} trials completed, {pruned} were pruned; test data were not used."
        f" The best is trial {best.number}: {metric} {value:.4f} with {sweep.format_values(best.params)}."
        f" To evaluate it without training again, run:\n{command}"
    )


def _evaluation_command(base: Params, values: Mapping[str, Any]) -> str:
    """Return the command that runs the pipeline with a trial's values; DVC restores its training from the cache."""
    changes = runners.diff_params(base.as_nested_dict(), space.params_with_overrides(base, values))
    options = [f"--set-param={key}={runners.hydra_literal(value)}" for key, value in changes]
    return shlex.join(["dvc", "exp", "run", *options])
