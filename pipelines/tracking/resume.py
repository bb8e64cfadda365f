"""Folders of unfinished trainings: fingerprint, checkpoints, history and MLflow run.

They are outside DVC's outputs, which DVC removes before a stage runs. A folder's name is a digest of parameters, data,
code and libraries, so a training resumes from its own checkpoints and from no others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from fadeformer.config import schema
from fadeformer.errors import TransientError
from fadeformer.io.atomic import checksum, read_json, write_json
from pipelines import paths
from pipelines.tracking import locations

FINGERPRINT = "made_of.json"  # written first and removed first: a folder without it is not resumed
FINISHED_MARKER = "finished.json"  # MLflow run and working copy of a training whose model is in models/
TRAINING_SECTIONS = ("seed", "model", "augment", "train")
DATA_FILES = ("meta.json", "index.parquet", "train.npy", "val.npy")
LIBRARIES = ("lightning-fabric", "numpy", "scipy", "timm", "torch", "torchvision")
MAX_DIFFERENCES = 5  # differences in a message
LOCK_TIMEOUT = 10  # seconds at most in which another process looks what to remove


@contextmanager
def open_training_folder() -> Iterator[Path]:
    """Lock the folder of the training that params.yaml describes, and create it if there is none to resume.

    Raises:
        PassingError: another process trains the same.
    """
    parts = compute_fingerprint()
    folder = locations.project_folder() / paths.UNFINISHED_TRAININGS / hash_fingerprint(parts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if (folder / FINGERPRINT).is_file():
                print(f"going on with the training that was begun in {_relative_path(folder)}")
            else:
                _remove_folder(folder)
                _remove_stale_folders(folder.parent, parts)
                folder.mkdir()
                write_json(folder / FINGERPRINT, parts)
            yield folder
    except Timeout as error:
        told = f"{_relative_path(folder)}: another process trains the very same; wait until it has ended"
        raise TransientError(told) from error


def mark_finished(folder: Path, run_id: str) -> None:
    """Note that the model is in models/. The folder stays until DVC has noted that too, or a kill would lose it."""
    write_json(folder / FINISHED_MARKER, {"run_id": run_id, "copy": _relative_path(Path.cwd())})


def remove_finished(run_id: str) -> None:
    """Remove the folder of a finished training. A later stage runs on its model, so DVC has noted it."""
    for note in (locations.project_folder() / paths.UNFINISHED_TRAININGS).glob(f"*/{FINISHED_MARKER}"):
        with suppress(Timeout), FileLock(note.parent.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if note.is_file() and read_json(note)["run_id"] == run_id:
                _remove_folder(note.parent)


def _relative_path(path: Path) -> str:
    return path.relative_to(locations.project_folder()).as_posix()


def _remove_folder(folder: Path) -> None:
    (folder / FINGERPRINT).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def _remove_stale_folders(root: Path, parts: Mapping[str, Any]) -> None:
    """Remove folders that nobody needs, and print how the latest unfinished training differs from this one.

    What this working copy has finished is noted by DVC, whose lock this stage has; a deleted copy needs nothing.
    """
    unfinished = []
    for folder in filter(Path.is_dir, root.iterdir()):
        with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
            copy = read_json(folder / FINISHED_MARKER)["copy"] if (folder / FINISHED_MARKER).is_file() else None
            if copy is None and (folder / FINGERPRINT).is_file():
                unfinished.append(folder / FINGERPRINT)
            elif copy in (None, _relative_path(Path.cwd())) or not (locations.project_folder() / copy).is_dir():
                _remove_folder(folder)
    if unfinished:
        last = max(unfinished, key=lambda path: path.stat().st_mtime)
        before = read_json(last)
        changed = [name for name in {**parts, **before} if parts.get(name) != before.get(name)]
        told = [f"{n} has changed" if "/" in n else f"{n} is {parts.get(n)}, was {before.get(n)}" for n in changed]
        print(
            f"training afresh, not from the checkpoint in {_relative_path(last.parent)}: {'; '.join(told[:MAX_DIFFERENCES])}"
            f"{' and more' if told[MAX_DIFFERENCES:] else ''}. That one goes on when all is as it was; remove the folder if it is"
            " not needed"
        )


def compute_fingerprint() -> dict[str, Any]:
    """Everything that decides how a training goes, by name, as values or checksums."""
    wanted = {
        name: value
        for name, value in schema.load_params(paths.PARAMS).as_flat_dict().items()
        if name.split(".")[0] in TRAINING_SECTIONS
    }
    deps = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]["train"]["deps"]
    code = [Path(dep) for dep in deps if dep.endswith(".py")]
    files = [*code, Path(wanted["model.weights"]), *(paths.PROCESSED / name for name in DATA_FILES)]
    sums = {path.as_posix(): checksum(path, "sha256") for path in files}
    return {**wanted, **sums, **{name: version(name) for name in LIBRARIES}}


def hash_fingerprint(parts: Mapping[str, Any]) -> str:
    """A name for what a training is made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
