"""A grid is checked before it runs; what is finished stays, what fails is told, and the tables hold what was found."""

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fadeformer import predictions
from fadeformer.complexity import Cost
from fadeformer.errors import UserError
from fadeformer.tasks import TASKS
from pipelines.tables import copies, report, runs
from pipelines.tables import grid as grids
from pipelines.tables.copies import Failed, Stages
from pipelines.tables.grid import Cell
from tests.conftest import ROOT, Project

TINY = """\
preset: null
reference: fadenet
seeds: [0, 1]
common:
  dataset: {name: phantom, images: 200, size: 16}
  train: {epochs: 1, batch_size: 32, device: cpu}
  evaluate: {figure_dpi: 50, bootstrap_draws: 100}
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
        grid = grids.load(grids.find(name))
        runs.check(runs.Runs(grid, ROOT, tmp_path, tmp_path))
        assert len(list(grids.cells(grid))) == len(grid.sets) * len(grid.networks) * len(grid.seeds)
    paper = {"fadenet", "vit", "resnet18", "resnet50", "efficientnet_b0", "efficientnet_b4", "deit"}
    assert grid.networks.keys() == paper


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("reference:", "referense:", "unknown key referense; did you mean reference?"),
        ("reference: fadenet", "reference: fade", "reference is fade, but the networks are fadenet, vit"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "seeds names a seed twice"),
        ("seeds: [0, 1]", "seeds: [-1]", "seeds.0 is -1"),
        ("preset: null", "preset: papper", "preset is papper; there are: paper, retinamnist"),
        (
            "model: {fade",
            "model: {fad",
            "in networks.vit: unknown key params.model.fad; did you mean params.model.fade?",
        ),
        ("model: {fade: null}", "dataset: {size: 32}", "networks.vit.params changes dataset, but all share the images"),
        ("accuracy, params: {}", "accuracy, params: {seed: 3}", "sets.phantom.params changes seed"),
        ("accuracy: accuracy", "accuracy: acuracy", "in sets.phantom: accuracy is 'acuracy'"),
        ("  vit:", "  V it:", "should match pattern"),
        ("preset: null", "- preset", "cannot be read as YAML"),
    ],
)
def test_a_wrong_grid_is_told_by_key(tiny, before, after, told):
    assert before in TINY
    tiny.write_text(TINY.replace(before, after))
    with pytest.raises(UserError, match=re.escape(told)):
        grids.load(tiny)


def test_an_unknown_grid_lists_those_there_are():
    with pytest.raises(UserError, match="no such grid; name a YAML file, or one of: cpu, paper"):
        grids.find("cpux")


def test_later_overrides_count_and_values_out_of_range_name_their_cells(tiny, tmp_path):
    tiny.write_text(TINY.replace("params: {}}\nnet", "params: {train: {epochs: 3}}}\nnet"))
    grid = grids.load(tiny)
    of_vit = grids.changes(grid, "phantom", "vit", 1, None)
    assert of_vit["train"] == {"epochs": 3, "batch_size": 32, "device": "cpu"}
    assert (of_vit["seed"], of_vit["model"]) == (1, {"fade": None})
    assert "seed" not in grids.changes(grid, "phantom", None, None, None)
    tiny.write_text(TINY.replace("{model: {fade: null}}", "{train: {probe_epochs: 1}}"))
    with pytest.raises(UserError, match=r"^phantom/vit/0: params\.yaml with .*vit/0: train\.probe_epochs \(1\) and"):
        runs.check(runs.Runs(grids.load(tiny), ROOT, tmp_path, None))


def test_a_set_that_needs_the_folder_of_its_files_says_so(tmp_path):
    grid = grids.load(grids.find("cpu"))
    with pytest.raises(UserError, match="the set retinamnist needs the folder of its files: give it with --data"):
        grids.changes(grid, "retinamnist", None, None, None)
    assert grids.changes(grid, "isic", "vit", 42, tmp_path)["dataset"]["mirror"] == f"{tmp_path}/isic2019"


class Pretended(Stages):
    """Leaves at once what the stages would leave; which cells fail is said by their params.yaml."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        super().__init__({})
        self.fails, self.ran, self.lock = fails, [], threading.Lock()

    def run(self, names, folder: Path, log: Path) -> float:
        of = "/".join(folder.parent.parts[-(1 if folder.parents[1].name == "sets" else 3) :])
        with self.lock:
            self.ran.append(of)
        if of in self.fails:
            raise Failed(f"{names[-1]}: it went wrong", log)
        if names == runs.DATA_STAGES:
            (folder / "data/processed").mkdir(parents=True, exist_ok=True)
            (folder / "data/processed/meta.json").write_text(json.dumps(of))
            return 2.0
        assert (folder / "data/processed/meta.json").is_file()
        for name in ("models", "reports"):
            (folder / name).mkdir()
        described = {"model": {"image_size": 16}, "precision": "32", "best_epoch": 1}
        (folder / "models/model.json").write_text(json.dumps(described))
        (folder / "models/run.json").write_text(json.dumps({"mlflow_run_id": "x"}))
        predictions.write(drawn(signal=1.0, seed=0), folder / "reports/predictions.parquet")
        return 3.0


def drawn(signal: float, seed: int, images: int = 60) -> predictions.Predictions:
    random = np.random.default_rng(seed)
    labels = np.arange(images)[:, None] % 3
    task = TASKS["multi-class"]
    scores = task.probabilities(signal * np.eye(3)[labels[:, 0]] + random.normal(size=(images, 3)))
    index = pd.DataFrame({"split": "test", "id": [f"{i:03d}" for i in range(images)], "group": None})
    return predictions.table(index, labels, scores, task, ("a", "b", "c"))


CELLS = ["phantom/fadenet/0", "phantom/vit/0", "phantom/fadenet/1", "phantom/vit/1"]


def finish(
    tiny: Path, folder: Path, jobs: int = 1, fails: tuple[str, ...] = ()
) -> tuple[runs.Runs, list[str], list[str]]:
    """Runs a grid with pretended stages: what came of it, what ran, what was said."""
    found, stages, said = runs.Runs(grids.load(tiny), ROOT, folder, None), Pretended(fails), []
    found.finish(stages, jobs, said.append)
    return found, stages.ran, said


def test_data_are_prepared_once_and_what_is_finished_does_not_run_again(tiny, tmp_path):
    _, ran, said = finish(tiny, tmp_path)
    assert ran == ["phantom", *CELLS]
    assert said[-1] == "phantom/vit/1: trained and judged (3 s); 4 of 4"
    found, ran, _ = finish(tiny, tmp_path)
    assert (found.failed, ran, found.unfinished()) == ({}, [], ([], []))
    assert not list(tmp_path.glob("cells/*/*/*/work"))


def test_a_cell_that_lacks_its_record_or_whose_predictions_are_damaged_runs_again(tiny, tmp_path):
    finish(tiny, tmp_path)
    shutil.rmtree(tmp_path / "cells" / CELLS[0])
    (tmp_path / "cells" / CELLS[3] / "predictions.parquet").write_bytes(b"torn")
    assert sorted(finish(tiny, tmp_path, jobs=2)[1]) == sorted([CELLS[0], CELLS[3]])


def test_other_parameters_train_the_cells_that_they_decide_and_other_data_all(tiny, tmp_path):
    finish(tiny, tmp_path)
    tiny.write_text(TINY.replace("{model: {fade: null}}", "{model: {fade: null, dropout: 0.2}}"))
    assert finish(tiny, tmp_path)[1] == [CELLS[1], CELLS[3]]
    tiny.write_text(tiny.read_text().replace("bootstrap_draws: 100", "bootstrap_draws: 200"))
    assert finish(tiny, tmp_path)[1] == []  # of no prediction
    tiny.write_text(tiny.read_text().replace("images: 200", "images: 300"))
    _, ran, _ = finish(tiny, tmp_path)
    assert ran == ["phantom"]  # the pretended data are the same, and so the cells stand
    (tmp_path / "sets/phantom/set.json").write_text(
        (tmp_path / "sets/phantom/set.json").read_text().replace('"data": "', '"data": "another')
    )
    assert finish(tiny, tmp_path)[1] == CELLS


def test_a_cell_that_fails_is_named_and_the_others_are_finished(tiny, tmp_path):
    found, ran, said = finish(tiny, tmp_path, fails=(CELLS[1],))
    assert ran == ["phantom", *CELLS]
    assert list(found.failed) == [CELLS[1]]
    assert "evaluate: it went wrong; all that it printed: " in found.failed[CELLS[1]]
    assert said[2] == f"{CELLS[1]}: evaluate: it went wrong; 2 of 4"
    assert [str(cell) for cell in found.unfinished()[1]] == [CELLS[1]]
    assert finish(tiny, tmp_path)[1] == [CELLS[1]]


def test_data_that_cannot_be_prepared_stop_the_cells_of_their_set_alone(tiny, tmp_path):
    other = "  other: {title: Other, accuracy: accuracy, params: {}}\nnetworks:"
    tiny.write_text(TINY.replace("networks:", other))
    found, ran, _ = finish(tiny, tmp_path, fails=("phantom",))
    assert sorted(ran) == sorted(["phantom", "other", *(cell.replace("phantom", "other") for cell in CELLS)])
    assert found.failed[CELLS[0]] == "the data of phantom are not ready"
    assert found.failed.keys() == {"phantom", *CELLS}


def test_a_signal_ends_what_runs(tmp_path):
    """Two sleep, the third fails in a way that is not meant for people: nothing is left behind."""
    stages = Stages({})
    sleeping = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2)]
    stages._running.update(sleeping)

    def run(number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return float(sleeping[number].wait())

    with pytest.raises(KeyboardInterrupt):
        list(runs._side_by_side([0, 1, 2], run, 3, stages))
    assert all(process.poll() is not None for process in sleeping)
    with pytest.raises(Failed, match="being stopped"):
        stages.run(("train",), tmp_path, tmp_path / "log")


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("train: epoch 1\n\nevaluate: models: not found;\nrun again\n", "evaluate: models: not found; run again"),
        ("\ntrain: unknown key\n", "train: unknown key"),
        ("Traceback ...\n  here\nValueError: oh\n", "exit status 3: ValueError: oh"),
        ("train: epoch 1 is the best\nKilled\n", "exit status 3: Killed"),
        ("", "exit status 3, and nothing printed"),
    ],
)  # fmt: skip
def test_the_message_of_a_stage_that_failed_is_found(printed, told):
    assert copies._told(("train", "evaluate"), printed, 3) == told


@pytest.fixture
def document(tiny) -> str:
    grid = grids.load(tiny)
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
        columns=list(report.PUBLISHED),
    )
    setting = report.Setting(
        "make tables", TINY, "0123456789abcdef" * 4, ["a machine"], ["c0de", "c0df"], 120.0, ["phantom/vit/7"]
    )
    costs = {(16, "fadenet"): Cost(990_000, 2 * 580_000_000, 32, 15 * 2**20, 2053.4, 8)}
    return report.markdown(grid, trained, costs, published, setting)


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


def test_table_3_and_how_the_tables_came_to_be(document):
    assert rows(document, 3) == [["16 x 16", "FadeNet", "0.99", "0.58", "15", "2053"]]
    assert document.startswith("# Tables\n\n```sh\nmake tables\n```\n")
    assert "in 2 minutes of cells, by 2 versions of the code (c0de, c0df), on: a machine." in document
    assert "**Not finished, and left out: phantom/vit/7.**" in document
    assert TINY in document


def test_cells_are_named_as_their_folders():
    assert str(Cell("a", "b", 3)) == "a/b/3"


@pytest.mark.pipeline
def test_a_grid_is_trained_and_goes_on_where_a_cell_is_gone(project: Project):
    (project.folder / "tiny.yaml").write_text(TINY)
    command = ("make", "--old-file=.venv/installed", "tables", "GRID=tiny.yaml", "JOBS=2")
    output = project.run(*command)
    assert re.findall(r"^(\S+): (?:data are ready|trained)", output, re.MULTILINE)[0] == "phantom"
    assert len(re.findall(r"^phantom/\w+/\d: trained and judged", output, re.MULTILINE)) == 4
    written = project.folder / "docs/tables.md"
    first = written.read_text()
    assert [len(rows(first, table)) for table in (1, 2, 3)] == [2, 1, 2]
    kept = project.folder / ".cache/tables/tiny/cells"
    before = {str(path.parent.relative_to(kept)): path.read_bytes() for path in kept.rglob("predictions.parquet")}
    assert sorted(before) == sorted(CELLS)
    assert len(set(before.values())) == 4
    shutil.rmtree(kept / CELLS[2])
    output = project.run(*command)
    assert re.findall(r"^(\S+): trained and judged", output, re.MULTILINE) == [CELLS[2]]
    assert (kept / CELLS[2] / "predictions.parquet").read_bytes() == before[CELLS[2]]
    assert written.read_text().split("Trained and judged")[1].split("\n", 1)[1] == first.split("Trained and judged")[1].split("\n", 1)[1]  # fmt: skip  # noqa: E501
    assert project.run("git", "status", "--short").split("\n")[:-1] == [" M docs/tables.md", "?? tiny.yaml"]
    assert list(project.temporary.iterdir()) == []
