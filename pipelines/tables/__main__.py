"""`make tables`: trains a grid of sets, networks and seeds, what of it is not finished, and writes its tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from fadeformer import arrays, complexity, predictions, published
from fadeformer.complexity import Cost
from fadeformer.errors import UserError
from fadeformer.files import checksum, read_json, whole_file, write_json
from fadeformer.inference import choose_device
from pipelines import paths, places, stage, store
from pipelines.orchestrator import temporary_server
from pipelines.tables import grid as grids
from pipelines.tables import report, runs
from pipelines.tables.copies import Stages, identity
from pipelines.tables.runs import Runs

BATCH, TIMED, ROUNDS = 32, 32, 5  # of Table 3: images counted, images timed, rounds
COSTS = "costs.json"  # kept beside the cells: a clock never says the same twice


def main() -> str:
    """Trains what is not finished, and writes the tables of what is.

    Raises:
        UserError: some cells failed; the tables are then of the others.
    """
    wanted = arguments()
    file = grids.find(wanted.grid)
    grid = grids.load(file)
    folder = wanted.cells or Path(".cache/tables") / file.stem
    data = None if wanted.data is None else wanted.data.resolve()
    found = Runs(grid, Path.cwd(), folder.resolve(), data)
    runs.check(found)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            run(found, wanted.jobs)
            write(found, file, wanted.out, wanted.data is not None)
    except Timeout as error:
        raise UserError(f"{folder}: another process runs this grid; wait until it has ended") from error
    if found.failed:
        raise UserError(f"{wanted.out} lacks what failed:\n{runs.told(found.failed)}")
    return f"{wanted.out} tells of {sum(1 for _ in grids.cells(grid))} cells, which are kept in {folder}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tables", description=__doc__)
    parser.add_argument("grid", nargs="?", default="cpu", help="a YAML file, or a grid that is shipped: cpu, paper")
    parser.add_argument("--data", type=Path, help="folder that {data} in the grid stands for")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--cells", type=Path, help="where cells are kept; .cache/tables/GRID if it is not said")
    parser.add_argument("--out", type=Path, default=Path("docs/tables.md"), help="the Markdown to write")
    wanted = parser.parse_args()
    if wanted.jobs < 1:
        parser.error("--jobs is 1 or more")
    return wanted


def run(found: Runs, jobs: int) -> None:
    """Runs what is not finished, with one Prefect server and one MLflow store for all."""
    sets, cells = found.unfinished()
    if not sets and not cells:
        return
    print(f"{len(cells)} cells to train or to check, the data of {len(sets)} sets to prepare", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))  # else cells fight for cores
    store.connect()  # makes the store once, which two cells at a time could not
    with temporary_server() as address:
        stages = Stages({"PREFECT_API_URL": address, "MLFLOW_TRACKING_URI": places.uri(), **identity(found.project)})
        found.finish(stages, jobs, lambda line: print(line, flush=True))


def write(found: Runs, file: Path, out: Path, with_data: bool) -> None:
    """Writes the tables of the cells that are finished."""
    records = {cell: found.record(cell) for cell in grids.cells(found.grid)}
    finished = {cell: record for cell, record in records.items() if record is not None}
    trained: dict[tuple[str, str], dict[int, predictions.Predictions]] = {}
    for cell in finished:
        table = predictions.read(found.place(cell) / paths.PREDICTIONS.name)
        trained.setdefault((cell.images, cell.network), {})[cell.seed] = table.of("test")
    here = runs.machine()
    shipped = file.parent == grids.SHIPPED
    setting = report.Setting(
        command=f"python -m pipelines.tables {file.stem if shipped else file.name}" + " --data FOLDER" * with_data,
        grid=file.read_text(encoding="utf-8"),
        params=checksum(found.project / paths.PARAMS, "sha256"),
        machines=sorted({record["machine"] for record in finished.values()} | {here}),
        codes=sorted({record["code"] for record in finished.values()}),
        seconds=sum(record["seconds"] for record in finished.values()),
        missing=[str(cell) for cell, record in records.items() if record is None],
    )
    text = report.markdown(found.grid, trained, costs(found, finished), published_rows(found, finished), setting)
    with whole_file(out) as path:
        path.write_text(text, encoding="utf-8")


def published_rows(found: Runs, finished: Collection[grids.Cell]) -> pd.DataFrame:
    """What is published of the sets that are finished, by the grid's own names of them."""
    tables = [pd.DataFrame(columns=list(report.PUBLISHED))]
    for name in sorted({cell.images for cell in finished}):
        rows = published.beside(arrays.read_meta(found.place(name) / "work" / paths.PROCESSED))
        tables.append(rows.assign(dataset=name)[list(report.PUBLISHED)])
    return pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)


def costs(found: Runs, finished: dict[grids.Cell, dict]) -> dict[tuple[int, str], Cost]:
    """Of Table 3, by side of the images and network, measured once for all that are the same."""
    architectures: dict[tuple[int, str], dict] = {}
    for cell, record in finished.items():
        architectures.setdefault((record["model"]["image_size"], cell.network), record["model"])
    told = [[side, network, model] for (side, network), model in architectures.items()]
    made_of = {"architectures": told, "machine": runs.machine(), "settings": [BATCH, TIMED, ROUNDS]}
    path = found.folder / COSTS
    kept = read_json(path) if path.is_file() else {}
    if kept.get("made_of") != made_of:
        device = choose_device("auto")
        measured = {
            (side, network): cost
            for side in sorted({side for side, _ in architectures})
            for network, cost in complexity.costs(
                {network: model for (of, network), model in architectures.items() if of == side},
                batch=BATCH, timed_batch=TIMED, rounds=ROUNDS, device=device,
            ).items()
        }  # fmt: skip
        kept = {"made_of": made_of, "costs": [[*key, vars(cost)] for key, cost in measured.items()]}
        write_json(path, kept)
    return {(side, network): Cost(**cost) for side, network, cost in kept["costs"]}


if __name__ == "__main__":
    stage.run("tables", main)
