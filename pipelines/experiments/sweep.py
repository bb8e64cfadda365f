"""A sweep: Optuna proposes the next run, its metric by epoch decides whether it is stopped.

Optuna's study is in its own journal, `mlruns/sweeps/NAME.jsonl`, beside MLflow's store and the ledger.
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

MAX_CONSECUTIVE_FAILURES = 3  # failed trials, after which the next would most likely fail too
REPEATED_ATTRIBUTE, RUN_ATTRIBUTE, IDENTITY_ATTRIBUTE = (
    "repeated",
    "run",
    "identity",
)  # attributes of a trial, of a trial, of a study


def open_study(folder: Path, plan: SweepConfig, present: Params) -> tuple[optuna.Study, BaseStorage]:
    """Return the study of a sweep, which is created if there is none, and its storage.

    Args:
        folder: of all sweeps.
        plan: this one.
        present: params.yaml.

    Raises:
        UserError: there is one of that name that varies other keys or values, or whose trials were made with another
            params.yaml: their values could not be compared.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.name}.jsonl"
    _, goal = objective_of(plan, present)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=plan.name, direction=goal, load_if_exists=True)
    varied = {*plan.space, *plan.fixed}
    same = {
        key: value
        for key, value in present.as_flat_dict().items()
        if key not in varied and not key.startswith(POST_TRAINING_SECTIONS)
    }
    asks = {"fixed": plan.fixed, "space": plan.space, **same}
    known = study.user_attrs.get("asks")
    if known is None:
        study.set_user_attr(IDENTITY_ATTRIBUTE, uuid.uuid4().hex)
        study.set_user_attr("asks", asks)
    elif known != asks:
        other = ", ".join(key for key in {**known, **asks} if known.get(key) != asks.get(key))
        raise UserError(
            f"the sweep {plan.name} was started with another {other}; give this one another name:, or remove {path} to"
            " start again"
        )
    pruner = MedianPruner(n_startup_trials=plan.startup_trials, n_warmup_steps=plan.warmup_epochs + 1)
    study.pruner = pruner if plan.pruner == "median" else NopPruner()
    return study, storage


class SweepPlan(Plan):
    """The trials of a sweep, from wherever its study is; those that an earlier search has left running come first.

    Args:
        plan: what SPACE.yaml says.
        present: params.yaml.
        study: of `open_study`.
        storage: likewise.
        parent: the sweep's MLflow run.
        values: gives the metric of a trial by epoch, from its number, and its result once it has completed.
    """

    def __init__(
        self, plan: SweepConfig, present: Params, study: optuna.Study, storage: BaseStorage, parent: str,
        values: Callable[[int, RunResult | None], Mapping[int, float]],
    ) -> None:  # fmt: skip
        self._plan, self._present, self._study, self._storage = plan, present, study, storage
        self._parent, self._values = parent, values
        self._left = [one.number for one in study.trials if one.state == TrialState.RUNNING]
        self._trials: dict[PipelineRun, Trial] = {}
        self._pruned: dict[PipelineRun, int] = {}
        self._failed = 0  # in a row

    def next_run(self) -> PipelineRun | None:
        """Return an unfinished trial of an earlier search, or a new one; None if there are as many as asked for."""
        if self._left:
            number = self._left.pop(0)
            study_id = self._storage.get_study_id_from_name(self._study.study_name)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return self._create_run(Trial(self._study, trial_id))
        distributions: dict[str, BaseDistribution] = {
            key: space.parse_distribution(of_key) for key, of_key in self._plan.space.items()
        }
        while self._has_more_trials():
            self._study.sampler = _create_sampler(self._plan, len(self._study.trials))
            trial = self._study.ask(distributions)
            if trial.params not in [one.params for one in self._study.trials[: trial.number]]:
                _print_trial(trial.number, format_values(trial.params))
                return self._create_run(trial)
            trial.set_user_attr(REPEATED_ATTRIBUTE, True)
            self._study.tell(trial.number, state=TrialState.FAIL)
            _print_trial(trial.number, f"{format_values(trial.params)} was tried before and is not run again")
        return None

    def _has_more_trials(self) -> bool:
        """Whether trials are missing; as many repetitions as trials end the search: everything has been tried."""
        repeated = sum(REPEATED_ATTRIBUTE in one.user_attrs for one in self._study.trials)
        return len(self._study.trials) - repeated < self._plan.trials and repeated < self._plan.trials

    def _create_run(self, trial: Trial) -> PipelineRun:
        values = space.params_with_overrides(self._present, {**self._plan.fixed, **trial.params})
        name = f"{self._plan.name}-{trial.number:03d}-{params_digest(schema.parse_params(values, 'params.yaml'))}"
        run = PipelineRun(name, values, last_stage="train", trial=f"{self._parent}/{trial.number}")
        self._trials[run] = trial
        return run

    def should_prune(self, run: PipelineRun) -> bool:
        """Report new epochs to Optuna and return True if the trial is to be stopped."""
        return run not in self._pruned and self._report_epochs(
            run, self._values(self._trials[run].number, None), prune=True
        )

    def _report_epochs(self, run: PipelineRun, values: Mapping[int, float], prune: bool) -> bool:
        trial = self._trials[run]
        known = self._study.trials[trial.number].intermediate_values
        for epoch in sorted(values.keys() - known.keys()):
            if math.isfinite(values[epoch]):
                trial.report(values[epoch], epoch)
                if prune and trial.should_prune():
                    self._pruned[run] = epoch
                    return True
        return False

    def on_run_end(self, run: PipelineRun, status: RunStatus) -> None:
        """Tell Optuna how a trial ended.

        Raises:
            UserError: several trials in a row have failed.
        """
        number = self._trials[run].number
        if status.state == "Completed" and status.result:
            message = self._complete_trial(run, status.result)
        elif status.state == "Stopped" and run in self._pruned:
            self._study.tell(number, state=TrialState.PRUNED)
            message = f"stopped at epoch {self._pruned[run]}, worse than the median of the others"
        else:
            self._study.tell(number, state=TrialState.FAIL)
            message = f"failed, {status.message}" if status.state == "Failed" else "cancelled"
        _print_trial(number, message)
        self._failed = self._failed + 1 if self._study.trials[number].state == TrialState.FAIL else 0
        if self._failed == MAX_CONSECUTIVE_FAILURES:
            raise UserError(f"{MAX_CONSECUTIVE_FAILURES} trials in a row have failed, the last: {message}")

    def _complete_trial(self, run: PipelineRun, result: RunResult) -> str:
        trial, values = self._trials[run], self._values(self._trials[run].number, result)
        self._report_epochs(run, values, prune=False)
        trial.set_user_attr(RUN_ATTRIBUTE, result.name)
        finite = [value for value in values.values() if math.isfinite(value)]
        if not finite:
            self._study.tell(trial.number, state=TrialState.FAIL)
            return "failed, its metric is not defined in any epoch"
        value = max(finite) if self._study.direction == StudyDirection.MAXIMIZE else min(finite)
        self._study.tell(trial.number, value)
        best = self._study.best_trial.number
        return f"{value:.4f}{', the best so far' if best == trial.number else f' (best: trial {best})'}"


def format_values(values: Mapping[str, Any]) -> str:
    """Keys and values in a line, numbers shortened."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _print_trial(number: int, message: str) -> None:
    print(f"trial {number}: {message}", flush=True)


def _create_sampler(plan: SweepConfig, number: int) -> BaseSampler:
    """One for each trial, so that what it proposes does not depend on when the search was resumed."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    if plan.sampler == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=plan.startup_trials)
