"""Does a pipeline that is killed again and again come to what an uninterrupted one comes to, byte for byte?

    python benchmarks/kill_and_resume.py [--kills 12] [--seed 0]

Copies the working tree twice into a temporary folder, the demo made smaller, its data prepared. In one copy `make
repro` runs undisturbed; in the other `kill -9` hits its whole process group and it is started again, which first
repairs what a kill has damaged of DVC's files, until all kills have happened and it completes. A
quarter of the kills fall anywhere in a start-up, half of them behind random steps of the training, which writes a
checkpoint every few steps, the rest while the model is written and logged and while it is evaluated. If it completes
too soon, further kills go to a further copy. Prints a row for each kill, what was mended, and what differs: weights,
history, metrics, MLflow's runs and metric history. The exit status is 1 if anything does.
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
COMMAND = ("make", "--assume-old", "install", "repro")  # in the environment of this process
POLL = 0.005  # seconds between two looks
PATIENCE = 900  # seconds for one start


@dataclass
class Copy:
    """A copy of the project, and a home for the commands that run in it."""

    base: Path

    @property
    def folder(self) -> Path:
        return self.base / "project"

    @property
    def log(self) -> str:
        """What the last start has printed so far."""
        return (self.base / "log").read_text(errors="replace")

    @contextmanager
    def running(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command in a process group of its own."""
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
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{self.log}")

    def step(self) -> int:
        """Step of the newest checkpoint."""
        found = self.folder.glob(".cache/train/*/step-*.pt")
        return max((int(path.stem.removeprefix("step-")) for path in found), default=0)

    def reached(self) -> tuple[str, str]:
        """Stage and last words of a start."""
        stages = re.findall(r"^Running stage '(\w+)'", self.log, re.MULTILINE)
        lines = [line.split(" - ", 1)[-1].strip() for line in self.log.splitlines() if line.strip()]
        return (stages[-1] if stages else "dvc"), (lines[-1] if lines else "")


def prepare(copy: Copy) -> None:
    """What git knows of the project, as it lies in the working tree, in a repository of its own; next stage: train."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in set(known) - {"dvc.lock"}:
        if (PROJECT / name).is_file():
            (copy.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, copy.folder / name)
    overrides.apply_overrides(copy.folder / "params.yaml", SMALLER)
    for command in (
        ("init", "--quiet", "--initial-branch=main"), ("config", "user.name", "Benchmark"),
        ("config", "user.email", "benchmark@example.org"), ("add", "--all"), ("commit", "--quiet", "-m", "as it lies"),
    ):  # fmt: skip
        copy.run("git", *command)
    copy.run("dvc", "repro", "preprocess")


@dataclass
class Course:
    """How an uninterrupted pipeline went; seconds.

    Attributes:
        first: from the start to the first checkpoint.
        steps: of the training.
        epochs: of the training.
        pace: from one checkpoint to the next.
        lines: when each line was printed in a phase, from its beginning, and when it ended.
    """

    first: float
    steps: int
    epochs: int
    pace: float
    lines: dict[str, list[float]]


def printed(epochs: int, phase: str, log: str) -> int:
    """Lines of a phase so far: `writing` begins when nothing is left to train, `evaluating` with the stage."""
    begins = {"writing": rf"epoch +{epochs}/|resumed after epoch {epochs},", "evaluating": "Running stage 'evaluate'"}
    found = re.search(begins[phase], log)
    return log[found.start() :].count("\n") if found else 0


def undisturbed(copy: Copy) -> Course:
    steps: dict[int, float] = {}
    lines: dict[str, list[float]] = {"writing": [], "evaluating": []}
    epochs, began = SMALLER["train"]["epochs"], time.monotonic()
    with copy.running(*COMMAND) as process:
        while process.poll() is None:
            now, log = time.monotonic(), copy.log
            if step := copy.step():
                steps.setdefault(step, now)
            for phase, times in lines.items():
                times += [now] * (printed(epochs, phase, log) - len(times))
            time.sleep(POLL)
    ended = time.monotonic()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(COMMAND)} ended with {process.returncode}:\n{copy.log}")
    first, last = min(steps.values()), max(steps.values())
    lines["writing"] = [time for time in lines["writing"] if time < lines["evaluating"][0]] + lines["evaluating"][:1]
    lines["evaluating"].append(ended)
    relative = {phase: [time - times[0] for time in times] for phase, times in lines.items()}
    return Course(first - began, max(steps), epochs, (last - first) / len(steps), relative)


def moments(course: Course, kills: int, rng: np.random.Generator) -> list[tuple[str, int, float]]:
    """When to kill: behind which number of lines of a phase, or of steps, and how many seconds after that."""

    def within(phase: str) -> tuple[str, int, float]:
        """Uniform over the time that the phase took, told by its lines, as another time it may be slower or faster."""
        times = course.lines[phase]
        moment = rng.uniform(0, times[-1])
        line = int(np.searchsorted(times[:-1], moment, side="right"))
        return phase, line, moment - times[line - 1]

    early, middle = kills // 4, (kills + 1) // 2
    late = kills - early - middle
    steps = np.sort(rng.integers(1, course.steps, middle))
    wanted = [("step", int(step), rng.uniform(0, course.pace)) for step in steps]
    wanted += [within("writing") for _ in range((late + 1) // 2)]
    for _ in range(early):
        wanted.insert(rng.integers(len(wanted) + 1), ("start", 0, rng.uniform(0, course.first)))
    return wanted + [within("evaluating") for _ in range(late // 2)]


def disturbed(copy: Copy, course: Course, planned: list[tuple[str, int, float]], before: int) -> int:
    """Kills and starts anew until the pipeline has completed; how often."""
    for killed, (phase, number, delay) in enumerate([*planned, ("never", 0, 0.0)]):
        began, happened, step_before = time.monotonic(), None, copy.step()
        if phase == "step":
            phase, number = ("step", max(number, step_before + 1)) if step_before < course.steps else ("writing", 1)
        with copy.running(*COMMAND) as process:
            while process.poll() is None:
                now = time.monotonic()
                if now - began > PATIENCE:
                    raise SystemExit(f"the start after {before + killed} kills hangs:\n{copy.log}")
                if happened is None and _happened(phase, number, copy, course):
                    happened = now
                if happened is not None and now - happened >= delay:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(POLL)
        took, (stage, words) = time.monotonic() - began, copy.reached()
        if process.returncode == 0:
            return killed
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the start after {before + killed} kills ended with {process.returncode}:\n{copy.log}")
        repaired = [line for line in copy.log.splitlines() if "was damaged" in line]
        print(*repaired, sep="\n", end="\n" * bool(repaired))
        told = f"{phase} {number or ''} + {delay:.2f} | {took:.1f} | {stage} | {step_before} | {copy.step()}"
        print(f"| {before + killed + 1} | {told} | {words[:70]} |", flush=True)
    raise AssertionError("the last start is not killed")


def _happened(phase: str, number: int, copy: Copy, course: Course) -> bool:
    if phase == "step":
        return copy.step() >= number
    return phase == "start" or (phase != "never" and printed(course.epochs, phase, copy.log) >= number)


def differences(whole: Path, pieces: Path) -> list[str]:
    """What a project that was killed has otherwise than one that was not, but for what it cost."""
    found = [f"{name} differs" for name in RESULTS if (whole / name).read_bytes() != (pieces / name).read_bytes()]
    (expected, _), (metrics, runs) = told_to_mlflow(whole), told_to_mlflow(pieces)
    if runs != ["FINISHED"]:
        found.append(f"MLflow has the runs {', '.join(runs) or 'none'}, not one that is finished")
    told, due = (set(table.itertuples(index=False)) for table in (metrics, expected))
    twice = set(metrics[metrics.duplicated(["key", "step"])].itertuples(index=False))
    for what, rows in (("lacks", due - told), ("has, but should not,", told - due), ("has more than once", twice)):
        if rows:
            names = [f"{row.key} at step {row.step}" for row in sorted(rows)]
            found.append(f"MLflow {what} {len(rows)} values: {', '.join(names[:4])}{' ...' * (len(names) > 4)}")
    return found


def told_to_mlflow(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """Every metric with step and value, but for costs, and the status of each run."""
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as store:
        metrics = pd.read_sql("select key, step, value from metrics", store)
        runs = [status for (status,) in store.execute("select status from runs order by start_time")]
    return metrics[~metrics["key"].isin(COST_FIELDS) & ~metrics["key"].str.startswith("seconds.")], runs


def left_behind(copy: Copy) -> list[str]:
    """Processes and unfinished files that nobody has cleared away."""
    deadline = time.monotonic() + 10  # Prefect's server ends by itself when its owner is gone
    while (servers := _running_in(copy.folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    hidden = [*copy.folder.glob(".models.*"), *copy.folder.glob("reports/.[!g]*")]
    hidden += [path for path in copy.folder.glob(".cache/train/*") if path.name != ".lock"]  # of the list, which stays
    return [
        *(f"process {' '.join(process.cmdline())[:100]}" for process in servers),
        *(str(path.relative_to(copy.folder)) for path in hidden),
    ]


def _running_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except psutil.Error:  # another user's, or gone
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    rng, wrong = np.random.default_rng(wanted.seed), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        ready, whole = Copy(Path(temporary) / "ready"), Copy(Path(temporary) / "whole")
        prepare(ready)
        shutil.copytree(ready.base, whole.base)
        course = undisturbed(whole)
        print(
            f"undisturbed: {course.steps} steps in {course.epochs} epochs, a checkpoint every {course.pace:.2f} s, the"
            f" first after {course.first:.1f} s; " + ", ".join(f"{p} {t[-1]:.1f} s" for p, t in course.lines.items())
        )
        print("| kill | step or line, + s | s from the start | stage | step before | step | last words |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        killed, round_ = 0, 0
        while killed < wanted.kills:
            round_ += 1
            pieces = Copy(Path(temporary) / f"pieces-{round_}")
            shutil.copytree(ready.base, pieces.base)
            now = disturbed(pieces, course, moments(course, wanted.kills - killed, rng), killed)
            killed += now
            found = differences(whole.folder, pieces.folder)
            wrong += found
            print(f"completed after {now} kills: {'; '.join(found) or 'the same bytes, the same in MLflow'}")
            print(f"left behind: {'; '.join(left_behind(pieces)) or 'nothing'}", flush=True)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
