"""Files of a finished run, which is a DVC experiment in this repository with outputs in DVC's cache or remote."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json
from pipelines import paths

# Environment variable: the repository that deployed runs push their experiments to; this folder by default.
REPOSITORY_VARIABLE = "FADEFORMER_REPOSITORY"


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        name: Name of its DVC experiment.
        commit: Commit of the experiment.
    """

    name: str
    commit: str

    def fetch(self, path: Path, folder: Path) -> Path:
        """Copy a file of the run from DVC's cache or remote into a folder and return its path.

        Raises:
            UserError: The file is in neither.
        """
        target = folder / path.name
        try:
            DVCFileSystem(rev=self.commit).get_file(path.as_posix(), str(target))
        except (OSError, DvcException) as error:
            raise UserError(
                f"{path} of the experiment {self.name} is in neither DVC's cache nor a remote ({error}); run"
                f" `dvc exp remove {self.name}`, then run again"
            ) from error
        return target

    def read_json_file(self, path: Path) -> Any:
        """Read a JSON file of the run."""
        with tempfile.TemporaryDirectory() as folder:
            return read_json(self.fetch(path, Path(folder)))

    def metric_history(self, metric: str) -> dict[int, float]:
        """Return a training metric by epoch."""
        with tempfile.TemporaryDirectory() as folder:
            history = pd.read_csv(self.fetch(paths.HISTORY, Path(folder)))
        return {int(epoch): float(value) for epoch, value in zip(history["epoch"], history[metric], strict=True)}

    def code_fingerprint(self) -> str:
        """Hash the source files that trained and evaluated the model; 12 hexadecimal digits."""
        lock = YAML(typ="safe").load(_run_git("show", f"{self.commit}:dvc.lock"))
        deps = [dep for stage in ("train", "evaluate") for dep in lock["stages"][stage]["deps"]]
        checksums = {f"{dep['path']} {dep['md5']}" for dep in deps if dep["path"].endswith(".py")}
        return hashlib.sha256("\n".join(sorted(checksums)).encode()).hexdigest()[:12]


def find_result(name: str) -> RunResult | None:
    """Return the newest experiment of a run, or None; deployed runs append their ID to the name."""
    if repository := os.environ.get(REPOSITORY_VARIABLE):
        _run_git("fetch", "--quiet", repository, "+refs/exps/*:refs/exps/*")
    refs = (f"refs/exps/*/*/{name}", f"refs/exps/*/*/{name}-*")
    line = _run_git("for-each-ref", "--sort=-creatordate", "--count=1", "--format=%(objectname) %(refname)", *refs)
    if not line:
        return None
    commit, ref = line.split()
    return RunResult(ref.rpartition("/")[2], commit)


def _run_git(*arguments: str) -> str:
    process = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"`git {arguments[0]}` failed: {process.stderr.strip()}")
    return process.stdout
