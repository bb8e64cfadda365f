"""Seconds that `make repro` of the demo takes outside training and prediction: imports, Prefect, GX and MLflow.

`python benchmarks/overhead.py` clones the committed project into a temporary folder and runs one `make repro` there,
without the installation. What is left of its wall time after `seconds.fit` and `seconds.predict` is overhead. A stage's
row goes from its first line to that of the next, so it includes what DVC does for the stage; `start` is the check of
params.yaml, the start of Prefect's server and of DVC. `--epochs N` trains for less than the demo.
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
COMMAND = ("make", "--assume-old", "install", "repro")  # in the environment of this process
WORK = {"train": "seconds.fit", "evaluate": "seconds.predict"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="in place of the demo's")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", PROJECT, folder], check=True)
        if given.epochs:
            shorten(Path(folder) / "params.yaml", given.epochs)
        report(reproduce(Path(folder)), worked(Path(folder)))


def shorten(path: Path, epochs: int) -> None:
    settings = YAML().load(path)
    settings["train"]["epochs"] = epochs
    YAML().dump(settings, path)


def reproduce(folder: Path) -> dict[str, float]:
    """Seconds of each stage of one `make repro`."""
    walls = {}
    part, start = "start", time.perf_counter()
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with subprocess.Popen(COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if named := re.match(r"Running stage '(\w+)'", line):
                now = time.perf_counter()
                walls[part], part, start = now - start, named[1], now
    walls[part] = time.perf_counter() - start
    assert process.returncode == 0
    return walls


def worked(folder: Path) -> dict[str, float]:
    """Seconds of the work itself, as the newest run has them."""
    query = (
        "select m.key, m.value from latest_metrics m join runs r using (run_uuid)"
        " where m.key like 'seconds.%' order by r.start_time"
    )
    with closing(sqlite3.connect(folder / "mlruns/mlflow.db")) as store:
        logged = dict(store.execute(query))
    return {stage: logged[name] for stage, name in WORK.items()}


def report(walls: dict[str, float], work: dict[str, float]) -> None:
    print(f"{'make repro':16}{'wall, s':>10}{'work, s':>10}{'overhead, s':>13}")
    for part, wall in walls.items():
        print(f"{part:16}{wall:10.1f}{work.get(part, 0.0):10.1f}{wall - work.get(part, 0.0):13.1f}")
    wall, all_work = sum(walls.values()), sum(work.values())
    print(f"{'in all':16}{wall:10.1f}{all_work:10.1f}{wall - all_work:13.1f}\n", flush=True)


if __name__ == "__main__":
    main()
