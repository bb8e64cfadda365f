"""Grids: strict checking, which cells run and which are finished already, and the tables."""

import argparse
import re
from contextlib import nullcontext
from dataclasses import asdict
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
from pipelines.experiments import grid as grids
from pipelines.experiments.engine import ListPlan, PipelineRun, RunStatus
from pipelines.experiments.results import RunResult

TINY = """\
preset: null
reference: fadenet
seeds: [0, 1]
common:
  dataset: {name: phantom, images: 200, size: 16}
  train: {epochs: 1, batch_size: 32, device: cpu}
  evaluate: {figure_dpi: 50, bootstrap_resamples: 100}
sets:
  phantom: {title: Phantom, accuracy: accuracy, params: {}}
networks:
  fadenet: {title: FadeNet, params: {}}
  vit: {title: plain, params: {model: {fade: null}}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_the_shipped_grids_are_valid_and_offer_the_networks_of_the_published_tables(tmp_path):
    for name in ("cpu", "paper"):
        grid = grids.load_grid(grids.find_grid(name))
        prepared, trained = grids.plan_runs(name, grid, tmp_path)
        assert prepared.keys() == grid.sets.keys()
        assert len(trained) == len(grid.sets) * len(grid.networks) * len(grid.seeds)
    paper = {"fadenet", "vit", "resnet18", "resnet50", "efficientnet_b0", "efficientnet_b4", "deit"}
    assert grid.networks.keys() == paper


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("reference:", "referense:", "unknown key referense; did you mean reference?"),
        ("reference: fadenet", "reference: fade", "reference is fade, but the networks are fadenet, vit"),
        ("seeds: [0, 1]", "seeds: []", "seeds is [], but should be"),
        ("seeds: [0, 1]", "seeds: [-1]", "params.yaml with the overrides of phantom/fadenet/-1: seed is -1"),
        ("preset: null", "preset: papper", "presets/papper.yaml: cannot be read"),
        ("model: {fade", "model: {fad", "of phantom/vit/0: unknown key model.fad; did you mean model.fade?"),
        ("model: {fade: null}", "dataset: {size: 32}", "networks.vit.params changes dataset, but all share the images"),
        ("accuracy: accuracy", "accuracy: acuracy", "sets.phantom.accuracy is 'acuracy', but should be"),
        ("accuracy: accuracy", "acuracy: accuracy", "phantom.acuracy; did you mean sets.phantom.accuracy?"),
        ("images: 200", "images: 20", "params.yaml with the overrides of phantom: dataset.images is 20"),
        ("  vit:", "  V it:", "should match pattern"),
        ("preset: null", "- preset", "is not valid YAML"),
    ],
)
def test_a_wrong_grid_is_told_by_key(tiny, before, after, told):
    assert before in TINY
    tiny.write_text(TINY.replace(before, after))
    with pytest.raises(UserError, match=re.escape(told)):
        grids.plan_runs("tiny", grids.load_grid(tiny), None)


def test_an_unknown_grid_lists_those_there_are():
    with pytest.raises(UserError, match="no such grid; name a YAML file, or one of: cpu, paper"):
        grids.find_grid("cpux")


def test_later_overrides_count(tiny):
    tiny.write_text(TINY.replace("params: {}}\nnet", "params: {train: {epochs: 3}}}\nnet"))
    grid = grids.load_grid(tiny)
    values = asdict(grids.plan_runs("tiny", grid, None)[1][grids.Cell("phantom", "vit", 1)])["values"]
    assert (values["train"]["epochs"], values["train"]["batch_size"]) == (3, 32)
    assert (values["seed"], values["model"]["fade"]) == (1, None)


def test_a_set_that_needs_the_folder_of_its_files_says_so(tmp_path):
    grid = grids.load_grid(grids.find_grid("cpu"))
    with pytest.raises(UserError, match="retinamnist needs the folder of its files: give it with --data"):
        grids.plan_runs("cpu", grid, None)
    run = grids.plan_runs("cpu", grid, tmp_path)[1][grids.Cell("isic", "vit", 42)]
    assert asdict(run)["values"]["dataset"]["mirror"] == f"{tmp_path}/isic2019"


def drawn(signal: float, seed: int, images: int = 60) -> predictions.Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(images)[:, None] % 3
    task = TASKS["multi-class"]
    scores = task.probabilities(signal * np.eye(3)[labels[:, 0]] + random.normal(size=(images, 3)))
    index = pd.DataFrame({"split": "test", "id": [f"{i:03d}" for i in range(images)], "group": None})
    return predictions.build_predictions(index, labels, scores, task, ("a", "b", "c"))


CELLS = ["phantom/fadenet/0", "phantom/vit/0", "phantom/fadenet/1", "phantom/vit/1"]


def names(grid: Path) -> dict[str, str]:
    """Names of the experiments of a grid's cells."""
    return {str(cell): run.name for cell, run in grids.plan_runs("tiny", grids.load_grid(grid), None)[1].items()}


def test_other_parameters_train_the_cells_that_they_decide(tiny):
    before = names(tiny)
    assert list(before) == CELLS
    tiny.write_text(TINY.replace("{model: {fade: null}}", "{model: {fade: null, dropout: 0.2}}"))
    assert {key for key, name in names(tiny).items() if name != before[key]} == {CELLS[1], CELLS[3]}
    tiny.write_text(TINY.replace("bootstrap_resamples: 100", "bootstrap_resamples: 200"))
    assert names(tiny) == before  # of no prediction
    tiny.write_text(TINY.replace("images: 200", "images: 300"))
    assert not set(names(tiny).values()) & set(before.values())


def test_other_content_of_a_users_own_file_trains_all_cells(tiny, tmp_path):
    (tmp_path / "own.npz").write_bytes(b"one")
    of_file = f"dataset: {{name: npz, root: {tmp_path / 'own.npz'}, "
    tiny.write_text(TINY.replace("dataset: {name: phantom, ", of_file))
    before = names(tiny)
    (tmp_path / "own.npz").write_bytes(b"two")
    assert not set(names(tiny).values()) & set(before.values())


class Pretended:
    """Completes each run at the next look, but for those that are to fail; keeps what completed, as DVC would."""

    def __init__(self) -> None:
        self.finished: dict[str, RunResult] = {}
        self.fails = ""
        self.ran: list[str] = []

    def start(self, run: PipelineRun) -> None:
        self.ran.append("/".join(run.name.split("-")[1:-1]))

    def status(self, run: PipelineRun) -> RunStatus:
        if self.fails and self.fails in run.name:
            return RunStatus("Failed", "it went wrong")
        self.finished[run.name] = RunResult(run.name, "")
        return RunStatus("Completed")


@pytest.fixture
def runner(monkeypatch) -> Pretended:
    runner = Pretended()
    monkeypatch.setattr(engine, "POLL_INTERVAL", 0.0)
    monkeypatch.setattr(engine.results, "find", runner.finished.get)
    return runner


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_that_fails_is_named_and_what_is_finished_does_not_run_again(tiny, runner, jobs, capsys):
    _, trained = grids.plan_runs("tiny", grids.load_grid(tiny), None)
    ended = dict.fromkeys(CELLS, "completed")
    for fails, ran, expected in (
        ("vit-0", CELLS, {**ended, CELLS[1]: "it went wrong"}),
        ("", [CELLS[1]], {**dict.fromkeys(CELLS, "finished before"), CELLS[1]: "completed"}),
    ):
        plan, runner.fails, runner.ran = ListPlan({str(cell): run for cell, run in trained.items()}), fails, []
        engine.execute(plan, runner, jobs)
        assert runner.ran == ran
        assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"{key}: {how}" for key, how in expected.items())
        assert [key for key, status in plan.statuses.items() if status.result is None] == [CELLS[1]] * bool(fails)


def test_a_run_that_leaves_no_experiment_has_failed(tiny, runner, monkeypatch):
    monkeypatch.setattr(engine.results, "find", lambda name: None)
    plan = ListPlan(grids.plan_runs("tiny", grids.load_grid(tiny), None)[0])
    engine.execute(plan, runner, 1)
    assert plan.statuses["phantom"] == RunStatus("Failed", "it left no DVC experiment in this repository")


def test_data_that_cannot_be_prepared_stop_the_cells_of_their_set(tiny, runner, monkeypatch, tmp_path):
    monkeypatch.setattr(tables.runners, "runner", lambda logs: nullcontext(runner))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner.fails = "tiny-phantom"
    arguments = argparse.Namespace(grid=str(tiny), data=None, jobs=1, out=tmp_path / "tables.md")
    with pytest.raises(UserError, match=r"lacks what failed.*\nphantom: it went wrong$"):
        tables.run(arguments)
    assert runner.ran == ["phantom"]
    left_out = ", ".join(CELLS)
    assert f"**Not finished, and left out: {left_out}.**" in (tmp_path / "tables.md").read_text()


@pytest.fixture
def document(tiny) -> str:
    grid = grids.load_grid(tiny)
    trained = {
        ("phantom", name): {seed: drawn(signal, 10 * place + seed, 300) for seed in (0, 1, 2)}
        for place, (name, signal) in enumerate({"fadenet": 2.0, "vit": 1.0}.items())
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


def rows(document: str, table: int) -> list[list[str]]:
    section = document.split(f"## Table {table}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_table_1_has_a_row_for_each_network_and_each_published_number(document):
    found = rows(document, 1)
    assert [row[1] for row in found] == ["FadeNet", "plain", "published: A \\| B, 28", "published: C, 224"]
    assert re.fullmatch(r"0\.\d\d \(0\.\d\d to 0\.\d\d\) ± 0\.\d{4}", found[0][3])
    assert float(found[0][3][:4]) > float(found[1][3][:4])
    assert found[2][3:] == ["0.750", "0.500", "comparable"]
    assert found[3][3:] == ["0.900", "", "not comparable: other images"]


def test_table_2_has_the_reference_less_each_other_network(document):
    ((_, title, seeds, auc, errors, accuracy, _),) = rows(document, 2)
    assert (title, seeds) == ("FadeNet - plain", "3")
    for cell in (auc, accuracy):
        value, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cell).groups())
        assert 0 < low < value < high
    assert re.fullmatch(r"0\.\d{4}, 0\.\d{4}", errors)


def test_table_3_has_a_row_for_each_network_and_size(document):
    assert rows(document, 3) == [["16 x 16", "FadeNet", "0.99", "0.58", "15", "2053"]]
