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
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from fadeformer import params
from fadeformer.errors import UserError
from fadeformer.params import Params
from pipelines.experiments import space
from pipelines.experiments.engine import Run, State, Status, digest
from pipelines.experiments.results import Result
from pipelines.experiments.space import AFTER_TRAINING, Range, Sweep, metric_of

IN_A_ROW = 3  # failed trials, after which the next would most likely fail too
SAME, RUN, IDENTITY = "same as trial", "run", "identity"  # attributes of a trial, of a trial, of a study
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def open_study(folder: Path, plan: Sweep, present: Params) -> tuple[optuna.Study, BaseStorage]:
    """The study of a sweep, created if there is none, and where it is kept.

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
    _, goal = metric_of(plan, present)
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=plan.name, direction=goal, load_if_exists=True)
    varied = {*plan.space, *plan.fixed}
    same = {
        key: value for key, value in present.flat().items() if key not in varied and not key.startswith(AFTER_TRAINING)
    }
    asks = {"fixed": plan.fixed, "space": plan.model_dump()["space"], **same}
    known = study.user_attrs.get("asks")
    if known is None:
        study.set_user_attr(IDENTITY, uuid.uuid4().hex)
        study.set_user_attr("asks", asks)
    elif known != asks:
        other = ", ".join(key for key in {**known, **asks} if known.get(key) != asks.get(key))
        raise UserError(
            f"the sweep {plan.name} was started with another {other}; give this one another name:, or remove {path} to"
            " start again"
        )
    study.pruner = _pruner(plan)
    return study, storage


class SweepPlan:
    """The trials of a sweep, from wherever its study is."""

    def __init__(
        self, plan: Sweep, present: Params, study: optuna.Study, storage: BaseStorage, parent: str,
        values: Callable[[int, Result | None], Mapping[int, float]], say: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """Finds the trials that an earlier search has left running; they are resumed first.

        Args:
            plan: what SPACE.yaml says.
            present: params.yaml.
            study: of `open_study`.
            storage: likewise.
            parent: the sweep's MLflow run.
            values: gives the metric of a trial by epoch, from its number, and its result once it has completed.
            say: prints a line.
        """
        self._plan, self._present, self._study, self._storage = plan, present, study, storage
        self._parent, self._values, self._say = parent, values, say
        self._distributions = {key: _distribution(of_key) for key, of_key in plan.space.items()}
        self._left = [one.number for one in study.trials if one.state == TrialState.RUNNING]
        self._trials: dict[Run, Trial] = {}
        self._pruned: dict[Run, int] = {}

    def next(self) -> Run | None:
        """An unfinished trial of an earlier search, or a new one; None if there are as many as asked for."""
        if self._left:
            number = self._left.pop(0)
            study_id = self._storage.get_study_id_from_name(self._study.study_name)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
            return self._run(Trial(self._study, trial_id))
        while self._more():
            self._study.sampler = _sampler(self._plan, len(self._study.trials))
            trial = self._study.ask(self._distributions)
            earlier = self._study.trials[: trial.number]
            same = [one for one in earlier if one.params == trial.params and one.state in ENDED]
            if not same:
                self._say(f"trial {trial.number}: {described(trial.params)}")
                return self._run(trial)
            trial.set_user_attr(SAME, same[0].number)
            value = same[0].value if same[0].state == TrialState.COMPLETE else None
            self._study.tell(trial.number, value, state=same[0].state)
            self._say(
                f"trial {trial.number}: {described(trial.params)} as trial {same[0].number}, which is not run again"
            )
        return None

    def _more(self) -> bool:
        """Whether trials are missing; as many repetitions as trials end the search: everything has been tried."""
        repeated = sum(SAME in one.user_attrs for one in self._study.trials)
        return len(self._study.trials) - repeated < self._plan.trials and repeated < self._plan.trials

    def _run(self, trial: Trial) -> Run:
        values = space.values_of(self._present, {**self._plan.fixed, **trial.params})
        name = f"{self._plan.name}-{trial.number:03d}-{digest(params.parse(values, 'params.yaml'))}"
        run = Run(name, values, until="train", trial=f"{self._parent}/{trial.number}")
        self._trials[run] = trial
        return run

    def hopeless(self, run: Run) -> bool:
        """Reports new epochs to Optuna and returns True if the trial is to be stopped."""
        return run not in self._pruned and self._report(run, self._values(self._trials[run].number, None), prune=True)

    def _report(self, run: Run, values: Mapping[int, float], prune: bool) -> bool:
        trial = self._trials[run]
        known = self._study.trials[trial.number].intermediate_values
        for epoch in sorted(values.keys() - known.keys()):
            if math.isfinite(values[epoch]):
                trial.report(values[epoch], epoch)
                if prune and trial.should_prune():
                    self._pruned[run] = epoch
                    return True
        return False

    def ended(self, run: Run, status: Status) -> None:
        """Tells Optuna how a trial ended.

        Raises:
            UserError: several trials in a row have failed.
        """
        number = self._trials[run].number
        if status.state is State.COMPLETED and status.result:
            self._complete(run, status.result)
        elif status.state is State.STOPPED and run in self._pruned:
            self._study.tell(number, state=TrialState.PRUNED)
            self._say(f"trial {number}: stopped at epoch {self._pruned[run]}, worse than the median of the others")
        else:
            message = status.message if status.state is State.FAILED else "cancelled"
            self._study.tell(number, state=TrialState.FAIL)
            self._say(f"trial {number}: {f'failed, {message}' if status.state is State.FAILED else message}")
            last = [one for one in self._study.trials if one.state.is_finished()][-IN_A_ROW:]
            if len(last) == IN_A_ROW and all(one.state == TrialState.FAIL for one in last):
                raise UserError(f"{IN_A_ROW} trials in a row have failed, the last with: {message}")

    def _complete(self, run: Run, result: Result) -> None:
        trial = self._trials[run]
        number, values = trial.number, self._values(trial.number, result)
        self._report(run, values, prune=False)
        trial.set_user_attr(RUN, result.name)
        finite = [value for value in values.values() if math.isfinite(value)]
        if not finite:
            self._study.tell(number, state=TrialState.FAIL)
            self._say(f"trial {number}: failed, its metric is not defined in any epoch")
            return
        value = max(finite) if self._study.direction == StudyDirection.MAXIMIZE else min(finite)
        self._study.tell(number, value)
        best = self._study.best_trial.number
        place = ", the best so far" if best == number else f" (best: trial {best})"
        self._say(f"trial {number}: {value:.4f}{place}")


def described(values: Mapping[str, Any]) -> str:
    """Keys and values in a line, numbers shortened."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _distribution(of_key: Range | list[Any]) -> BaseDistribution:
    if isinstance(of_key, list):
        return CategoricalDistribution(of_key)
    if of_key.whole:
        return IntDistribution(int(of_key.low), int(of_key.high), log=of_key.log, step=int(of_key.step or 1))
    return FloatDistribution(float(of_key.low), float(of_key.high), log=of_key.log, step=of_key.step)


def _sampler(plan: Sweep, number: int) -> BaseSampler:
    """One for each trial, so that what it proposes does not depend on when the search was resumed."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    if plan.sampler == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=plan.startup_trials)


def _pruner(plan: Sweep) -> BasePruner:
    if plan.pruner == "none":
        return NopPruner()
    return MedianPruner(n_startup_trials=plan.startup_trials, n_warmup_steps=plan.warmup_epochs + 1)
