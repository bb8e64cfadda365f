"""Folders of unfinished trainings, from which an interrupted training resumes.

A folder has the fingerprint, checkpoints, history and MLflow run of a training. It is outside DVC's outputs, which DVC
removes before a stage runs. Its name is a hash of parameters, data, code and library versions, so a training resumes
only from checkpoints of the same configuration.
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

FINGERPRINT = "fingerprint.json"  # written first and removed first: a folder without it is not resumed
FINISHED_TRAINING = "finished.json"  # MLflow run and workspace of a training whose model is in models/
FINGERPRINT_SECTIONS = ("seed", "model", "augment", "train")
DATA_FILES = ("meta.json", "index.parquet", "train.npy", "val.npy")
LIBRARIES = ("lightning-fabric", "numpy", "scipy", "timm", "torch", "torchvision")
MAX_DIFFERENCES = 5  # in a message
LOCK_TIMEOUT = 10  # seconds; another process may hold the lock to look for stale folders


@contextmanager
def open_training_folder() -> Iterator[Path]:
    """Lock the folder of the training that params.yaml describes, and create it if there is none to resume.

    Raises:
        TransientError: Another process runs the same training.
    """
    fingerprint = compute_fingerprint()
    folder = locations.project_folder() / paths.UNFINISHED_TRAININGS / hash_fingerprint(fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if (folder / FINGERPRINT).is_file():
                print(f"resuming the unfinished training in {_relative_path(folder)}")
            else:
                _remove_folder(folder)
                _remove_stale_folders(folder.parent, fingerprint)
                folder.mkdir()
                write_json(folder / FINGERPRINT, fingerprint)
            yield folder
    except Timeout as error:
        message = f"{_relative_path(folder)}: another process runs the same training; wait until it has finished"
        raise TransientError(message) from error


def mark_finished(folder: Path, run_id: str) -> None:
    """Mark that the model is in models/. The folder stays until DVC has recorded it: a kill must not lose the model."""
    write_json(folder / FINISHED_TRAINING, {"run_id": run_id, "copy": _relative_path(Path.cwd())})


def remove_finished(run_id: str) -> None:
    """Remove the folder of a finished training. Called by a later stage, so DVC has recorded the model."""
    for marker in (locations.project_folder() / paths.UNFINISHED_TRAININGS).glob(f"*/{FINISHED_TRAINING}"):
        with suppress(Timeout), FileLock(marker.parent.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
            if marker.is_file() and read_json(marker)["run_id"] == run_id:
                _remove_folder(marker.parent)


def _relative_path(path: Path) -> str:
    return path.relative_to(locations.project_folder()).as_posix()


def _remove_folder(folder: Path) -> None:
    (folder / FINGERPRINT).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def _remove_stale_folders(root: Path, fingerprint: Mapping[str, Any]) -> None:
    """Remove folders that are no longer needed, and print how the latest unfinished training differs from this one.

    DVC has recorded the finished training of this workspace when it starts the next; a deleted workspace needs nothing.
    """
    unfinished = []
    for folder in filter(Path.is_dir, root.iterdir()):
        with suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
            copy = read_json(folder / FINISHED_TRAINING)["copy"] if (folder / FINISHED_TRAINING).is_file() else None
            if copy is None and (folder / FINGERPRINT).is_file():
                unfinished.append(folder / FINGERPRINT)
            elif copy in (None, _relative_path(Path.cwd())) or not (locations.project_folder() / copy).is_dir():
                _remove_folder(folder)
    if unfinished:
        last = max(unfinished, key=lambda path: path.stat().st_mtime)
        previous = read_json(last)
        changed = [name for name in {**fingerprint, **previous} if fingerprint.get(name) != previous.get(name)]
        differences = [
            f"{n} has changed" if "/" in n else f"{n} is {fingerprint.get(n)}, was {previous.get(n)}" for n in changed
        ]
        shown = "; ".join(differences[:MAX_DIFFERENCES]) + (" and more" if differences[MAX_DIFFERENCES:] else "")
        print(
            f"training from the start, not from the checkpoint in {_relative_path(last.parent)}: {shown}. Restore the"
            " old values to resume that training, or remove its folder"
        )


def compute_fingerprint() -> dict[str, Any]:
    """Return values, checksums and versions of all params, sources, inputs and libraries that a training depends on."""
    params = {
        name: value
        for name, value in schema.load_params(paths.PARAMS).as_flat_dict().items()
        if name.split(".")[0] in FINGERPRINT_SECTIONS
    }
    deps = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]["train"]["deps"]
    code = [path for dep in map(Path, deps) for path in ([dep] if dep.suffix == ".py" else sorted(dep.rglob("*.py")))]
    files = [*code, Path(params["model.weights"]), *(paths.PROCESSED / name for name in DATA_FILES)]
    sums = {path.as_posix(): checksum(path, "sha256") for path in files}
    return {**params, **sums, **{name: version(name) for name in LIBRARIES}}


def hash_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Return a short hash of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
