"""The search of a sweep, with runs that are only pretended: what is proposed, stopped, counted and taken up again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fadeformer.errors import PassingError, UserError
from fadeformer.params import Params
from pipelines import space, sweeping
from pipelines.space import Sweep
from pipelines.sweeping import Look, State

SPACE = """
trials: 12
startup_trials: 4
warmup_epochs: 1
fixed: {train.epochs: 5, train.monitor: auc}
space:
  train.learning_rate: {low: 1.0e-5, high: 0.1, log: true}
  train.batch_size: {low: 8, high: 32, step: 8}
  train.clip: [null, 1.0]
"""


class Pretended:
    """Runs that take an epoch for each look, and whose AUC grows to what their learning rate makes of it.

    Attributes:
        begun: what each run was given, by number and attempt.
        stopped: numbers of runs that were asked to end.
        outcome: how a run ends instead, by number.
        away: the next look finds no server.
        most: runs at a time.
    """

    def __init__(self, epochs: int = 5) -> None:
        self.begun: dict[tuple[int, int], dict[str, Any]] = {}
        self.stopped: list[int] = []
        self.outcome: dict[int, State] = {}
        self.away = False
        self.most = 0
        self._epochs, self._seen, self._ended = epochs, {}, {}

    def begin(self, number: int, attempt: int, changes: Mapping[str, Any]) -> str:
        self.begun.setdefault((number, attempt), dict(changes))
        self._seen.setdefault((number, attempt), 0)
        self.most = max(self.most, len(self._seen) - len(self._ended))
        return f"{number}/{attempt}"

    def look(self, run: str, number: int) -> Look:
        if self.away:
            raise PassingError("no server")
        of_run = tuple(map(int, run.split("/")))
        if of_run not in self._ended:
            self._seen[of_run] += 1
            if number in self.outcome:
                self._ended[of_run] = self.outcome[number]
            elif self._seen[of_run] > self._epochs:
                self._ended[of_run] = State.COMPLETED
        epochs = min(self._seen[of_run], self._epochs)
        best = 1 - abs(self.begun[of_run]["train.learning_rate"] - 0.001)
        values = {epoch: best * (1 - 0.5**epoch) for epoch in range(1, epochs + 1)}
        return Look(self._ended.get(of_run, State.BEGUN), values, "out of memory")

    def stop(self, run: str) -> None:
        of_run = tuple(map(int, run.split("/")))
        self.stopped.append(of_run[0])
        self._ended.setdefault(of_run, State.CANCELLED)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(sweeping, "LOOK", 0.0)


@pytest.fixture
def planned(tmp_path: Path, wanted: Params):
    """Gives what a SPACE.yaml says, with keys changed."""

    def plan(text: str = SPACE, **keys: Any) -> Sweep:
        (tmp_path / "rates.yaml").write_text(text)
        return space.load(tmp_path / "rates.yaml", wanted).model_copy(update=keys)

    return plan


def quiet(line: str) -> None:
    pass


def test_as_many_trials_as_wanted_and_the_best_is_found(tmp_path, wanted, planned):
    plan, runs, told = planned(), Pretended(), []
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, told.append)
    assert len(study.trials) == 12
    assert {one.state for one in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    whole = [one for one in study.trials if one.state == TrialState.COMPLETE]
    assert study.best_value == max(one.value for one in whole)
    assert study.best_value == max(study.best_trial.intermediate_values.values())
    for (number, _), given in runs.begun.items():
        assert given["train.epochs"] == 5
        assert given["train.batch_size"] in (8, 16, 24, 32)
        assert given["train.clip"] in (None, 1.0)
        assert 1e-5 <= given["train.learning_rate"] <= 0.1
        assert {key: given[key] for key in plan.space} == study.trials[number].params
    assert sum(", the best so far" in line for line in told) >= 1


def test_a_trial_below_the_median_is_stopped_after_its_warm_up(tmp_path, wanted, planned):
    plan, runs = planned(sampler="random", trials=20), Pretended()
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, quiet)
    pruned = [one for one in study.trials if one.state == TrialState.PRUNED]
    assert pruned
    assert sorted(runs.stopped) == [one.number for one in pruned]
    assert min(one.number for one in pruned) >= plan.startup_trials
    for one in pruned:
        assert max(one.intermediate_values) == one.user_attrs[sweeping.STOPPED] > plan.warmup_epochs


def test_without_a_pruner_none_is_stopped(tmp_path, wanted, planned):
    plan, runs = planned(pruner="none", sampler="random"), Pretended()
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, quiet)
    assert runs.stopped == []
    assert {one.state for one in study.trials} == {TrialState.COMPLETE}


def test_trials_run_side_by_side(tmp_path, wanted, planned):
    plan, runs = planned(at_once=3), Pretended()
    sweeping.search(plan, sweeping.open_study(tmp_path, plan, wanted), runs, quiet)
    assert runs.most == 3


def test_what_is_proposed_does_not_depend_on_when_the_search_was_begun_again(tmp_path, wanted, planned):
    plan = planned()
    whole, parts = sweeping.open_study(tmp_path / "whole", plan, wanted), Pretended()
    sweeping.search(plan, whole, Pretended(), quiet)
    for trials in (3, 7, 12):
        shorter = plan.model_copy(update={"trials": trials})
        sweeping.search(shorter, sweeping.open_study(tmp_path / "parts", shorter, wanted), parts, quiet)
    found = sweeping.open_study(tmp_path / "parts", plan, wanted)
    assert [one.params for one in found.trials] == [one.params for one in whole.trials]
    assert [one.state for one in found.trials] == [one.state for one in whole.trials]


def test_a_search_whose_server_goes_away_leaves_its_trials_and_finds_them(tmp_path, wanted, planned):
    plan, runs = planned(at_once=2), Pretended()
    runs.begin, begin = lambda *given: (setattr(runs, "away", len(runs.begun) >= 4), begin(*given))[1], runs.begin
    with pytest.raises(PassingError):
        sweeping.search(plan, sweeping.open_study(tmp_path, plan, wanted), runs, quiet)
    assert runs.stopped == []
    runs.begin, runs.away = begin, False
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, quiet)
    assert len(study.trials) == 12
    assert {attempt for _, attempt in runs.begun} == {0}


def test_a_search_killed_before_it_noted_a_run_begins_that_run_once(tmp_path, wanted, planned):
    plan, runs = planned(), Pretended()
    study = sweeping.open_study(tmp_path, plan, wanted)
    trial = study.ask({key: sweeping._distribution(of_key) for key, of_key in plan.space.items()})
    runs.begin(trial.number, 0, {**plan.fixed, **trial.params})
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, quiet)
    assert len(runs.begun) == 12 == len(study.trials)
    assert all(one.state.is_finished() for one in study.trials)


def test_ctrl_c_ends_the_trials_that_run_and_the_next_search_goes_on_with_them(tmp_path, wanted, planned):
    plan, runs = planned(at_once=2, pruner="none"), Pretended()
    look, looks = runs.look, []

    def interrupted(run: str, number: int) -> Look:
        looks.append(run)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return look(run, number)

    runs.look = interrupted
    with pytest.raises(KeyboardInterrupt):
        sweeping.search(plan, sweeping.open_study(tmp_path, plan, wanted), runs, quiet)
    assert sorted(runs.stopped) == [0, 1]
    study, told = sweeping.open_study(tmp_path, plan, wanted), []
    sweeping.search(plan, study, runs, told.append)
    assert {one.state for one in study.trials} == {TrialState.COMPLETE}
    for number in (0, 1):
        assert runs.begun[number, 1] == runs.begun[number, 0]
        assert f"trial {number}: goes on" in told
    assert sorted(runs.begun) == sorted([(0, 1), (1, 1), *((number, 0) for number in range(12))])


def test_failed_and_cancelled_trials_count_and_three_in_a_row_end_the_search(tmp_path, wanted, planned):
    plan, runs = planned(), Pretended()
    runs.outcome = {1: State.FAILED, 3: State.CANCELLED}
    study, told = sweeping.open_study(tmp_path, plan, wanted), []
    sweeping.search(plan, study, runs, told.append)
    assert [one.number for one in study.trials if one.state == TrialState.FAIL] == [1, 3]
    assert "trial 1: failed, out of memory" in told
    assert "trial 3: cancelled" in told
    assert len(study.trials) == 12
    runs = Pretended()
    runs.outcome = dict.fromkeys(range(2, 12), State.FAILED)
    other = plan.model_copy(update={"name": "other"})
    with pytest.raises(UserError, match="3 trials in a row have failed, the last with: out of memory"):
        sweeping.search(other, sweeping.open_study(tmp_path, other, wanted), runs, quiet)
    assert len(runs.begun) == 5


def test_the_same_values_are_not_run_twice(tmp_path, wanted, planned):
    text = "trials: 6\nfixed: {train.monitor: auc}\nspace: {train.learning_rate: [0.001, 0.01]}\n"
    plan, runs, told = planned(text, pruner="none"), Pretended(), []
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, told.append)
    assert len(runs.begun) == 2  # all that there are
    assert len(study.trials) == 8
    assert sum("which is not run again" in line for line in told) == 6
    assert len({one.value for one in study.trials}) == 2


def test_a_metric_that_is_undefined_in_every_epoch_is_no_value(tmp_path, wanted, planned):
    plan, runs, told = planned(trials=2), Pretended(), []
    runs.look = lambda run, number: Look(State.COMPLETED, {1: float("nan")})
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, told.append)
    assert [one.state for one in study.trials] == [TrialState.FAIL] * 2
    assert "trial 0: failed, its metric is not defined in any epoch" in told


def test_the_smallest_loss_is_the_best(tmp_path, wanted, planned):
    plan, runs = planned(fixed={"train.monitor": "loss"}, trials=3, pruner="none"), Pretended()
    study = sweeping.open_study(tmp_path, plan, wanted)
    sweeping.search(plan, study, runs, quiet)
    assert study.best_value == min(one.value for one in study.trials)
    for one in study.trials:
        assert one.value == min(one.intermediate_values.values())


def test_a_study_of_other_values_is_not_gone_on_with(tmp_path, wanted, planned):
    sweeping.open_study(tmp_path, planned(), wanted)
    assert sweeping.open_study(tmp_path, planned(trials=30, at_once=4), wanted).trials == []
    with pytest.raises(UserError, match=r"sweep rates was begun with another fixed; .*name:, or remove .*rates\.jsonl"):
        sweeping.open_study(tmp_path, planned(fixed={"train.epochs": 6, "train.monitor": "auc"}), wanted)
    other = wanted.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match="was begun with another seed;"):
        sweeping.open_study(tmp_path, planned(), other)
    judged = wanted.model_copy(update={"promote": wanted.promote.model_copy(update={"margin": 0.5})})
    sweeping.open_study(tmp_path, planned(), judged)  # which decides nothing of a trial


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("space: {seed: [1, 2]}", "key trials is missing"),
        ("trial: 3\ntrials: 3\nspace: {seed: [1, 2]}", "unknown key trial; did you mean trials?"),
        ("- 1", "must hold trials: and space:"),
        ("a: [", "is not valid YAML"),
        ("trials: 3\nspace: {train.learning_rat: [0.1, 0.2]}", "did you mean train.learning_rate?"),
        ("trials: 3\nspace: {train.learning_rate: [0.1]}", "should be a list of two or more values, or a range"),
        ("trials: 3\nspace: {train.learning_rate: {low: 0.2, high: 0.1}}", "high has to be the larger one"),
        ("trials: 3\nspace: {train.ema: {low: 0, high: 0.5, log: true}}", "with log it has to be above 0"),
        ("trials: 3\nspace: {seed: {low: 1, high: 9, log: true, step: 2}}", "step and log exclude each other"),
        ("trials: 3\nspace: {seed: {low: 1, high: 9, step: 0}}", "step is 0; it has to be above 0"),
        ("trials: 3\nspace: {seed: {lo: 1, high: 9}}", "space.seed: unknown key lo; did you mean low?"),
        ("trials: 3\nspace: {train.batch_size: {low: 0, high: 9}}", "train.batch_size is 0, but should be"),
        ("trials: 3\nspace: {train.batch_size: [8, x]}", "train.batch_size is 'x'"),
        ("trials: 3\nspace: {promote.margin: [0.01, 0.02]}", "a trial, which ends with its training"),
        ("trials: 3\nfixed: {seed: 1}\nspace: {seed: [1, 2]}", "seed stands in fixed and in space"),
        ("trials: 3\nsampler: tpo\nspace: {seed: [1, 2]}", "did you mean tpe?"),
        ("trials: 3\nspace: {train.monitor: [auc, loss]}", "is what trials are compared by"),
    ],
)
def test_a_file_with_a_fault_is_told_by_key(planned, text, told):
    with pytest.raises(UserError) as raised:
        planned(text)
    assert told in str(raised.value)
    assert "rates.yaml: " in str(raised.value)


def test_a_file_that_is_not_there_is_told(tmp_path, wanted):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        space.load(tmp_path / "none.yaml", wanted)
