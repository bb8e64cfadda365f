"""Trials of a sweep, with fake runs: proposals, pruning, counting and resumption."""

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


class FakeRunner:
    """Runs that take one epoch per status check, with an AUC that converges to a function of their learning rate.

    Attributes:
        started: The `train` section of each run, by trial number.
        starts: Trial numbers in the order of their starts; those of resumed trials occur again.
        stopped: Trial numbers of stopped runs.
        outcomes: Final states other than completion, by trial number.
        max_parallel: Largest number of parallel runs.
        error: Raised by the next status check.
        completed: Names of runs with an experiment.
    """

    def __init__(self) -> None:
        self.started, self.starts, self.stopped = {}, [], []
        self.outcomes: dict[int, str] = {}
        self.completed: set[str] = set()
        self.max_parallel, self.error = 0, None
        self._epochs, self._running = {}, set()

    def start(self, run: PipelineRun) -> None:
        number = int(run.trial.partition("/")[2])
        self.started[number] = run.params["train"]
        self.starts.append(number)
        self._epochs.setdefault(number, 0)
        self._running.add(number)
        self.max_parallel = max(self.max_parallel, len(self._running))

    def status(self, run: PipelineRun) -> RunStatus:
        if self.error:
            raise self.error
        number = int(run.trial.partition("/")[2])
        self._epochs[number] += 1
        state = "Stopped" if number in self.stopped else self.outcomes.get(number, "Running")
        if state == "Running" and self._epochs[number] > EPOCHS:
            state = "Completed"
            self.completed.add(run.name)
        if state != "Running":
            self._running.remove(number)
        return RunStatus(state, "out of memory")

    def stop(self, runs: Iterable[PipelineRun]) -> None:
        self.stopped += [int(run.trial.partition("/")[2]) for run in runs]

    def read_history(self, number: int, result: RunResult | None) -> dict[int, float]:
        best = 1 - abs(self.started[number]["learning_rate"] - 0.001)
        epochs = min(self._epochs[number], EPOCHS)
        return {epoch: best * (1 - 0.5**epoch) for epoch in range(1, epochs + 1)}


@pytest.fixture(autouse=True)
def no_poll_interval(monkeypatch) -> None:
    monkeypatch.setattr(engine, "POLL_INTERVAL", 0.0)


@pytest.fixture
def sweep_config(tmp_path: Path, config: Params):
    """Loads a SPACE.yaml and changes some keys."""

    def load(text: str = SPACE, **keys: Any) -> SweepConfig:
        (tmp_path / "rates.yaml").write_text(text)
        return space.load_sweep_config(tmp_path / "rates.yaml", config).model_copy(update=keys)

    return load


@pytest.fixture
def search(tmp_path: Path, config: Params, monkeypatch, capsys):
    """Runs a sweep with fake runs; returns its study and the printed lines."""

    def run(
        definition: SweepConfig, runner: FakeRunner, folder: str = "", read_history: Any = None
    ) -> tuple[Any, list[str]]:
        study, storage = sweep.open_study(tmp_path / folder, definition, config)
        find_result = lambda name: RunResult(name, "") if name in runner.completed else None  # noqa: E731
        monkeypatch.setattr(engine.results, "find_result", find_result)
        plan = sweep.SweepPlan(definition, config, study, storage, "parent", read_history or runner.read_history)
        engine.execute(plan, runner, definition.parallel_trials)
        return study, capsys.readouterr().out.splitlines()

    return run


def test_sweep_runs_all_trials_and_finds_the_best(sweep_config, search):
    plan, runner = sweep_config(), FakeRunner()
    study, lines = search(plan, runner)
    assert len(study.trials) == 12
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    completed = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert study.best_value == max(trial.value for trial in completed)
    assert study.best_value == max(study.best_trial.intermediate_values.values())
    assert study.best_trial.user_attrs[sweep.RUN_ATTRIBUTE].startswith(f"rates-{study.best_trial.number:03d}-")
    for number, train in runner.started.items():
        assert train["epochs"] == 5
        assert train["batch_size"] in (8, 16, 24, 32)
        assert train["clip"] in (None, 1.0)
        assert 1e-5 <= train["learning_rate"] <= 0.1
        assert {key: train[key.partition(".")[2]] for key in plan.space} == study.trials[number].params
    assert sum(", the best so far" in line for line in lines) >= 1


def test_trials_below_the_median_are_pruned_after_warmup(sweep_config, search):
    plan, runner = sweep_config(sampler="random", trials=20), FakeRunner()
    study, lines = search(plan, runner)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert sorted(runner.stopped) == [trial.number for trial in pruned]
    assert min(trial.number for trial in pruned) >= plan.startup_trials
    for trial in pruned:
        epoch = max(trial.intermediate_values)
        assert epoch > plan.warmup_epochs
        assert f"trial {trial.number}: pruned at epoch {epoch}, worse than the median of the other trials" in lines


def test_trials_without_pruner_run_in_parallel_to_completion(sweep_config, search):
    runner = FakeRunner()
    study, _ = search(sweep_config(pruner="none", sampler="random", parallel_trials=3), runner)
    assert runner.stopped == []
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert runner.max_parallel == 3


def test_proposals_do_not_depend_on_resumption(sweep_config, search):
    plan, runner = sweep_config(), FakeRunner()
    uninterrupted, _ = search(plan, FakeRunner(), "uninterrupted")
    for trials in (3, 7, 12):
        resumed, _ = search(plan.model_copy(update={"trials": trials}), runner, "resumed")
    for study in (resumed, uninterrupted):
        assert len(study.trials) == 12
    assert [trial.params for trial in resumed.trials] == [trial.params for trial in uninterrupted.trials]
    assert [trial.state for trial in resumed.trials] == [trial.state for trial in uninterrupted.trials]


@pytest.mark.parametrize(
    ("error", "stopped"),
    [(TransientError("no server"), []), (KeyboardInterrupt(), [0, 1]), (UserError("other"), [0, 1])],
)
def test_next_search_resumes_interrupted_trials(sweep_config, search, error, stopped):
    plan, runner = sweep_config(parallel_trials=2, pruner="none"), FakeRunner()
    runner.error = error
    with pytest.raises(type(error)):
        search(plan, runner)
    assert runner.stopped == stopped
    first, runner.stopped, runner.error = dict(runner.started), [], None
    study, _ = search(plan, runner)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert runner.starts[:4] == [0, 1, 0, 1]
    assert {number: runner.started[number] for number in (0, 1)} == first
    assert runner.starts[4:] == list(range(2, 12))


def test_three_failures_in_a_row_stop_the_search(sweep_config, search):
    plan, runner = sweep_config(), FakeRunner()
    runner.outcomes = {1: "Failed", 3: "Stopped"}
    study, lines = search(plan, runner)
    assert [trial.number for trial in study.trials if trial.state == TrialState.FAIL] == [1, 3]
    assert "trial 1: failed, out of memory" in lines
    assert "trial 3: canceled" in lines
    assert len(study.trials) == 12
    runner = FakeRunner()
    runner.outcomes = dict.fromkeys(range(2, 12), "Failed")
    with pytest.raises(UserError, match="3 trials in a row have failed, the last: failed, out of memory"):
        search(plan.model_copy(update={"name": "other"}), runner)
    assert len(runner.started) == 5


def test_repeated_values_are_not_run_again(sweep_config, search):
    text = "trials: 6\nfixed: {train.monitor: auc}\nspace: {train.learning_rate: [0.001, 0.01]}\n"
    runner = FakeRunner()
    study, lines = search(sweep_config(text, pruner="none"), runner)
    assert len(runner.started) == 2  # all values of the space
    assert len(study.trials) == 8
    assert sum("was tried before and is not run again" in line for line in lines) == 6
    assert [trial.state for trial in study.trials if sweep.REPEATED_ATTRIBUTE not in trial.user_attrs] == [
        TrialState.COMPLETE
    ] * 2


def test_trial_with_undefined_metric_fails(sweep_config, search):
    study, lines = search(sweep_config(trials=2), FakeRunner(), read_history=lambda number, result: {1: float("nan")})
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    assert "trial 0: failed, its metric is undefined in every epoch" in lines


def test_repeated_values_are_not_run_in_parallel(sweep_config, search):
    text = "trials: 4\nparallel_trials: 4\nfixed: {train.monitor: auc}\nspace: {train.learning_rate: [0.001, 0.01]}\n"
    runner = FakeRunner()
    search(sweep_config(text), runner)
    assert sorted(train["learning_rate"] for train in runner.started.values()) == [0.001, 0.01]


def test_lowest_loss_is_the_best(sweep_config, search):
    study, _ = search(sweep_config(fixed={"train.monitor": "loss"}, trials=3, pruner="none"), FakeRunner())
    assert study.best_value == min(trial.value for trial in study.trials)
    for trial in study.trials:
        assert trial.value == min(trial.intermediate_values.values())


def test_study_with_another_definition_is_not_resumed(tmp_path, config, sweep_config):
    sweep.open_study(tmp_path, sweep_config(), config)
    assert sweep.open_study(tmp_path, sweep_config(trials=30, parallel_trials=4), config)[0].trials == []
    with pytest.raises(UserError, match=r"rates was started with another fixed; .*name:, or remove .*rates\.jsonl"):
        sweep.open_study(tmp_path, sweep_config(fixed={"train.epochs": 6, "train.monitor": "auc"}), config)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match="was started with another seed;"):
        sweep.open_study(tmp_path, sweep_config(), other)
    other_gate = config.model_copy(update={"promote": config.promote.model_copy(update={"margin": 0.5})})
    sweep.open_study(tmp_path, sweep_config(), other_gate)  # has no effect on trials


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: {seed: [1, 2]}", "key trials is missing"),
        ("trial: 3\ntrials: 3\nspace: {seed: [1, 2]}", "unknown key trial; did you mean trials?"),
        ("- 1", "must be a mapping with the keys name, trials, "),
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
        ("trials: 3\nspace: {promote.margin: [0.01, 0.02]}", "has no effect on a trial, which stops after training"),
        ("trials: 3\nsampler: tpo\nspace: {seed: [1, 2]}", "did you mean tpe?"),
        ("trials: 3\nspace: {train.monitor: [auc, loss]}", "cannot vary, because trials are compared by it"),
    ],
)
def test_invalid_space_names_the_key(sweep_config, text, message):
    with pytest.raises(UserError) as raised:
        sweep_config(text)
    assert message in str(raised.value)
    assert "rates.yaml: " in str(raised.value)
