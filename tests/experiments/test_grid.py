"""Grids: validation of grid files, which cells run and which are skipped, and the tables."""

import argparse
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fadeformer.errors import UserError
from fadeformer.evaluation import predictions
from fadeformer.models.complexity import ModelCost
from fadeformer.tasks import TASKS
from pipelines.cli import tables
from pipelines.experiments import engine, report
from pipelines.experiments.engine import ListPlan, PipelineRun, RunStatus
from pipelines.experiments.grid import Cell, find_grid, load_grid, plan_runs
from pipelines.experiments.results import RunResult

TINY = """\
preset: null
reference: fadenet
seeds: [0, 1]
common:
  dataset: {name: phantom, images: 200, size: 16}
  train: {epochs: 1, batch_size: 32, device: cpu}
  evaluate: {figure_dpi: 50, bootstrap_resamples: 100}
datasets:
  phantom: {title: Phantom, accuracy: accuracy, params: {}}
models:
  fadenet: {title: FadeNet, params: {}}
  vit: {title: plain, params: {model: {fade: null}}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_included_grids_are_valid(tmp_path):
    for name in ("cpu", "paper"):
        grid = load_grid(find_grid(name))
        preprocessing, training = plan_runs(name, grid, tmp_path)
        assert preprocessing.keys() == grid.datasets.keys()
        assert len(training) == len(grid.datasets) * len(grid.models) * len(grid.seeds)
    published = {"fadenet", "vit", "resnet18", "resnet50", "efficientnet_b0", "efficientnet_b4", "deit"}
    assert grid.models.keys() == published


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("reference:", "referense:", "unknown key referense; did you mean reference?"),
        ("reference: fadenet", "reference: fade", "reference is fade, but the models are fadenet, vit"),
        ("seeds: [0, 1]", "seeds: []", "seeds is [], but should be"),
        ("seeds: [0, 1]", "seeds: [-1]", "params.yaml with the overrides of phantom/fadenet/-1: seed is -1"),
        ("preset: null", "preset: papper", "presets/papper.yaml: cannot be read"),
        ("model: {fade", "model: {fad", "of phantom/vit/0: unknown key model.fad; did you mean model.fade?"),
        ("model: {fade: null}", "dataset: {size: 32}", "models.vit.params changes dataset, but all models must"),
        ("accuracy: accuracy", "accuracy: acuracy", "datasets.phantom.accuracy is 'acuracy', but should be"),
        ("accuracy: accuracy", "acuracy: accuracy", "phantom.acuracy; did you mean datasets.phantom.accuracy?"),
        ("images: 200", "images: 20", "params.yaml with the overrides of phantom: dataset.images is 20"),
        ("  vit:", "  V it:", "should match pattern"),
        ("preset: null", "- preset", "is not valid YAML"),
    ],
)
def test_invalid_grid_names_the_key(tiny, before, after, message):
    assert before in TINY
    tiny.write_text(TINY.replace(before, after))
    with pytest.raises(UserError, match=re.escape(message)):
        plan_runs("tiny", load_grid(tiny), None)


def test_unknown_grid_lists_included_grids():
    with pytest.raises(UserError, match="no such grid; give a YAML file, or one of: cpu, paper"):
        find_grid("cpux")


def test_later_overrides_win(tiny):
    tiny.write_text(TINY.replace("params: {}}\nmod", "params: {train: {epochs: 3}}}\nmod"))
    values = plan_runs("tiny", load_grid(tiny), None)[1][Cell("phantom", "vit", 1)].params
    assert (values["train"]["epochs"], values["train"]["batch_size"]) == (3, 32)
    assert (values["seed"], values["model"]["fade"]) == (1, None)


def test_missing_data_folder_is_reported(tmp_path):
    grid = load_grid(find_grid("cpu"))
    with pytest.raises(UserError, match="retinamnist needs the folder with its files; add --data FOLDER"):
        plan_runs("cpu", grid, None)
    run = plan_runs("cpu", grid, tmp_path)[1][Cell("isic", "vit", 42)]
    assert run.params["dataset"]["mirror"] == f"{tmp_path}/isic2019"


def random_predictions(signal: float, seed: int, images: int = 60) -> predictions.Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(images)[:, None] % 3
    task = TASKS["multi-class"]
    scores = task.probabilities(signal * np.eye(3)[labels[:, 0]] + random.normal(size=(images, 3)))
    index = pd.DataFrame({"split": "test", "id": [f"{i:03d}" for i in range(images)], "group": None})
    return predictions.build_predictions(index, labels, scores, task, ("a", "b", "c"))


CELLS = ["phantom/fadenet/0", "phantom/vit/0", "phantom/fadenet/1", "phantom/vit/1"]


def run_names(grid: Path) -> dict[str, str]:
    """Names of the experiments of a grid's cells."""
    return {str(cell): run.name for cell, run in plan_runs("tiny", load_grid(grid), None)[1].items()}


def test_changed_params_train_affected_cells_again(tiny):
    before = run_names(tiny)
    assert list(before) == CELLS
    tiny.write_text(TINY.replace("{model: {fade: null}}", "{model: {fade: null, dropout: 0.2}}"))
    assert {key for key, name in run_names(tiny).items() if name != before[key]} == {CELLS[1], CELLS[3]}
    tiny.write_text(TINY.replace("bootstrap_resamples: 100", "bootstrap_resamples: 200"))
    assert run_names(tiny) == before  # does not change predictions
    tiny.write_text(TINY.replace("images: 200", "images: 300"))
    assert not set(run_names(tiny).values()) & set(before.values())


def test_changed_dataset_file_trains_all_cells_again(tiny, tmp_path):
    (tmp_path / "own.npz").write_bytes(b"one")
    file_dataset = f"dataset: {{name: npz, root: {tmp_path / 'own.npz'}, "
    tiny.write_text(TINY.replace("dataset: {name: phantom, ", file_dataset))
    before = run_names(tiny)
    (tmp_path / "own.npz").write_bytes(b"two")
    assert not set(run_names(tiny).values()) & set(before.values())


class FakeRunner:
    """Completes each run at the next status check, except failing ones; keeps the results, as DVC would."""

    def __init__(self) -> None:
        self.finished: dict[str, RunResult] = {}
        self.failing = ""
        self.started: list[str] = []

    def start(self, run: PipelineRun) -> None:
        self.started.append("/".join(run.name.split("-")[1:-1]))

    def status(self, run: PipelineRun) -> RunStatus:
        if self.failing and self.failing in run.name:
            return RunStatus("Failed", "out of memory")
        self.finished[run.name] = RunResult(run.name, "")
        return RunStatus("Completed")


@pytest.fixture
def runner(monkeypatch) -> FakeRunner:
    runner = FakeRunner()
    monkeypatch.setattr(engine, "POLL_INTERVAL", 0.0)
    monkeypatch.setattr(engine.results, "find_result", runner.finished.get)
    return runner


@pytest.mark.parametrize("jobs", [1, 3])
def test_only_failed_runs_are_repeated(tiny, runner, jobs, capsys):
    _, training = plan_runs("tiny", load_grid(tiny), None)
    completed = dict.fromkeys(CELLS, "completed")
    for failing, started, expected in (
        ("vit-0", CELLS, {**completed, CELLS[1]: "out of memory"}),
        ("", [CELLS[1]], {**dict.fromkeys(CELLS, "finished earlier"), CELLS[1]: "completed"}),
    ):
        plan = ListPlan({str(cell): run for cell, run in training.items()})
        runner.failing, runner.started = failing, []
        engine.execute(plan, runner, jobs)
        assert runner.started == started
        lines = [f"{key}: {message}" for key, message in expected.items()]
        assert sorted(capsys.readouterr().out.splitlines()) == sorted(lines)
        assert [key for key, status in plan.statuses.items() if status.result is None] == [CELLS[1]] * bool(failing)


def test_run_without_experiment_has_failed(tiny, runner, monkeypatch):
    monkeypatch.setattr(engine.results, "find_result", lambda name: None)
    plan = ListPlan(plan_runs("tiny", load_grid(tiny), None)[0])
    engine.execute(plan, runner, 1)
    assert plan.statuses["phantom"] == RunStatus("Failed", "the run left no DVC experiment in this repository")


def test_failed_preprocessing_stops_the_cells_of_a_dataset(tiny, runner, monkeypatch, tmp_path):
    monkeypatch.setattr(tables.runners, "open_runner", lambda logs: nullcontext(runner))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner.failing = "tiny-phantom"
    arguments = argparse.Namespace(grid=str(tiny), data=None, jobs=1, out=tmp_path / "tables.md")
    with pytest.raises(UserError, match=r"does not contain these failed runs.*\nphantom: out of memory$"):
        tables.run(arguments)
    assert runner.started == ["phantom"]
    missing = ", ".join(CELLS)
    assert f"**Not finished: {missing}.**" in (tmp_path / "tables.md").read_text()


@pytest.fixture
def document(tiny) -> str:
    grid = load_grid(tiny)
    trained = {
        ("phantom", name): {seed: random_predictions(signal, 10 * index + seed, 300) for seed in (0, 1, 2)}
        for index, (name, signal) in enumerate({"fadenet": 2.0, "vit": 1.0}.items())
    }
    published = pd.DataFrame(
        [
            ("phantom", "28", "A | B", 0.75, 0.5, np.nan, True, ""),
            ("phantom", "224", "C", 0.9, np.nan, np.nan, False, "other images"),
            ("elsewhere", "28", "D", 0.1, 0.1, 0.1, True, ""),
        ],
        columns=list(report.PUBLISHED_COLUMNS),
    )
    costs = {(16, "fadenet"): ModelCost(990_000, 2 * 580_000_000, 32, 15 * 2**20, 2053.4, 8)}
    return "\n\n".join(report.render_tables(grid, trained, costs, published))


def table_rows(document: str, table: int) -> list[list[str]]:
    section = document.split(f"## Table {table}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_table_1_has_models_and_published_numbers(document):
    rows = table_rows(document, 1)
    assert [row[1] for row in rows] == ["FadeNet", "plain", "published: A \\| B, 28", "published: C, 224"]
    assert re.fullmatch(r"0\.\d\d \(0\.\d\d to 0\.\d\d\) ± 0\.\d{4}", rows[0][3])
    assert float(rows[0][3][:4]) > float(rows[1][3][:4])
    assert rows[2][3:] == ["0.750", "0.500", "comparable"]
    assert rows[3][3:] == ["0.900", "", "not comparable: other images"]


def test_table_2_compares_the_reference_with_other_models(document):
    ((_, title, seeds, auc, errors, accuracy, _),) = table_rows(document, 2)
    assert (title, seeds) == ("FadeNet - plain", "3")
    for cell in (auc, accuracy):
        value, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cell).groups())
        assert 0 < low < value < high
    assert re.fullmatch(r"0\.\d{4}, 0\.\d{4}", errors)


def test_table_3_has_rows_by_model_and_size(document):
    assert table_rows(document, 3) == [["16 x 16", "FadeNet", "0.99", "0.58", "15", "2053"]]
