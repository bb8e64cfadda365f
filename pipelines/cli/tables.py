"""`fadeformer tables`: train what is not finished of a grid of sets, networks and seeds, and write its tables."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fadeformer.data import arrays
from fadeformer.errors import UserError
from fadeformer.evaluation import predictions, published
from fadeformer.inference.forward import choose_device
from fadeformer.io.atomic import atomic_write, checksum
from fadeformer.models import complexity
from fadeformer.models.complexity import ModelCost
from pipelines import paths
from pipelines.experiments import engine, report, runners
from pipelines.experiments import grid as grids
from pipelines.experiments.engine import ListPlan
from pipelines.experiments.grid import Cell, Grid
from pipelines.experiments.results import RunResult

BATCH_SIZE, TIMED_BATCH_SIZE, ROUNDS = 32, 32, 5  # of Table 3: images counted, images timed, rounds
LOGS_FOLDER = Path(".cache/tables")  # of each grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which grid."""
    parser.add_argument("grid", nargs="?", default="cpu", help="a YAML file, or a shipped grid: cpu, paper")
    parser.add_argument("--data", type=Path, help="folder that {data} in the grid stands for")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("docs/reference/tables.md"), help="the Markdown to write")


def run(arguments: argparse.Namespace) -> str:
    """Train what is not finished, and write the tables of what is.

    Raises:
        UserError: some cells failed; the tables are then of the others.
    """
    file, data = grids.find_grid(arguments.grid), arguments.data and arguments.data.resolve()
    grid = grids.load_grid(file)
    prepared, trained = grids.plan_runs(file.stem, grid, data)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    with runners.open_runner(LOGS_FOLDER / file.stem) as runner:
        sets = ListPlan(prepared)  # first, and once for all cells of a set
        engine.execute(sets, runner, arguments.jobs)
        images = {name: status.result for name, status in sets.statuses.items() if status.result}
        cells = ListPlan({str(cell): run for cell, run in trained.items() if cell.dataset in images})
        engine.execute(cells, runner, arguments.jobs)
        results = {cell: cells.statuses[str(cell)].result for cell in trained if cell.dataset in images}
        _write_report(
            grid, file, arguments.out, data is not None, images, {c: found for c, found in results.items() if found}
        )
    statuses = {**sets.statuses, **cells.statuses}
    failed = [f"{key}: {status.message}" for key, status in statuses.items() if status.result is None]
    if failed:
        raise UserError("\n".join([f"{arguments.out} lacks what failed; the same command tries it again:", *failed]))
    return f"{arguments.out} has the tables of {len(trained)} cells"


def _write_report(
    grid: Grid,
    file: Path,
    out: Path,
    with_data: bool,
    images: Mapping[str, RunResult],
    results: Mapping[Cell, RunResult],
) -> None:
    """Write the tables of the cells that are finished."""
    trained: dict[tuple[str, str], dict[int, predictions.Predictions]] = {}
    models: dict[tuple[int, str], dict[str, Any]] = {}
    rows = [pd.DataFrame(columns=list(report.PUBLISHED_COLUMNS))]
    with tempfile.TemporaryDirectory() as temporary:
        for cell, result in results.items():
            table = predictions.read(result.fetch(paths.PREDICTIONS, Path(temporary)))
            trained.setdefault((cell.dataset, cell.model), {})[cell.seed] = table.select_split("test")
            model = result.read_json_file(paths.ARCHITECTURE)["model"]
            models.setdefault((model["image_size"], cell.model), model)
        for name in sorted({cell.dataset for cell in results}):
            images[name].fetch(paths.PROCESSED / "meta.json", Path(temporary))
            of_set = published.comparison_table(arrays.read_metadata(Path(temporary)))
            rows.append(of_set.assign(dataset=name)[list(report.PUBLISHED_COLUMNS)])
    of_sets = pd.concat([table for table in rows if len(table)] or rows, ignore_index=True)
    called = file.stem if file.parent == grids.GRIDS_FOLDER else file.name
    codes = sorted({result.code_fingerprint() for result in results.values()})
    missing = [str(cell) for cell in grids.iter_cells(grid) if cell not in results]
    parts = [
        f"# Tables\n\n```sh\nfadeformer tables {called}{' --data FOLDER' * with_data}\n```",
        f"Trained and evaluated by {len(codes)} version(s) of the code ({', '.join(codes) or 'none yet'}); Table 3 was"
        f" measured on: {_describe_machine()}.",
        *([f"**Not finished, and left out: {', '.join(missing)}.**"] if missing else []),
        *report.render_tables(grid, trained, _measure_costs(models), of_sets),
        "## Settings\n\nThe grid; all else is as in the `params.yaml` of SHA-256"
        f" `{checksum(paths.PARAMS, 'sha256')[:16]}`. The epoch is chosen on val, test is looked at once for each"
        f" training.\n\n```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```",
    ]
    with atomic_write(out) as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _measure_costs(models: Mapping[tuple[int, str], dict[str, Any]]) -> dict[tuple[int, str], ModelCost]:
    """Table 3, by side of the images and network."""
    return {
        (side, network): cost
        for side in sorted({side for side, _ in models})
        for network, cost in complexity.measure_costs(
            {network: model for (of, network), model in models.items() if of == side},
            batch_size=BATCH_SIZE, timed_batch_size=TIMED_BATCH_SIZE, rounds=ROUNDS, device=choose_device("auto"),
        ).items()
    }  # fmt: skip


def _describe_machine() -> str:
    """What Table 3 is measured on, in words that name no host."""
    file = Path("/proc/cpuinfo")  # only Linux has it
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (*names, platform.machine())[0]
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device}, {threads}, torch {version('torch')}, timm {version('timm')}"
