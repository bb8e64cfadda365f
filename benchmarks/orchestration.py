"""Overhead of a Prefect server for a run of the demo, and the speed-up of a grid of runs with a second worker.

`python benchmarks/orchestration.py` starts the servers of a deployment (tests/pipeline/cluster.py: PostgreSQL, an S3
server, MLflow, Prefect, two workers), submits one run of the demo, and reads the duration of its flow and of each stage
(a task that waits for one `dvc repro STAGE`) from Prefect's records. The rest is orchestration: the workspace,
Prefect's bookkeeping, and pushing results to the DVC remote. `--grid N` runs the deployment grid/benchmark of N tiny
runs with two workers, then with one. Each worker is pinned to half of the cores, as if on its own machine; otherwise
the first would use all of them. The servers may use all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.stages import STAGES
from tests.conftest import clone
from tests.pipeline.cluster import Cluster, running

TINY = {"dataset.images": 200, "dataset.size": 16, "train.epochs": 1, "evaluate.figure_dpi": 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, metavar="N", help="compare one worker with two on N tiny runs instead")
    runs = parser.parse_args().grid
    with tempfile.TemporaryDirectory() as folder, running(clone(Path(folder))) as cluster:
        if runs:
            compare_workers(cluster, runs)
        else:
            report(cluster)


def report(cluster: Cluster) -> None:
    submitted = time.time()
    cluster.run("prefect", "deployment", "run", "pipeline/train", "--flow-run-name", "demo", "--watch", timeout=3600)
    (run,) = [flow_run for flow_run in cluster.query_prefect("flow_runs") if flow_run["name"] == "demo"]
    assert run["state_name"] == "Completed"
    tasks = cluster.query_prefect("task_runs", flow_runs={"id": {"any_": [run["id"]]}})
    rows = {task["name"]: seconds(task) for task in sorted(tasks, key=lambda task: task["start_time"])}
    flow, work = seconds(run), sum(duration for name, duration in rows.items() if name in STAGES)
    for name, duration in rows.items():
        print(f"{name:34}{duration:8.1f} s")
    for name, duration in (
        ("from the command to the start", at(run["start_time"]) - submitted), ("flow", flow), ("stages", work),
        ("orchestration: flow minus stages", flow - work),
    ):  # fmt: skip
        print(f"{name:34}{duration:8.1f} s", flush=True)


def compare_workers(cluster: Cluster, runs: int) -> None:
    cluster.start_worker("worker-of-the-grid", "default")
    cores, durations = sorted(os.sched_getaffinity(0)), {}
    for name, worker_cores in (("worker-1", cores[::2]), ("worker-2", cores[1::2])):
        cluster.set_cpu_affinity(name, worker_cores)
    for workers in (2, 1):
        if workers == 1:
            cluster.kill_worker("worker-2")  # it is idle
        seeds = list(range(100 * workers, 100 * workers + runs))
        given = ("--param", f"vary={json.dumps({'seed': seeds})}", "--param", f"fixed={json.dumps(TINY)}")
        command = ("prefect", "deployment", "run", "grid/benchmark", "--flow-run-name", f"grid-{workers}", "--watch")
        cluster.run(*command, *given, timeout=3600)
        (run,) = [flow_run for flow_run in cluster.query_prefect("flow_runs") if flow_run["name"] == f"grid-{workers}"]
        assert run["state_name"] == "Completed"
        durations[workers] = seconds(run)
        print(f"{runs} runs, workers: {workers}{durations[workers]:10.1f} s", flush=True)
    print(f"two workers take {durations[2] / durations[1]:.2f} of the time of one")


def seconds(run: dict) -> float:
    return at(run["end_time"]) - at(run["start_time"])


def at(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


if __name__ == "__main__":
    main()
