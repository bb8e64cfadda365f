"""Working copies of the project, and the stages that are run in them as DVC runs them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines import overrides, paths

CODE = ("fadeformer", "pipelines")
FILES = ("dvc.yaml", "params.yaml", "prefect.toml")
SHARED = (paths.ADOPTED, paths.DOWNLOADS, Path("data/own"), paths.NO_WEIGHTS.parent)  # what a user has, or downloaded
GRACE = 30.0  # seconds that a stage may take to end: training writes a checkpoint


class Failed(Exception):  # noqa: N818  it is told, and the other cells go on
    """Stages that did not end well.

    Attributes:
        log: all that they printed.
    """

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


def export(project: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Puts into a folder what the stages read of the project, its params.yaml changed; what they made there stays.

    Args:
        project: its folder.
        folder: of the copy; made if it is not there.
        changes: to params.yaml, nested by section.

    Raises:
        UserError: the changed params.yaml would not be valid.
    """
    for name in CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(project / name, folder / name)
    if (project / paths.PINS).is_file():
        shutil.copy(project / paths.PINS, folder / paths.PINS)
    for path in SHARED:
        (project / path).mkdir(parents=True, exist_ok=True)
        link(project / path, folder / path)
    overrides.apply(folder / paths.PARAMS, changes)


def link(target: Path, path: Path) -> None:
    """Makes a path lead to another folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent), target_is_directory=True)


class Stages:
    """Runs stages in working copies, in processes of their own that end with this object.

    Args:
        environment: of the processes, beyond this one's own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, **environment}
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._over = False

    def run(self, names: Sequence[str], folder: Path, log: Path) -> float:
        """Runs some stages to their end, in one process, which loads its libraries once.

        Args:
            names: of the stages, in their order.
            folder: of the working copy.
            log: to which all that they print is added.

        Returns:
            Seconds.

        Raises:
            Failed: they did not end well, or were asked to end.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("ab") as file:
            here = file.tell()
            with self._lock:
                if self._over:
                    raise Failed("not begun, since the grid is being stopped", log)
                process = subprocess.Popen(
                    [sys.executable, "-m", "pipelines", *names], cwd=folder, stdin=subprocess.DEVNULL, stdout=file,
                    stderr=file, start_new_session=True,  # Ctrl-C reaches the grid alone, which ends its stages
                    env={**self.environment, "GIT_WORK_TREE": str(folder)},
                )  # fmt: skip
                self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code != 0:
            raise Failed(_told(names, log.read_bytes()[here:].decode(errors="replace"), code), log)
        return time.monotonic() - began

    def end(self) -> None:
        """Asks what runs to end, waits until it has, and lets nothing begin any more."""
        with self._lock:
            self._over = True
            running = list(self._running)
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            for process in running:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            deadline = time.monotonic() + patience
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                time.sleep(0.05)


def _told(names: Sequence[str], printed: str, code: int) -> str:
    """The message of a stage that failed, which is the last thing that it prints behind an empty line; or that line."""
    messages = list(re.finditer(rf"^\n(?:{'|'.join(names)}): ", printed, re.MULTILINE))
    if messages:
        return " ".join(printed[messages[-1].start() :].split())
    lines = [line for line in printed.splitlines() if line.strip()]
    return f"exit status {code}: {lines[-1].strip()}" if lines else f"exit status {code}, and nothing printed"


def identity(project: Path) -> dict[str, str]:
    """Environment by which git in a working copy tells the project's revision, and how the copy differs from it."""
    found = subprocess.run(
        ["git", "rev-parse", "--absolute-git-dir"], cwd=project, capture_output=True, text=True, check=False
    )
    # a status must not write to the index, which is of the project's own files
    return {"GIT_DIR": found.stdout.strip(), "GIT_OPTIONAL_LOCKS": "0"} if found.returncode == 0 else {}
