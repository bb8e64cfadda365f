"""`fadeformer tables`: train what is not finished of a grid of sets, networks and seeds, and write its tables."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from fadeformer import arrays, complexity, predictions, published
from fadeformer.complexity import Cost
from fadeformer.errors import UserError
from fadeformer.files import checksum, read_json, whole_file, write_json
from fadeformer.inference import choose_device
from pipelines import paths, store
from pipelines.experiments import engine, report, runners
from pipelines.experiments import grid as grids
from pipelines.experiments.engine import Listed
from pipelines.experiments.grid import Grid

BATCH, TIMED, ROUNDS = 32, 32, 5  # of Table 3: images counted, images timed, rounds
FOLDER = Path(".cache/tables")  # of each grid: logs of its runs, and what is measured only once
COSTS = "costs.json"


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
    grid, folder, data = grids.load(file), FOLDER / file.stem, arguments.data and arguments.data.resolve()
    plan = grids.plan(file.stem, grid, data, lambda line: print(line, flush=True))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            store.connect()  # creates the store once, which two cells at a time could not
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
            with runners.runner(folder) as runner:
                engine.execute(plan, runner, arguments.jobs)
            _write(grid, plan, file, folder, arguments.out, data is not None)
    except Timeout as error:
        raise UserError(f"another `fadeformer tables` works on {file.stem}") from error
    failed = [f"{key}: {status.message}" for key, status in plan.statuses.items() if status.result is None]
    if failed:
        raise UserError("\n".join([f"{arguments.out} lacks what failed:", *failed]))
    return f"{arguments.out} has the tables of {sum(1 for _ in grids.cells(grid))} cells"


def _write(grid: Grid, plan: Listed, file: Path, folder: Path, out: Path, with_data: bool) -> None:
    """Writes the tables of the cells that are finished."""
    found = {key: status.result for key, status in plan.statuses.items() if status.result}
    finished = {cell: found[str(cell)] for cell in grids.cells(grid) if str(cell) in found}
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
            found[name].fetch(paths.PROCESSED / "meta.json", Path(temporary))
            of_set = published.beside(arrays.read_meta(Path(temporary)))
            rows.append(of_set.assign(dataset=name)[list(report.PUBLISHED)])
    called = file.stem if file.parent == grids.SHIPPED else file.name
    setting = report.Setting(
        command=f"fadeformer tables {called}" + " --data FOLDER" * with_data,
        grid=file.read_text(encoding="utf-8"),
        params=checksum(paths.PARAMS, "sha256"),
        machine=_machine(),
        codes=sorted({result.code() for result in finished.values()}),
        missing=[str(cell) for cell in grids.cells(grid) if cell not in finished],
    )
    of_sets = pd.concat([table for table in rows if len(table)] or rows, ignore_index=True)
    text = report.markdown(grid, trained, _costs(folder / COSTS, models), of_sets, setting)
    with whole_file(out) as path:
        path.write_text(text, encoding="utf-8")


def _costs(path: Path, models: dict[tuple[int, str], dict[str, Any]]) -> dict[tuple[int, str], Cost]:
    """Table 3, by side of the images and network; kept, since timings are not reproducible."""
    described = [[side, network, model] for (side, network), model in models.items()]
    fingerprint = {"models": described, "machine": _machine(), "settings": [BATCH, TIMED, ROUNDS]}
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


def _machine() -> str:
    """What Table 3 is measured on, in words that name no host."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device}, {threads}, torch {version('torch')}, timm {version('timm')}"


def _processor() -> str:
    """The processor's name, which only Linux has in a file; elsewhere its kind."""
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()
