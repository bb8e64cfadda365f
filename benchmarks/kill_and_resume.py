"""Compare a pipeline that is killed repeatedly with an uninterrupted one: all results must be identical.

    python benchmarks/kill_and_resume.py [--kills 12] [--seed 0]

Copies the working tree twice into a temporary folder, with a smaller demo and prepared data. In one copy `make repro`
runs undisturbed. In the other, `kill -9` hits its process group and the command is started again (it first repairs DVC
files that a kill has damaged), until all kills have happened and it completes. A quarter of the kills hit random
moments of the start-up, half of them random steps of training, which writes a checkpoint every few steps, and the rest
the time while the model is written and logged and during evaluation. If the pipeline completes before the last kill,
the remaining kills hit a further copy. Prints a row per kill, the repairs, and all differences: weights, history,
metrics, MLflow's runs and metric history. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from fadeformer.training.state import COST_FIELDS
from pipelines.config import overrides

PROJECT = Path(__file__).resolve().parents[1]
SMALLER = {
    "dataset": {"images": 600}, "evaluate": {"figure_dpi": 50},
    "train": {"epochs": 8, "batch_size": 32, "checkpoint_minutes": 0.003, "device": "cpu"},
}  # fmt: skip
RESULTS = ("models/best_model.pth", "models/history.csv", "reports/metrics.json")
COMMAND = ("make", "--assume-old", "install", "repro")  # runs in the environment of this process
POLL = 0.005  # seconds between polls
TIMEOUT = 900  # seconds per start


@dataclass
class Copy:
    """A copy of the project with its own home folder."""

    base: Path

    @property
    def folder(self) -> Path:
        return self.base / "project"

    @property
    def log(self) -> str:
        """Output of the last command so far."""
        return (self.base / "log").read_text(errors="replace")

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command in a new process group."""
        for name in ("home", "tmp"):
            (self.base / name).mkdir(exist_ok=True)
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {
            "PATH": search, "HOME": str(self.base / "home"), "TMPDIR": str(self.base / "tmp"), "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with (self.base / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, *command: str) -> None:
        with self.running(*command) as process:
            if process.wait() != 0:
                raise SystemExit(f"{' '.join(command)} exited with {process.returncode}:\n{self.log}")

    def step(self) -> int:
        """Return the step of the newest checkpoint."""
        paths = self.folder.glob(".cache/train/*/step-*.pt")
        return max((int(path.stem.removeprefix("step-")) for path in paths), default=0)

    def reached(self) -> tuple[str, str]:
        """Return the current stage and the last line of output."""
        stages = re.findall(r"^Running stage '(\w+)'", self.log, re.MULTILINE)
        lines = [line.split(" - ", 1)[-1].strip() for line in self.log.splitlines() if line.strip()]
        return (stages[-1] if stages else "dvc"), (lines[-1] if lines else "")


def prepare_copy(copy: Copy) -> None:
    """Copy the files of the working tree into a new repository, and run the stages before train."""
    list_command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(list_command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in set(files) - {"dvc.lock"}:
        if (PROJECT / name).is_file():
            (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, copy.folder / name)
    overrides.apply_overrides(copy.folder / "params.yaml", SMALLER)
    for command in (
        ("init", "--quiet", "--initial-branch=main"), ("config", "user.name", "Benchmark"),
        ("config", "user.email", "benchmark@example.org"), ("add", "--all"),
        ("commit", "--quiet", "-m", "working tree"),
    ):  # fmt: skip
        copy.run("git", *command)
    copy.run("dvc", "repro", "preprocess")


@dataclass
class Timeline:
    """Timeline of an uninterrupted pipeline, in seconds.

    Attributes:
        first: time from the start to the first checkpoint.
        steps: number of training steps.
        epochs: number of training epochs.
        interval: time between checkpoints.
        lines: times at which the lines of each phase were printed, from its start, and its end.
    """

    first: float
    steps: int
    epochs: int
    interval: float
    lines: dict[str, list[float]]


def count_lines(epochs: int, phase: str, log: str) -> int:
    """Count the lines of a phase: `writing` starts after the last epoch, `evaluating` with the stage."""
    starts = {"writing": rf"epoch +{epochs}/|resumed after epoch {epochs},", "evaluating": "Running stage 'evaluate'"}
    match = re.search(starts[phase], log)
    return log[match.start() :].count("\n") if match else 0


def run_undisturbed(copy: Copy) -> Timeline:
    steps: dict[int, float] = {}
    lines: dict[str, list[float]] = {"writing": [], "evaluating": []}
    epochs, start = SMALLER["train"]["epochs"], time.monotonic()
    with copy.running(*COMMAND) as process:
        while process.poll() is None:
            time_now, log = time.monotonic(), copy.log
            if step := copy.step():
                steps.setdefault(step, time_now)
            for phase, times in lines.items():
                times += [time_now] * (count_lines(epochs, phase, log) - len(times))
            time.sleep(POLL)
    end = time.monotonic()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(COMMAND)} exited with {process.returncode}:\n{copy.log}")
    first, last = min(steps.values()), max(steps.values())
    lines["writing"] = [time for time in lines["writing"] if time < lines["evaluating"][0]] + lines["evaluating"][:1]
    lines["evaluating"].append(end)
    relative = {phase: [time - times[0] for time in times] for phase, times in lines.items()}
    return Timeline(first - start, max(steps), epochs, (last - first) / len(steps), relative)


def plan_kills(timeline: Timeline, kills: int, rng: np.random.Generator) -> list[tuple[str, int, float]]:
    """Plan the kills: phase (or `step`), number of lines of the phase (or steps), and delay in seconds after that."""

    def random_moment(phase: str) -> tuple[str, int, float]:
        """Draw a moment of a phase, relative to its lines, because a later run may be slower or faster."""
        times = timeline.lines[phase]
        moment = rng.uniform(0, times[-1])
        line = int(np.searchsorted(times[:-1], moment, side="right"))
        return phase, line, moment - times[line - 1]

    early, middle = kills // 4, (kills + 1) // 2
    late = kills - early - middle
    steps = np.sort(rng.integers(1, timeline.steps, middle))
    plan = [("step", int(step), rng.uniform(0, timeline.interval)) for step in steps]
    plan += [random_moment("writing") for _ in range((late + 1) // 2)]
    for _ in range(early):
        plan.insert(rng.integers(len(plan) + 1), ("start", 0, rng.uniform(0, timeline.first)))
    return plan + [random_moment("evaluating") for _ in range(late // 2)]


def run_with_kills(copy: Copy, timeline: Timeline, plan: list[tuple[str, int, float]], before: int) -> int:
    """Kill and restart the pipeline until it has completed; return the number of kills."""
    for killed, (phase, number, delay) in enumerate([*plan, ("never", 0, 0.0)]):
        start, reached_at, step_before = time.monotonic(), None, copy.step()
        if phase == "step":
            phase, number = ("step", max(number, step_before + 1)) if step_before < timeline.steps else ("writing", 1)
        with copy.running(*COMMAND) as process:
            while process.poll() is None:
                time_now = time.monotonic()
                if time_now - start > TIMEOUT:
                    raise SystemExit(
                        f"the run after {before + killed} kills did not finish within {TIMEOUT} s:\n{copy.log}"
                    )
                if reached_at is None and _is_reached(phase, number, copy, timeline):
                    reached_at = time_now
                if reached_at is not None and time_now - reached_at >= delay:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(POLL)
        elapsed, (stage, last_line) = time.monotonic() - start, copy.reached()
        if process.returncode == 0:
            return killed
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run after {before + killed} kills exited with {process.returncode}:\n{copy.log}")
        repaired = [line for line in copy.log.splitlines() if "was damaged" in line]
        print(*repaired, sep="\n", end="\n" * bool(repaired))
        cells = f"{phase} {number or ''} + {delay:.2f} | {elapsed:.1f} | {stage} | {step_before} | {copy.step()}"
        print(f"| {before + killed + 1} | {cells} | {last_line[:70]} |", flush=True)
    raise AssertionError("the last run is not killed")


def _is_reached(phase: str, number: int, copy: Copy, timeline: Timeline) -> bool:
    if phase == "step":
        return copy.step() >= number
    return phase == "start" or (phase != "never" and count_lines(timeline.epochs, phase, copy.log) >= number)


def differences(reference: Path, killed_copy: Path) -> list[str]:
    """Return the differences between the results of two copies, except for times and memory."""
    differences_found = [
        f"{name} differs" for name in RESULTS if (reference / name).read_bytes() != (killed_copy / name).read_bytes()
    ]
    (expected, _), (metrics, runs) = read_mlflow(reference), read_mlflow(killed_copy)
    if runs != ["FINISHED"]:
        differences_found.append(f"MLflow has the runs {', '.join(runs) or 'none'}, not a single finished run")
    actual_rows, expected_rows = (set(table.itertuples(index=False)) for table in (metrics, expected))
    duplicates = set(metrics[metrics.duplicated(["key", "step"])].itertuples(index=False))
    for problem, rows in (
        ("lacks", expected_rows - actual_rows),
        ("has unexpected", actual_rows - expected_rows),
        ("has duplicated", duplicates),
    ):
        if rows:
            names = [f"{row.key} at step {row.step}" for row in sorted(rows)]
            differences_found.append(
                f"MLflow {problem} {len(rows)} values: {', '.join(names[:4])}{' ...' * (len(names) > 4)}"
            )
    return differences_found


def read_mlflow(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read all metrics with step and value, except times and memory, and the status of each run."""
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as store:
        metrics = pd.read_sql("select key, step, value from metrics", store)
        runs = [status for (status,) in store.execute("select status from runs order by start_time")]
    return metrics[~metrics["key"].isin(COST_FIELDS) & ~metrics["key"].str.startswith("seconds.")], runs


def list_leftovers(copy: Copy) -> list[str]:
    """Return running processes and temporary files that were not cleaned up."""
    deadline = time.monotonic() + 10  # Prefect's server exits when its parent process is gone
    while (servers := _running_in(copy.folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    hidden = [*copy.folder.glob(".models.*"), *copy.folder.glob("reports/.[!g]*")]
    hidden += [path for path in copy.folder.glob(".cache/train/*") if path.name != ".lock"]  # the lock file remains
    return [
        *(f"process {' '.join(process.cmdline())[:100]}" for process in servers),
        *(str(path.relative_to(copy.folder)) for path in hidden),
    ]


def _running_in(folder: Path) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                processes.append(process)
        except psutil.Error:  # of another user, or finished
            continue
    return processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, all_differences = np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        prepared, reference = Copy(Path(temporary) / "prepared"), Copy(Path(temporary) / "reference")
        prepare_copy(prepared)
        shutil.copytree(prepared.base, reference.base)
        timeline = run_undisturbed(reference)
        print(
            f"undisturbed: {timeline.steps} steps in {timeline.epochs} epochs, a checkpoint every"
            f" {timeline.interval:.2f} s, the first after {timeline.first:.1f} s; "
            + ", ".join(f"{p} {t[-1]:.1f} s" for p, t in timeline.lines.items())
        )
        print("| kill | step or line, + s | s from the start | stage | step before | step | last line |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        killed, round_ = 0, 0
        while killed < args.kills:
            round_ += 1
            killed_copy = Copy(Path(temporary) / f"killed-{round_}")
            shutil.copytree(prepared.base, killed_copy.base)
            kills = run_with_kills(killed_copy, timeline, plan_kills(timeline, args.kills - killed, rng), killed)
            killed += kills
            differences_found = differences(reference.folder, killed_copy.folder)
            all_differences += differences_found
            outcome = "; ".join(differences_found) or "identical files and MLflow records"
            print(f"completed after {kills} kills: {outcome}")
            print(f"not cleaned up: {'; '.join(list_leftovers(killed_copy)) or 'nothing'}", flush=True)
    if all_differences:
        sys.exit(1)


if __name__ == "__main__":
    main()
