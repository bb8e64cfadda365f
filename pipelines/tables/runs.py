"""Runs what of a grid is not finished: the data stages once for each set, then each cell; what is finished is kept.

    sets/SET/set.json                    the data are ready in sets/SET/work
    cells/SET/NETWORK/SEED/cell.json     the cell is finished; beside it its predictions.parquet
    cells/SET/NETWORK/SEED/work          a cell that has begun: its checkpoints, until it is finished
    .../log                              what its stages printed

A cell is trained again when the parameters that decide its training, or its data, are others than it was trained with.
Another version of the code is told in the tables, and is no reason: a comment would train the whole grid anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
from ruamel.yaml import YAML

from fadeformer import params
from fadeformer.errors import UserError
from fadeformer.files import checksum, read_json, whole_file, write_json
from fadeformer.params import Params
from pipelines import begun, paths
from pipelines.tables import grid as grids
from pipelines.tables.copies import Failed, Stages, export, link
from pipelines.tables.grid import Cell, Grid

DATA_STAGES, CELL_STAGES = ("download", "validate", "preprocess"), ("train", "evaluate")
WITHOUT_INFLUENCE = ("preprocess.threads",)
Thing = TypeVar("Thing")


@dataclass
class Runs:
    """The runs of a grid.

    Attributes:
        grid: what is wanted.
        project: folder of the project.
        folder: in which cells are kept.
        data: what `{data}` in the grid stands for.
        failed: by set or cell, why it is not finished.
    """

    grid: Grid
    project: Path
    folder: Path
    data: Path | None
    failed: dict[str, str] = field(default_factory=dict)

    def place(self, of: Cell | str) -> Path:
        """The folder of a cell, or of a set."""
        return self.folder / ("sets" if isinstance(of, str) else "cells") / str(of)

    def changes(self, of: Cell | str) -> dict[str, Any]:
        """Overrides of params.yaml for a cell, or for a set."""
        cell = Cell(of, "", 0) if isinstance(of, str) else of
        network, seed = (cell.network, cell.seed) if cell.network else (None, None)
        return grids.changes(self.grid, cell.images, network, seed, self.data)

    def wanted(self, of: Cell | str) -> Params:
        """All parameters of a cell, or of a set."""
        return grids.wanted(self._base, self.changes(of), f"{paths.PARAMS} with the overrides of {of}")

    @cached_property
    def _base(self) -> dict[str, Any]:
        return params.load(self.project / paths.PARAMS).nested()

    def record(self, of: Cell | str) -> dict[str, Any] | None:
        """What is noted of a finished cell or set; None where it is not finished, or no longer what is wanted."""
        place, wanted = self.place(of), self.wanted(of)
        try:
            found = read_json(place / ("set.json" if isinstance(of, str) else "cell.json"))
        except (OSError, ValueError):  # not finished
            return None
        if isinstance(of, str):
            same = found["params"] == of_data(wanted) and (place / "work" / paths.PROCESSED).is_dir()
            return found if same else None
        data, predictions = self.record(of.images), place / paths.PREDICTIONS.name
        same = found["params"] == of_training(wanted) and data is not None and found["data"] == data["data"]
        whole = predictions.is_file() and checksum(predictions, "sha256") == found["predictions"]
        return found if same and whole else None

    def unfinished(self) -> tuple[list[str], list[Cell]]:
        """Sets whose data are not ready, and cells that are not trained and judged."""
        cells = [cell for cell in grids.cells(self.grid) if self.record(cell) is None]
        return [name for name in self.grid.sets if self.record(name) is None], cells

    def finish(self, stages: Stages, jobs: int, say: Callable[[str], None]) -> None:
        """Runs what is not finished, some at a time. What fails is noted, and all else goes on.

        Args:
            stages: that run.
            jobs: cells at a time.
            say: prints a line.
        """
        sets, _ = self.unfinished()
        for name, outcome in _side_by_side(sets, lambda name: self._prepare(name, stages), jobs, stages):
            self._note(name, outcome)
            say(f"{name}: {outcome if isinstance(outcome, Failed) else f'data are ready ({outcome:.0f} s)'}")
        _, cells = self.unfinished()
        for cell in cells:
            if cell.images in self.failed:
                self.failed[str(cell)] = f"the data of {cell.images} are not ready"
        wanted = [cell for cell in cells if cell.images not in self.failed]
        for number, (cell, outcome) in enumerate(
            _side_by_side(wanted, lambda cell: self._train(cell, stages), jobs, stages), start=1
        ):
            self._note(str(cell), outcome)
            told = outcome if isinstance(outcome, Failed) else f"trained and judged ({outcome:.0f} s)"
            say(f"{cell}: {told}; {number} of {len(wanted)}")

    def _note(self, name: str, outcome: Failed | float) -> None:
        if isinstance(outcome, Failed):
            self.failed[name] = f"{outcome}; all that it printed: {outcome.log}"

    def _prepare(self, name: str, stages: Stages) -> float:
        place, wanted = self.place(name), self.wanted(name)
        (place / "set.json").unlink(missing_ok=True)
        export(self.project, place / "work", self.changes(name))
        seconds = stages.run(DATA_STAGES, place / "work", place / "log")
        processed = place / "work" / paths.PROCESSED
        sums = {path.name: checksum(path, "sha256") for path in sorted(processed.iterdir()) if path.is_file()}
        write_json(place / "set.json", {"params": of_data(wanted), "data": begun.digest(sums), "seconds": seconds})
        return seconds

    def _train(self, cell: Cell, stages: Stages) -> float:
        place, wanted, data = self.place(cell), self.wanted(cell), self.record(cell.images)
        if data is None:
            raise RuntimeError(f"{cell} was to be trained before its data were ready")
        work = place / "work"
        (place / "cell.json").unlink(missing_ok=True)
        export(self.project, work, self.changes(cell))
        link(self.place(cell.images) / "work" / paths.PROCESSED, work / paths.PROCESSED)
        seconds = stages.run(CELL_STAGES, work, place / "log")
        with whole_file(place / paths.PREDICTIONS.name) as path:
            shutil.copy(work / paths.PREDICTIONS, path)
        described = read_json(work / paths.ARCHITECTURE)
        write_json(
            place / "cell.json",
            {
                "params": of_training(wanted), "data": data["data"], "code": code_of(work),
                "predictions": checksum(place / paths.PREDICTIONS.name, "sha256"), "model": described["model"],
                "precision": described["precision"], "best_epoch": described["best_epoch"], "seconds": seconds,
                "mlflow_run_id": read_json(work / paths.RUN)["mlflow_run_id"], "machine": machine(wanted),
            },
        )  # fmt: skip
        shutil.rmtree(work)  # the model is in MLflow
        return seconds


def of_data(wanted: Params) -> dict[str, Any]:
    """What decides which images there are: parameters, and the content of a user's own file."""
    root = Path(wanted.dataset.root)
    content = {"root": checksum(root, "sha256")} if root.is_file() else {}
    return _sections(wanted, ("dataset", "split", "validate", "preprocess")) | content


def of_training(wanted: Params) -> dict[str, Any]:
    """Parameters that decide what a training comes to, beside its data."""
    return _sections(wanted, begun.SECTIONS)


def _sections(wanted: Params, sections: Iterable[str]) -> dict[str, Any]:
    chosen = {name: value for name, value in wanted.flat().items() if name.split(".")[0] in set(sections)}
    return {name: value for name, value in chosen.items() if name not in WITHOUT_INFLUENCE}


def code_of(project: Path) -> str:
    """A name for the version of the sources that decide predictions."""
    listed = YAML(typ="safe").load(project / "dvc.yaml")["stages"]
    sources = sorted({dep for stage in CELL_STAGES for dep in listed[stage]["deps"] if dep.endswith(".py")})
    sums = "".join(f"{name} {checksum(project / name, 'sha256')}\n" for name in sources)
    return hashlib.sha256(sums.encode()).hexdigest()[:12]


def machine(wanted: Params | None = None) -> str:
    """On what something was computed, in words that name no host."""
    import torch

    gpu = torch.cuda.is_available() and (wanted is None or wanted.train.device != "cpu")
    threads = os.environ.get("OMP_NUM_THREADS")
    of = torch.cuda.get_device_name() if gpu else f"{_processor()}, {threads or torch.get_num_threads()} threads a cell"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return f"{of}, {os.cpu_count()} cores, {memory}, torch {version('torch')}, timm {version('timm')}"


def _processor() -> str:
    """The processor's own name, which only Linux tells in a file; elsewhere its kind."""
    told = Path("/proc/cpuinfo")
    names = [line for line in told.read_text().splitlines() if line.startswith("model name")] if told.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _side_by_side(
    things: list[Thing], run: Callable[[Thing], float], jobs: int, stages: Stages
) -> Iterator[tuple[Thing, Failed | float]]:
    """Runs something for each thing, some at a time, and gives what came of it in the order in which they end.

    Where the block is left early, by a signal or an error, all that runs is ended first.
    """
    with ThreadPoolExecutor(jobs) as workers:
        running: dict[Future[float], Thing] = {workers.submit(run, thing): thing for thing in things}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    if error is not None and not isinstance(error, Failed):
                        raise error
                    yield running.pop(future), error if isinstance(error, Failed) else future.result()
        except BaseException:
            for future in running:
                future.cancel()
            stages.end()
            raise


def told(failed: Mapping[str, str]) -> str:
    """What failed, for people."""
    return "\n".join(f"{name}: {reason}" for name, reason in failed.items())


def check(runs: Runs) -> None:
    """Makes sure that every set and cell has valid parameters before anything runs.

    Raises:
        UserError: names those that have not.
    """
    problems: dict[str, str] = {}
    for of in [*runs.grid.sets, *grids.cells(runs.grid)]:
        try:
            runs.wanted(of)
        except UserError as error:
            problems.setdefault(str(error), str(of))
    if problems:
        raise UserError("\n".join(f"{name}: {problem}" for problem, name in problems.items()))
