"""`fadeformer tables`: train the unfinished cells of a grid of datasets, models and seeds, and write its tables."""

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
from pipelines.experiments.engine import ListPlan
from pipelines.experiments.grid import GRIDS_FOLDER, Cell, Grid, find_grid, iter_cells, load_grid, plan_runs
from pipelines.experiments.results import RunResult

BATCH_SIZE, TIMED_BATCH_SIZE, ROUNDS = 32, 32, 5  # Table 3: images per batch (FLOPs and memory, timing), timed rounds
LOGS_FOLDER = Path(".cache/tables")  # one subfolder per grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add grid, data folder, parallelism and output file."""
    parser.add_argument("grid", nargs="?", default="cpu", help="YAML file, or an included grid: cpu (default), paper")
    parser.add_argument("--data", type=Path, help="folder that replaces {data} in the grid")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="parallel runs")
    parser.add_argument("--out", type=Path, default=Path("docs/reference/tables.md"), help="Markdown file to write")


def run(arguments: argparse.Namespace) -> str:
    """Train the unfinished cells, and write the tables of all finished ones.

    Raises:
        UserError: Some cells failed; the tables are written without them.
    """
    file, data = find_grid(arguments.grid), arguments.data and arguments.data.resolve()
    grid = load_grid(file)
    preprocessing, training = plan_runs(file.stem, grid, data)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    with runners.open_runner(LOGS_FOLDER / file.stem) as runner:
        dataset_plan = ListPlan(preprocessing)  # first: preprocesses a dataset once for all its cells
        engine.execute(dataset_plan, runner, arguments.jobs)
        datasets = {name: status.result for name, status in dataset_plan.statuses.items() if status.result}
        cell_plan = ListPlan({str(cell): run for cell, run in training.items() if cell.dataset in datasets})
        engine.execute(cell_plan, runner, arguments.jobs)
        results = {cell: cell_plan.statuses[str(cell)].result for cell in training if cell.dataset in datasets}
        finished = {cell: result for cell, result in results.items() if result}
        _write_report(grid, file, arguments.out, data is not None, datasets, finished)
    statuses = {**dataset_plan.statuses, **cell_plan.statuses}
    failed = [f"{key}: {status.message}" for key, status in statuses.items() if status.result is None]
    if failed:
        message = f"{arguments.out} does not contain these failed runs; the same command tries them again:"
        raise UserError("\n".join([message, *failed]))
    return f"{arguments.out} has the tables of {len(training)} cells"


def _write_report(
    grid: Grid,
    file: Path,
    out: Path,
    with_data: bool,
    datasets: Mapping[str, RunResult],
    results: Mapping[Cell, RunResult],
) -> None:
    """Write the tables of the finished cells."""
    trained: dict[tuple[str, str], dict[int, predictions.Predictions]] = {}
    architectures: dict[tuple[int, str], dict[str, Any]] = {}
    published_tables = [pd.DataFrame(columns=list(report.PUBLISHED_COLUMNS))]
    with tempfile.TemporaryDirectory() as temporary:
        for cell, result in results.items():
            table = predictions.read(result.fetch(paths.PREDICTIONS, Path(temporary)))
            trained.setdefault((cell.dataset, cell.model), {})[cell.seed] = table.select_split("test")
            architecture = result.read_json_file(paths.ARCHITECTURE)["model"]
            architectures.setdefault((architecture["image_size"], cell.model), architecture)
        for name in sorted({cell.dataset for cell in results}):
            datasets[name].fetch(paths.PROCESSED / "meta.json", Path(temporary))
            rows = published.comparison_table(arrays.read_metadata(Path(temporary)))
            published_tables.append(rows.assign(dataset=name)[list(report.PUBLISHED_COLUMNS)])
    # pandas warns about empty tables, which have no types.
    published_rows = pd.concat(
        [table for table in published_tables if len(table)] or published_tables, ignore_index=True
    )
    grid_name = file.stem if file.parent == GRIDS_FOLDER else file.name
    versions = sorted({result.code_fingerprint() for result in results.values()})
    missing = [str(cell) for cell in iter_cells(grid) if cell not in results]
    parts = [
        f"# Tables\n\n```sh\nfadeformer tables {grid_name}{' --data FOLDER' * with_data}\n```",
        f"Trained and evaluated by {len(versions)} version(s) of the code ({', '.join(versions) or 'none yet'}); Table"
        f" 3 was measured on: {_describe_machine()}.",
        *([f"**Not finished: {', '.join(missing)}.**"] if missing else []),
        *report.render_tables(grid, trained, _measure_costs(architectures), published_rows),
        "## Settings\n\nThe grid; all other values are from the `params.yaml` with SHA-256"
        f" `{checksum(paths.PARAMS, 'sha256')[:16]}`. The epoch is selected on val; each model is evaluated once on"
        f" test.\n\n```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```",
    ]
    with atomic_write(out) as path:
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _measure_costs(architectures: Mapping[tuple[int, str], dict[str, Any]]) -> dict[tuple[int, str], ModelCost]:
    """Measure the costs for Table 3, by side of the images and model."""
    return {
        (side, model): cost
        for side in sorted({side for side, _ in architectures})
        for model, cost in complexity.measure_costs(
            {model: config for (size, model), config in architectures.items() if size == side},
            batch_size=BATCH_SIZE, timed_batch_size=TIMED_BATCH_SIZE, rounds=ROUNDS, device=choose_device("auto"),
        ).items()
    }  # fmt: skip


def _describe_machine() -> str:
    """Describe the hardware and versions of Table 3, without a host name."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (*names, platform.machine())[0]
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device}, {threads}, torch {version('torch')}, timm {version('timm')}"
