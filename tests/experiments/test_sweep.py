"""The trials of a sweep, with runs that are only pretended: what is proposed, pruned, counted and resumed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from fadeformer.config.schema import Params
from fadeformer.errors import TransientError, UserError
from pipelines.experiments import engine, space, sweep
from pipelines.experiments.engine import PipelineRun, RunStatus
from pipelines.experiments.results import RunResult
from pipelines.experiments.space import SweepConfig

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
EPOCHS = 5


class Pretended:
    """Runs that take an epoch for each look, and whose AUC grows to what their learning rate makes of it.

    Attributes:
        started: the `train` section of each run, by number of the trial.
        starts: numbers, in the order in which they were started, those of resumed trials again.
        stopped: numbers of runs that were asked to stop.
        outcome: how a run ends instead, by number.
        most: runs side by side.
        error: raised by the next look.
        completed: names of runs that have left an experiment.
    """

    def __init__(self) -> None:
        self.started, self.starts, self.stopped = {}, [], []
        self.outcome: dict[int, str] = {}
        self.completed: set[str] = set()
        self.most, self.error = 0, None
        self._seen, self._running = {}, set()

    def start(self, run: PipelineRun) -> None:
        number = int(run.trial.partition("/")[2])
        self.started[number] = run.params["train"]
        self.starts.append(number)
        self._seen.setdefault(number, 0)
        self._running.add(number)
        self.most = max(self.most, len(self._running))

    def status(self, run: PipelineRun) -> RunStatus:
        if self.error:
            raise self.error
        number = int(run.trial.partition("/")[2])
        self._seen[number] += 1
        state = "Stopped" if number in self.stopped else self.outcome.get(number, "Running")
        if state == "Running" and self._seen[number] > EPOCHS:
            state = "Completed"
            self.completed.add(run.name)
        if state != "Running":
            self._running.remove(number)
        return RunStatus(state, "out of memory")

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        self.stopped += [int(run.trial.partition("/")[2]) for run in runs]

    def values(self, number: int, result: RunResult | None) -> dict[int, float]:
        best = 1 - abs(self.started[number]["learning_rate"] - 0.001)
        epochs = min(self._seen[number], EPOCHS)
        return {epoch: best * (1 - 0.5**epoch) for epoch in range(1, epochs + 1)}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(engine, "POLL_INTERVAL", 0.0)


@pytest.fixture
def planned(tmp_path: Path, config: Params):
    """Gives what a SPACE.yaml says, with keys changed."""

    def plan(text: str = SPACE, **keys: Any) -> SweepConfig:
        (tmp_path / "rates.yaml").write_text(text)
        return space.load_sweep_config(tmp_path / "rates.yaml", config).model_copy(update=keys)

    return plan


@pytest.fixture
def search(tmp_path: Path, config: Params, monkeypatch, capsys):
    """Runs a sweep with pretended runs; gives its study and the lines that it printed."""

    def run(plan: SweepConfig, runner: Pretended, folder: str = "", values: Any = None) -> tuple[Any, list[str]]:
        study, storage = sweep.open_study(tmp_path / folder, plan, config)
        left = lambda name: RunResult(name, "") if name in runner.completed else None  # noqa: E731
        monkeypatch.setattr(engine.results, "find", left)
        trials = sweep.SweepPlan(plan, config, study, storage, "parent", values or runner.values)
        engine.execute(trials, runner, plan.at_once)
        return study, capsys.readouterr().out.splitlines()

    return run


def test_as_many_trials_as_asked_for_and_the_best_is_found(planned, search):
    plan, runner = planned(), Pretended()
    study, said = search(plan, runner)
    assert len(study.trials) == 12
    assert {one.state for one in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    whole = [one for one in study.trials if one.state == TrialState.COMPLETE]
    assert study.best_value == max(one.value for one in whole)
    assert study.best_value == max(study.best_trial.intermediate_values.values())
    assert study.best_trial.user_attrs[sweep.RUN_ATTRIBUTE].startswith(f"rates-{study.best_trial.number:03d}-")
    for number, train in runner.started.items():
        assert train["epochs"] == 5
        assert train["batch_size"] in (8, 16, 24, 32)
        assert train["clip"] in (None, 1.0)
        assert 1e-5 <= train["learning_rate"] <= 0.1
        assert {key: train[key.partition(".")[2]] for key in plan.space} == study.trials[number].params
    assert sum(", the best so far" in line for line in said) >= 1


def test_a_trial_below_the_median_is_stopped_after_its_warm_up(planned, search):
    plan, runner = planned(sampler="random", trials=20), Pretended()
    study, said = search(plan, runner)
    pruned = [one for one in study.trials if one.state == TrialState.PRUNED]
    assert pruned
    assert sorted(runner.stopped) == [one.number for one in pruned]
    assert min(one.number for one in pruned) >= plan.startup_trials
    for one in pruned:
        epoch = max(one.intermediate_values)
        assert epoch > plan.warmup_epochs
        assert f"trial {one.number}: stopped at epoch {epoch}, worse than the median of the others" in said


def test_without_a_pruner_none_is_stopped_and_trials_run_side_by_side(planned, search):
    runner = Pretended()
    study, _ = search(planned(pruner="none", sampler="random", at_once=3), runner)
    assert runner.stopped == []
    assert {one.state for one in study.trials} == {TrialState.COMPLETE}
    assert runner.most == 3


def test_proposals_do_not_depend_on_when_the_search_was_resumed(planned, search):
    plan, parts = planned(), Pretended()
    whole, _ = search(plan, Pretended(), "whole")
    for trials in (3, 7, 12):
        found, _ = search(plan.model_copy(update={"trials": trials}), parts, "parts")
    assert [one.params for one in found.trials] == [one.params for one in whole.trials]
    assert [one.state for one in found.trials] == [one.state for one in whole.trials]


@pytest.mark.parametrize(
    ("error", "stopped"),
    [(TransientError("no server"), []), (KeyboardInterrupt(), [0, 1]), (UserError("other"), [0, 1])],
)
def test_a_search_that_ends_early_stops_its_trials_or_leaves_them_and_the_next_resumes_them(
    planned, search, error, stopped
):
    plan, runner = planned(at_once=2, pruner="none"), Pretended()
    runner.error = error
    with pytest.raises(type(error)):
        search(plan, runner)
    assert runner.stopped == stopped
    first, runner.stopped, runner.error = dict(runner.started), [], None
    study, _ = search(plan, runner)
    assert {one.state for one in study.trials} == {TrialState.COMPLETE}
    assert runner.starts[:4] == [0, 1, 0, 1]
    assert {number: runner.started[number] for number in (0, 1)} == first
    assert runner.starts[4:] == list(range(2, 12))


def test_failed_and_cancelled_trials_count_and_three_in_a_row_end_the_search(planned, search):
    plan, runner = planned(), Pretended()
    runner.outcome = {1: "Failed", 3: "Stopped"}
    study, said = search(plan, runner)
    assert [one.number for one in study.trials if one.state == TrialState.FAIL] == [1, 3]
    assert "trial 1: failed, out of memory" in said
    assert "trial 3: cancelled" in said
    assert len(study.trials) == 12
    runner = Pretended()
    runner.outcome = dict.fromkeys(range(2, 12), "Failed")
    with pytest.raises(UserError, match="3 trials in a row have failed, the last: failed, out of memory"):
        search(plan.model_copy(update={"name": "other"}), runner)
    assert len(runner.started) == 5


def test_the_same_values_are_not_run_twice(planned, search):
    text = "trials: 6\nfixed: {train.monitor: auc}\nspace: {train.learning_rate: [0.001, 0.01]}\n"
    runner = Pretended()
    study, said = search(planned(text, pruner="none"), runner)
    assert len(runner.started) == 2  # all that there are
    assert len(study.trials) == 8
    assert sum("was tried before and is not run again" in line for line in said) == 6
    assert [one.state for one in study.trials if sweep.REPEATED_ATTRIBUTE not in one.user_attrs] == [
        TrialState.COMPLETE
    ] * 2


def test_a_metric_that_is_undefined_in_every_epoch_is_no_value(planned, search):
    study, said = search(planned(trials=2), Pretended(), values=lambda number, result: {1: float("nan")})
    assert [one.state for one in study.trials] == [TrialState.FAIL] * 2
    assert "trial 0: failed, its metric is not defined in any epoch" in said


def test_the_same_values_are_not_run_side_by_side(planned, search):
    text = "trials: 4\nat_once: 4\nfixed: {train.monitor: auc}\nspace: {train.learning_rate: [0.001, 0.01]}\n"
    runner = Pretended()
    search(planned(text), runner)
    assert sorted(train["learning_rate"] for train in runner.started.values()) == [0.001, 0.01]


def test_the_smallest_loss_is_the_best(planned, search):
    study, _ = search(planned(fixed={"train.monitor": "loss"}, trials=3, pruner="none"), Pretended())
    assert study.best_value == min(one.value for one in study.trials)
    for one in study.trials:
        assert one.value == min(one.intermediate_values.values())


def test_a_study_of_other_values_is_not_resumed(tmp_path, config, planned):
    sweep.open_study(tmp_path, planned(), config)
    assert sweep.open_study(tmp_path, planned(trials=30, at_once=4), config)[0].trials == []
    with pytest.raises(UserError, match=r"rates was started with another fixed; .*name:, or remove .*rates\.jsonl"):
        sweep.open_study(tmp_path, planned(fixed={"train.epochs": 6, "train.monitor": "auc"}), config)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match="was started with another seed;"):
        sweep.open_study(tmp_path, planned(), other)
    judged = config.model_copy(update={"promote": config.promote.model_copy(update={"margin": 0.5})})
    sweep.open_study(tmp_path, planned(), judged)  # which decides nothing of a trial


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("space: {seed: [1, 2]}", "key trials is missing"),
        ("trial: 3\ntrials: 3\nspace: {seed: [1, 2]}", "unknown key trial; did you mean trials?"),
        ("- 1", "must hold the keys name, trials, "),
        ("a: [", "is not valid YAML"),
        ("trials: 3\nspace: {train.learning_rat: [0.1, 0.2]}", "did you mean train.learning_rate?"),
        ("trials: 3\nspace: {learning_rate: [0.1, 0.2]}", "unknown key learning_rate"),
        ("trials: 3\nspace: {seed.a.b: [0.1, 0.2]}", "seed is {'a': {'b': 0.1}}, but should be"),
        ("trials: 3\nspace: {train: [0.1, 0.2]}", "train is 0.1, but should be a section with the keys"),
        ("trials: 3\nspace: {train.learning_rate: [0.1]}", "should be a list of two or more values, or a range"),
        ("trials: 3\nspace: {train.learning_rate: 0.1}", "should be a list of two or more values, or a range"),
        ("trials: 3\nspace: {augment.erasing_scale: [[0, 1], [0, 0.5]]}", "not a list of two or more numbers"),
        ("trials: 3\nspace: {train.learning_rate: {low: 0.2, high: 0.1}}", "`low <= high` must hold"),
        ("trials: 3\nspace: {train.ema: {low: 0, high: 0.5, log: true}}", "`low > 0` must hold for `log=True`"),
        ("trials: 3\nspace: {seed: {low: 1, high: 9, log: true, step: 2}}", "only accept step is 1 when `log`"),
        ("trials: 3\nspace: {seed: {low: 1, high: 9, step: 0}}", "`step > 0` must hold"),
        ("trials: 3\nspace: {seed: {lo: 1, high: 9}}", "space.seed is {'lo': 1, 'high': 9}, but should be"),
        ("trials: 3\nspace: {train.batch_size: {low: 0, high: 9}}", "train.batch_size is 0, but should be"),
        ("trials: 3\nspace: {train.batch_size: [8, x]}", "train.batch_size is 'x'"),
        ("trials: 3\nspace: {promote.margin: [0.01, 0.02]}", "a trial, which ends with its training"),
        ("trials: 3\nsampler: tpo\nspace: {seed: [1, 2]}", "did you mean tpe?"),
        ("trials: 3\nspace: {train.monitor: [auc, loss]}", "is what trials are compared by"),
    ],
)
def test_a_file_with_a_fault_is_told_by_key(planned, text, told):
    with pytest.raises(UserError) as raised:
        planned(text)
    assert told in str(raised.value)
    assert "rates.yaml: " in str(raised.value)
