"""The search of a sweep: Optuna proposes, others carry the trials, and what they measure decides what comes next.

Optuna's study lies in its own journal, `mlruns/sweeps/NAME.jsonl`, beside MLflow's store and the ledger. What a trial
was given and where it runs is written there, so that a search that was killed finds its trials again.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from fadeformer.errors import PassingError, UserError
from fadeformer.params import Params
from pipelines.space import AFTER_TRAINING, Range, Sweep, metric_of

LOOK = 2.0  # seconds between two looks at the trials that run
GRACE = 90.0  # seconds that trials have to end when the search does
IN_A_ROW = 3  # trials that fail one after the other, after which the next would most likely fail too
RUN, ATTEMPT, STOPPED, OUTSIDE = "run", "attempt", "stopped at epoch", "ended with the search"  # what a trial notes
SAME = "same as trial"  # likewise
IDENTITY = "identity"  # by which a study knows its runs, and one that was begun anew under its name does not
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class State(Enum):
    """How far a run is."""

    BEGUN = auto()  # or waiting
    COMPLETED = auto()
    CANCELLED = auto()
    FAILED = auto()


class Look(NamedTuple):
    """What is seen of a run.

    Attributes:
        state: how far it is.
        values: the metric by epoch, those that are known.
        message: why it failed.
    """

    state: State
    values: Mapping[int, float]
    message: str = ""


class Carrier(Protocol):
    """Who runs the trials."""

    def begin(self, number: int, attempt: int, changes: Mapping[str, Any]) -> str:
        """Begins a trial and gives its run; the same number and attempt once more give the same run."""

    def look(self, run: str, number: int) -> Look:
        """What is seen of a run."""

    def stop(self, run: str) -> None:
        """Asks a run to end; one that has ended stays as it is."""


def open_study(folder: Path, plan: Sweep, present: Params) -> optuna.Study:
    """The study of a sweep, which is made where there is none.

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
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))), study_name=plan.name, direction=goal, load_if_exists=True
    )
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
            f"the sweep {plan.name} was begun with another {other}; give this one another name:, or remove {path} to"
            " begin anew"
        )
    study.pruner = _pruner(plan)
    return study


def search(plan: Sweep, study: optuna.Study, carrier: Carrier, told: Callable[[str], None] = print) -> None:
    """Runs trials until there are as many as wanted, or as many repetitions; from wherever the study is.

    Args:
        plan: what SPACE.yaml says.
        study: of `open_study`.
        carrier: who runs them.
        told: takes a line for each trial that begins or ends.

    Raises:
        UserError: several trials in a row have failed.
    """
    distributions = {key: _distribution(of_key) for key, of_key in plan.space.items()}
    try:
        while True:
            running = [one for one in study.trials if one.state == TrialState.RUNNING]
            for one in running:
                _attend(Trial(study, one._trial_id), one, plan, study, carrier, told)
            repeated = sum(SAME in one.user_attrs for one in study.trials)
            more = len(study.trials) - repeated < plan.trials and repeated < plan.trials
            if more and len(running) < plan.at_once:
                _begin(study, plan, distributions, carrier, told)
            elif not running:
                return
            else:
                time.sleep(LOOK)
    except PassingError:
        raise  # a server is away: the trials go on, and the same command finds them
    except BaseException:  # Ctrl-C, SIGTERM, or trials that fail
        for one in study.trials:
            if one.state == TrialState.RUNNING and RUN in one.user_attrs:
                Trial(study, one._trial_id).set_user_attr(OUTSIDE, one.user_attrs.get(ATTEMPT, 0))
                carrier.stop(one.user_attrs[RUN])
        _wait_for_ends(study, carrier)
        raise


def _begin(
    study: optuna.Study,
    plan: Sweep,
    distributions: dict[str, BaseDistribution],
    carrier: Carrier,
    told: Callable[[str], None],
) -> None:
    study.sampler = _sampler(plan, len(study.trials))
    trial = study.ask(distributions)
    same = [one for one in study.trials[: trial.number] if one.params == trial.params and one.state in ENDED]
    if same:
        value = same[0].value if same[0].state == TrialState.COMPLETE else None
        trial.set_user_attr(SAME, same[0].number)
        study.tell(trial.number, value, state=same[0].state)
        told(f"trial {trial.number}: {described(trial.params)} as trial {same[0].number}, which is not run again")
        return
    _submit(trial, 0, plan, carrier)
    told(f"trial {trial.number}: {described(trial.params)}")


def _wait_for_ends(study: optuna.Study, carrier: Carrier) -> None:
    """Gives the trials that were asked to end the time for their checkpoints."""
    deadline = time.monotonic() + GRACE
    runs = [
        (one.user_attrs[RUN], one.number)
        for one in study.trials
        if one.state == TrialState.RUNNING and RUN in one.user_attrs
    ]
    while any(carrier.look(*run).state == State.BEGUN for run in runs) and time.monotonic() < deadline:
        time.sleep(LOOK)


def _submit(trial: Trial, attempt: int, plan: Sweep, carrier: Carrier) -> None:
    trial.set_user_attr(ATTEMPT, attempt)
    trial.set_user_attr(RUN, carrier.begin(trial.number, attempt, {**plan.fixed, **trial.params}))


def _attend(
    trial: Trial, known: FrozenTrial, plan: Sweep, study: optuna.Study, carrier: Carrier, told: Callable[[str], None]
) -> None:
    """Looks at a trial that runs, and stops it or notes its end."""
    notes, number = known.user_attrs, known.number
    attempt = notes.get(ATTEMPT, 0)
    if RUN not in notes:  # killed just before its run was noted
        _submit(trial, attempt, plan, carrier)
        return
    seen = carrier.look(notes[RUN], number)
    stopped = notes.get(STOPPED)
    for epoch in sorted(seen.values.keys() - known.intermediate_values.keys()):
        if stopped is None and math.isfinite(seen.values[epoch]):
            trial.report(seen.values[epoch], epoch)
            if seen.state == State.BEGUN and trial.should_prune():
                stopped = epoch
                trial.set_user_attr(STOPPED, epoch)
                carrier.stop(notes[RUN])
    if seen.state == State.BEGUN:
        return
    if seen.state == State.COMPLETED:
        finite = [value for value in seen.values.values() if math.isfinite(value)]
        if not finite:
            study.tell(number, state=TrialState.FAIL)
            told(f"trial {number}: failed, its metric is not defined in any epoch")
            return
        value = max(finite) if study.direction == StudyDirection.MAXIMIZE else min(finite)
        study.tell(number, value)
        told(f"trial {number}: {value:.4f}{_place(study, number)}")
    elif stopped is not None and seen.state == State.CANCELLED:
        study.tell(number, state=TrialState.PRUNED)
        told(f"trial {number}: stopped at epoch {stopped}, worse than the median of the others")
    elif notes.get(OUTSIDE) == attempt and seen.state == State.CANCELLED:
        _submit(trial, attempt + 1, plan, carrier)  # this search ended it, and goes on with it
        told(f"trial {number}: goes on")
    else:
        study.tell(number, state=TrialState.FAIL)
        told(f"trial {number}: {'cancelled' if seen.state == State.CANCELLED else f'failed, {seen.message}'}")
        last = [one for one in study.trials if one.state.is_finished()][-IN_A_ROW:]
        if len(last) == IN_A_ROW and all(one.state == TrialState.FAIL for one in last):
            raise UserError(f"{IN_A_ROW} trials in a row have failed, the last with: {seen.message or 'cancelled'}")


def described(values: Mapping[str, Any]) -> str:
    """Keys and values in a line, numbers shortened."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _place(study: optuna.Study, number: int) -> str:
    return ", the best so far" if study.best_trial.number == number else f" (best: trial {study.best_trial.number})"


def _distribution(of_key: Range | list[Any]) -> BaseDistribution:
    if isinstance(of_key, list):
        return CategoricalDistribution(of_key)
    if of_key.whole:
        return IntDistribution(int(of_key.low), int(of_key.high), log=of_key.log, step=int(of_key.step or 1))
    return FloatDistribution(float(of_key.low), float(of_key.high), log=of_key.log, step=of_key.step)


def _sampler(plan: Sweep, number: int) -> BaseSampler:
    """One for each trial, so that what it proposes does not depend on when the search was begun again."""
    seed = int(np.random.SeedSequence([plan.seed, number]).generate_state(1)[0])
    if plan.sampler == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=plan.startup_trials)


def _pruner(plan: Sweep) -> BasePruner:
    if plan.pruner == "none":
        return NopPruner()
    return MedianPruner(n_startup_trials=plan.startup_trials, n_warmup_steps=plan.warmup_epochs + 1)
