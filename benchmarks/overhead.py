"""Overhead of `make repro` on the demo: seconds outside training and prediction (imports, Prefect, GX, MLflow).

`python benchmarks/overhead.py` clones the committed project into a temporary folder and runs one `make repro` there,
without the installation. Overhead is the wall time minus `seconds.fit` and `seconds.predict`. The time of a stage runs
from its first line of output to that of the next stage, so it includes DVC's work; `start` is the check of params.yaml
and the start of Prefect's server and of DVC. `--epochs N` shortens the training of the demo.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[1]
COMMAND = ("make", "--assume-old", "install", "repro")  # runs in the environment of this process
WORK = {"train": "seconds.fit", "evaluate": "seconds.predict"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="number of epochs; default that of the demo")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", PROJECT, folder], check=True)
        if args.epochs:
            shorten(Path(folder) / "params.yaml", args.epochs)
        report(reproduce(Path(folder)), work_seconds(Path(folder)))


def shorten(path: Path, epochs: int) -> None:
    settings = YAML().load(path)
    settings["train"]["epochs"] = epochs
    YAML().dump(settings, path)


def reproduce(folder: Path) -> dict[str, float]:
    """Run `make repro` and return the wall time of each stage in seconds."""
    walls = {}
    stage, start = "start", time.perf_counter()
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with subprocess.Popen(COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if match := re.match(r"Running stage '(\w+)'", line):
                now = time.perf_counter()
                walls[stage], stage, start = now - start, match[1], now
    walls[stage] = time.perf_counter() - start
    assert process.returncode == 0
    return walls


def work_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of training and prediction, from the newest MLflow run."""
    query = (
        "select m.key, m.value from latest_metrics m join runs r using (run_uuid)"
        " where m.key like 'seconds.%' order by r.start_time"
    )
    with closing(sqlite3.connect(folder / "mlruns/mlflow.db")) as store:
        logged = dict(store.execute(query))
    return {stage: logged[name] for stage, name in WORK.items()}


def report(walls: dict[str, float], work: dict[str, float]) -> None:
    print(f"{'make repro':16}{'wall, s':>10}{'work, s':>10}{'overhead, s':>13}")
    for stage, wall in walls.items():
        print(f"{stage:16}{wall:10.1f}{work.get(stage, 0.0):10.1f}{wall - work.get(stage, 0.0):13.1f}")
    total_wall, total_work = sum(walls.values()), sum(work.values())
    print(f"{'total':16}{total_wall:10.1f}{total_work:10.1f}{total_wall - total_work:13.1f}\n", flush=True)


if __name__ == "__main__":
    main()
