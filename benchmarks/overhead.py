"""Seconds of each stage of the demo outside training and prediction: imports, Prefect, great-expectations, MLflow.

`python benchmarks/overhead.py` clones the committed project into a temporary folder and forces one stage after the
other, as `dvc repro` would; what is left of a stage's wall time after `seconds.fit` or `seconds.predict` is overhead.
"""

from __future__ import annotations

import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

from pipelines.__main__ import STAGES

PROJECT = Path(__file__).resolve().parents[1]
WORK = {"train": "seconds.fit", "evaluate": "seconds.predict"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", PROJECT, folder], check=True)
        walls = {}
        for stage in STAGES:
            start = time.perf_counter()
            subprocess.run(["dvc", "repro", "--quiet", "--single-item", stage], cwd=folder, check=True)
            walls[stage] = time.perf_counter() - start
        with closing(sqlite3.connect(f"{folder}/mlruns/mlflow.db")) as store:
            logged = dict(store.execute("select key, value from latest_metrics where key like 'seconds.%'"))
        measured = {stage: logged[name] for stage, name in WORK.items()}
    print(f"{'stage':12}{'wall, s':>10}{'work, s':>10}{'overhead, s':>13}")
    for stage, wall in walls.items():
        work = measured.get(stage, 0.0)
        print(f"{stage:12}{wall:10.1f}{work:10.1f}{wall - work:13.1f}")
    wall, work = sum(walls.values()), sum(measured.values())
    print(f"{'in all':12}{wall:10.1f}{work:10.1f}{wall - work:13.1f}")


if __name__ == "__main__":
    main()
