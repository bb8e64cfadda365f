"""Hyperparameter sweep with Optuna: it proposes the next trial, and prunes trials by their validation metric per epoch.

The Optuna study is stored in its own journal, `mlruns/sweeps/NAME.jsonl`, next to MLflow's store and the ledger.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.errors import UserError
from pipelines.experiments import space
from pipelines.experiments.engine import PipelineRun, Plan, RunStatus, params_digest
from pipelines.experiments.results import RunResult
from pipelines.experiments.space import POST_TRAINING_SECTIONS, SweepConfig, objective_of

MAX_CONSECUTIVE_FAILURES = 3  # failed trials in a row that stop the search: the next would most likely fail, too
REPEATED_ATTRIBUTE, RUN_ATTRIBUTE = "repeated", "run"  # user attributes of a trial
IDENTITY_ATTRIBUTE, DEFINITION_ATTRIBUTE = "identity", "definition"  # user attributes of a study


def open_study(folder: Path, config: SweepConfig, base: Params) -> tuple[optuna.Study, BaseStorage]:
    """Return the study of a sweep and its storage; create the study if it does not exist.

    Args:
        folder: Folder of all sweeps.
        config: Definition of this sweep.
        base: Content of params.yaml.

    Raises:
        UserError: A study of that name has another search space or another params.yaml, so that its trials are not
            comparable.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.jsonl"
    _, direction = objective_of(config, base)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=config.name, direction=direction, load_if_exists=True)
    overridden = {*config.space, *config.fixed}
    unchanged = {
        key: value
        for key, value in base.as_flat_dict().items()
        if key not in overridden and not key.startswith(POST_TRAINING_SECTIONS)
    }
    definition = {"fixed": config.fixed, "space": config.space, **unchanged}
    stored = study.user_attrs.get(DEFINITION_ATTRIBUTE)
    if stored is None:
        study.set_user_attr(IDENTITY_ATTRIBUTE, uuid.uuid4().hex)
        study.set_user_attr(DEFINITION_ATTRIBUTE, definition)
    elif stored != definition:
        keys = ", ".join(key for key in {**stored, **definition} if stored.get(key) != definition.get(key))
        raise UserError(
            f"the sweep {config.name} was started with another {keys}; give this one another name:, or remove {path}"
            " to start again"
        )
    pruner = MedianPruner(
        n_startup_trials=config.startup_trials, n_warmup_steps=config.warmup_epochs + 1
    )  # epochs count from 1
    study.pruner = pruner if config.pruner == "median" else NopPruner()
    return study, storage


class SweepPlan(Plan):
    """Plan of a sweep's trials; resumes the trials that an interrupted search left unfinished first.

    Args:
        config: Definition of the sweep.
        base: Content of params.yaml.
        study: Study from `open_study`.
        storage: Its storage, from `open_study`.
        parent: ID of the sweep's MLflow run.
        read_history: Returns the metric of a trial by epoch, given the trial's number and, if it has completed, its
            result.
    """

    def __init__(
        self, config: SweepConfig, base: Params, study: optuna.Study, storage: BaseStorage, parent: str,
        read_history: Callable[[int, RunResult | None], Mapping[int, float]],
    ) -> None:  # fmt: skip
        self._config, self._base, self._study, self._storage = config, base, study, storage
        self._parent, self._read_history = parent, read_history
        self._unfinished = [trial.number for trial in study.trials if trial.state == TrialState.RUNNING]
        self._trials: dict[PipelineRun, Trial] = {}
        self._pruned: dict[PipelineRun, int] = {}
        self._consecutive_failures = 0

    def next_run(self) -> PipelineRun | None:
        """Return an unfinished trial of an earlier search, or a new one; None if the number of trials is reached."""
        if self._unfinished:
            number = self._unfinished.pop(0)
            study_id = self._storage.get_study_id_from_name(self._study.study_name)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return self._create_run(Trial(self._study, trial_id))
        distributions: dict[str, BaseDistribution] = {
            key: space.parse_distribution(definition) for key, definition in self._config.space.items()
        }
        while self._has_more_trials():
            self._study.sampler = _create_sampler(self._config, len(self._study.trials))
            trial = self._study.ask(distributions)
            if trial.params not in [other.params for other in self._study.trials[: trial.number]]:
                _print_trial(trial.number, format_values(trial.params))
                return self._create_run(trial)
            trial.set_user_attr(REPEATED_ATTRIBUTE, True)
            self._study.tell(trial.number, state=TrialState.FAIL)
            _print_trial(trial.number, f"{format_values(trial.params)} was tried before and is not run again")
        return None

    def _has_more_trials(self) -> bool:
        """Return True if trials are missing. As many repeated trials as requested ones mean an exhausted space."""
        repeated = sum(REPEATED_ATTRIBUTE in trial.user_attrs for trial in self._study.trials)
        return len(self._study.trials) - repeated < self._config.trials and repeated < self._config.trials

    def _create_run(self, trial: Trial) -> PipelineRun:
        values = space.params_with_overrides(self._base, {**self._config.fixed, **trial.params})
        name = f"{self._config.name}-{trial.number:03d}-{params_digest(schema.parse_params(values, 'params.yaml'))}"
        run = PipelineRun(name, values, last_stage="train", trial=f"{self._parent}/{trial.number}")
        self._trials[run] = trial
        return run

    def should_prune(self, run: PipelineRun) -> bool:
        """Report new epochs to Optuna and return True if the trial should be pruned."""
        if run in self._pruned:
            return False
        return self._report_epochs(run, self._read_history(self._trials[run].number, None), prune=True)

    def _report_epochs(self, run: PipelineRun, values: Mapping[int, float], prune: bool) -> bool:
        trial = self._trials[run]
        reported = self._study.trials[trial.number].intermediate_values
        for epoch in sorted(values.keys() - reported.keys()):
            if math.isfinite(values[epoch]):
                trial.report(values[epoch], epoch)
                if prune and trial.should_prune():
                    self._pruned[run] = epoch
                    return True
        return False

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Record the final state of a trial in the study.

        Raises:
            UserError: Too many trials in a row have failed.
        """
        number = self._trials[run].number
        if status.state == "Completed" and status.result:
            message = self._complete_trial(run, status.result)
        elif status.state == "Stopped" and run in self._pruned:
            self._study.tell(number, state=TrialState.PRUNED)
            message = f"pruned at epoch {self._pruned[run]}, worse than the median of the other trials"
        else:
            self._study.tell(number, state=TrialState.FAIL)
            message = f"failed, {status.message}" if status.state == "Failed" else "canceled"
        _print_trial(number, message)
        has_failed = self._study.trials[number].state == TrialState.FAIL
        self._consecutive_failures = self._consecutive_failures + 1 if has_failed else 0
        if self._consecutive_failures == MAX_CONSECUTIVE_FAILURES:
            raise UserError(f"{MAX_CONSECUTIVE_FAILURES} trials in a row have failed, the last: {message}")

    def _complete_trial(self, run: PipelineRun, result: RunResult) -> str:
        trial = self._trials[run]
        values = self._read_history(trial.number, result)
        self._report_epochs(run, values, prune=False)
        trial.set_user_attr(RUN_ATTRIBUTE, result.name)
        finite = [value for value in values.values() if math.isfinite(value)]
        if not finite:
            self._study.tell(trial.number, state=TrialState.FAIL)
            return "failed, its metric is undefined in every epoch"
        value = max(finite) if self._study.direction == StudyDirection.MAXIMIZE else min(finite)
        self._study.tell(trial.number, value)
        best = self._study.best_trial.number
        return f"{value:.4f}{', the best so far' if best == trial.number else f' (best: trial {best})'}"


def format_values(values: Mapping[str, Any]) -> str:
    """Format keys and values in one line, with four significant digits."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _print_trial(number: int, message: str) -> None:
    print(f"trial {number}: {message}", flush=True)


def _create_sampler(config: SweepConfig, number: int) -> BaseSampler:
    """Create the sampler of a trial; a new one for each, so that proposals do not depend on resumption."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.sampler == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=config.startup_trials)
