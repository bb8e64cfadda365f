"""`fadeformer tables`: train what is not finished of a grid of sets, networks and seeds, and write its tables."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from fadeformer import arrays, complexity, predictions, published
from fadeformer.complexity import Cost
from fadeformer.errors import UserError
from fadeformer.files import checksum, read_json, whole_file, write_json
from fadeformer.inference import choose_device
from pipelines import paths, store
from pipelines.experiments import engine, report, runners
from pipelines.experiments import grid as grids
from pipelines.experiments.grid import GridPlan
from pipelines.experiments.machine import machine

BATCH, TIMED, ROUNDS = 32, 32, 5  # of Table 3: images counted, images timed, rounds
FOLDER = Path(".cache/tables")  # of each grid: logs of its runs, and what is measured only once
COSTS, NOTES = "costs.json", "runs.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which grid."""
    parser.add_argument("grid", nargs="?", default="cpu", help="a YAML file, or a shipped grid: cpu, paper")
    parser.add_argument("--data", type=Path, help="folder that {data} in the grid stands for")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("docs/tables.md"), help="the Markdown to write")


def run(arguments: argparse.Namespace) -> str:
    """Trains what is not finished, and writes the tables of what is.

    Raises:
        UserError: some cells failed; the tables are then of the others.
    """
    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; it has to be 1 or more")
    file = grids.find(arguments.grid)
    grid, folder = grids.load(file), FOLDER / file.stem
    plan = GridPlan(
        file.stem, grid, arguments.data and arguments.data.resolve(), say=lambda line: print(line, flush=True)
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            store.connect()  # creates the store once, which two cells at a time could not
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
            with runners.runner(folder) as runner:
                try:
                    engine.execute(plan, runner, arguments.jobs)
                finally:
                    _note(folder / NOTES, plan, runner.detached)
            _write(plan, file, folder, arguments.out, arguments.data is not None)
    except Timeout as error:
        raise UserError(f"another `fadeformer tables` works on {file.stem}") from error
    if plan.failed:
        failed = "\n".join(f"{name}: {reason}" for name, reason in plan.failed.items())
        raise UserError(f"{arguments.out} lacks what failed:\n{failed}")
    return f"{arguments.out} has the tables of {sum(1 for _ in grids.cells(grid))} cells"


def _note(path: Path, plan: GridPlan, on_a_server: bool) -> None:
    """Keeps how long the runs of this command took, and where."""
    where = "workers of a Prefect server" if on_a_server else machine()
    new = {name: {"seconds": seconds, "machine": where} for name, seconds in plan.seconds.items()}
    write_json(path, {**(read_json(path) if path.is_file() else {}), **new})


def _write(plan: GridPlan, file: Path, folder: Path, out: Path, with_data: bool) -> None:
    """Writes the tables of the cells that are finished."""
    finished = {cell: plan.finished[str(cell)] for cell in grids.cells(plan.grid) if str(cell) in plan.finished}
    missing = [str(cell) for cell in grids.cells(plan.grid) if cell not in finished]
    notes = read_json(folder / NOTES)
    trained: dict[tuple[str, str], dict[int, predictions.Predictions]] = {}
    models: dict[tuple[int, str], dict[str, Any]] = {}
    rows = [pd.DataFrame(columns=list(report.PUBLISHED))]
    with tempfile.TemporaryDirectory() as temporary:
        for cell, result in finished.items():
            table = predictions.read(result.fetch(paths.PREDICTIONS, Path(temporary)))
            trained.setdefault((cell.images, cell.network), {})[cell.seed] = table.of("test")
            model = result.json(paths.ARCHITECTURE)["model"]
            models.setdefault((model["image_size"], cell.network), model)
        for name in sorted({cell.images for cell in finished}):
            plan.finished[name].fetch(paths.PROCESSED / "meta.json", Path(temporary))
            published_rows = published.beside(arrays.read_meta(Path(temporary)))
            rows.append(published_rows.assign(dataset=name)[list(report.PUBLISHED)])
    known = [notes[result.name] for result in finished.values() if result.name in notes]
    setting = report.Setting(
        command=f"fadeformer tables {file.stem if file.parent == grids.SHIPPED else file.name}"
        + " --data FOLDER" * with_data,
        grid=file.read_text(encoding="utf-8"),
        params=checksum(paths.PARAMS, "sha256"),
        machines=sorted({note["machine"] for note in known} | {machine()}),
        codes=sorted({result.code() for result in finished.values()}),
        seconds=sum(note["seconds"] for note in known),
        missing=missing,
    )
    of_sets = pd.concat([table for table in rows if len(table)] or rows, ignore_index=True)
    text = report.markdown(plan.grid, trained, _costs(folder / COSTS, models), of_sets, setting)
    with whole_file(out) as path:
        path.write_text(text, encoding="utf-8")


def _costs(path: Path, models: dict[tuple[int, str], dict[str, Any]]) -> dict[tuple[int, str], Cost]:
    """Table 3, by side of the images and network; kept, since timings are not reproducible."""
    described = [[side, network, model] for (side, network), model in models.items()]
    fingerprint = {"models": described, "machine": machine(), "settings": [BATCH, TIMED, ROUNDS]}
    kept = read_json(path) if path.is_file() else {}
    if kept.get("fingerprint") != fingerprint:
        device = choose_device("auto")
        measured = {
            (side, network): cost
            for side in sorted({side for side, _ in models})
            for network, cost in complexity.costs(
                {network: model for (of, network), model in models.items() if of == side},
                batch=BATCH, timed_batch=TIMED, rounds=ROUNDS, device=device,
            ).items()
        }  # fmt: skip
        kept = {"fingerprint": fingerprint, "costs": [[*key, vars(cost)] for key, cost in measured.items()]}
        write_json(path, kept)
    return {(side, network): Cost(**cost) for side, network, cost in kept["costs"]}
