"""Files of a finished run: a DVC experiment in this repository, its outputs in DVC's cache or remote."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

REPOSITORY = "FADEFORMER_REPOSITORY"  # environment: where deployed runs push their experiments, if not to this folder


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        name: of its DVC experiment.
        commit: of the experiment.
    """

    name: str
    commit: str

    def fetch(self, path: Path, folder: Path) -> Path:
        """Copies a file of the run into a folder."""
        target = folder / path.name
        DVCFileSystem(rev=self.commit).get_file(path.as_posix(), str(target))
        return target

    def json(self, path: Path) -> Any:
        """Content of a JSON file of the run."""
        return json.loads(DVCFileSystem(rev=self.commit).read_bytes(path.as_posix()))

    def has(self, path: Path) -> bool:
        """Return True if a file of the run can be read, from the cache or a remote."""
        try:
            with DVCFileSystem(rev=self.commit).open(path.as_posix()) as file:
                file.read(1)
        except (OSError, DvcException):
            return False
        return True

    def code(self) -> str:
        """Fingerprint of the sources that trained and evaluated it."""
        lock = YAML(typ="safe").load(_git("show", f"{self.commit}:dvc.lock"))
        deps = [dep for stage in ("train", "evaluate") for dep in lock["stages"][stage]["deps"]]
        sums = {f"{dep['path']} {dep['md5']}" for dep in deps if dep["path"].endswith(".py")}
        return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()[:12]


def find(name: str, needed: Path) -> Result | None:
    """The experiment of a run, if it is there and a file of it can be read.

    Args:
        name: of the run; a deployed run appends its id.
        needed: the file.
    """
    if repository := os.environ.get(REPOSITORY):
        _git("fetch", "--quiet", repository, "+refs/exps/*:refs/exps/*")
    refs = (f"refs/exps/*/*/{name}", f"refs/exps/*/*/{name}-*")
    listed = _git("for-each-ref", "--sort=-creatordate", "--format=%(objectname) %(refname)", *refs)
    for line in listed.splitlines():
        commit, ref = line.split()
        result = Result(ref.rpartition("/")[2], commit)
        if result.has(needed):
            return result
    return None


def _git(*words: str, check: bool = True) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=check).stdout
