"""The folder of a training that has begun and not ended: what it is made of, its checkpoints, history and journal.

It lies outside DVC's outputs, which DVC removes before a stage runs, and is found again by a digest of parameters,
data, code and libraries, so that exactly the same training is taken up and no other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from fadeformer import params
from fadeformer.errors import PassingError, UserError
from fadeformer.files import checksum, read_json, write_json
from pipelines import paths, places

MADE_OF = "made_of.json"
FINISHED = "finished.json"  # names the MLflow run of a training whose model is in models/
REMOVED = ".removed-"  # what the names of folders begin with that are about to be no more
SECTIONS = ("seed", "model", "augment", "train")
DATA = ("meta.json", "index.parquet", "train.npy", "val.npy")
LIBRARIES = ("lightning-fabric", "numpy", "scipy", "timm", "torch", "torchvision")
SHOWN = 5  # differences in a message


@contextmanager
def taken_up() -> Iterator[Path]:
    """The folder of the training that params.yaml describes, this process's alone; tells what is taken up or left.

    Raises:
        UserError: another process trains the same.
    """
    parts = made_of()
    root = places.project() / paths.BEGUN
    folder = root / digest(parts)
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_ended:
        with _list_of(root):
            try:
                until_ended.enter_context(FileLock(folder.with_suffix(".lock"), timeout=0))
            except Timeout as error:
                told = f"{_near(folder)}: another process trains the very same; wait until it has ended"
                raise PassingError(told) from error
            if (folder / MADE_OF).is_file():
                print(f"going on with the training that was begun in {_near(folder)}")
            else:
                _remove(root, _left_behind)
                _tell_of_others(root, parts)
                folder.mkdir(exist_ok=True)
                write_json(folder / MADE_OF, parts)
        yield folder


def finish(folder: Path, run_id: str) -> None:
    """Notes that the model is in models/. The folder stays until DVC has noted that too: else a kill would lose all."""
    write_json(folder / FINISHED, {"run_id": run_id, "copy": _working_copy()})


def forget(run_id: str) -> None:
    """Removes the folder of a finished training, whose model DVC has noted: a later stage runs on it."""
    root = places.project() / paths.BEGUN
    if root.is_dir():
        with _list_of(root):
            _remove(root, lambda finished: finished["run_id"] == run_id)


def _list_of(root: Path) -> FileLock:
    """Held by who adds to the list of trainings, or removes from it: runs of other working copies do so too."""
    return FileLock(root / ".lock")


def _working_copy() -> str:
    """The working copy where this process trains, as the project sees it."""
    return Path.cwd().relative_to(places.project()).as_posix()


def _left_behind(finished: Mapping[str, Any]) -> bool:
    """Whether nobody can need a finished training: DVC, whose lock this stage has, went on, or its copy is gone."""
    copy = finished.get("copy", ".")  # a note of an older version does not tell
    return copy == _working_copy() or not (places.project() / copy).is_dir()


def _remove(root: Path, unwanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Removes finished trainings that no process has taken up again; a kill leaves no half of one to go on with."""
    for note in list(root.glob(f"[!.]*/{FINISHED}")):
        folder = note.parent
        if unwanted(read_json(note)) and not _taken(folder):
            folder.rename(root / f"{REMOVED}{folder.name}")
            folder.with_suffix(".lock").unlink(missing_ok=True)
    for removed in root.glob(f"{REMOVED}*"):
        shutil.rmtree(removed)


def _taken(folder: Path) -> bool:
    """Whether a process trains in a folder; asked by who holds the list, so that none begins meanwhile."""
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            return False
    except Timeout:
        return True


def made_of() -> dict[str, Any]:
    """Everything that decides how a training goes, by name, as values or checksums."""
    wanted = {name: value for name, value in params.load(paths.PARAMS).flat().items() if name.split(".")[0] in SECTIONS}
    deps = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]["train"]["deps"]
    code = [Path(dep) for dep in deps if dep.endswith(".py")]
    weights = Path(wanted["model.weights"])
    files = [*code, weights, *(paths.PROCESSED / name for name in DATA)]
    try:
        sums = {path.as_posix(): checksum(path, "sha256") for path in files}
    except OSError as error:
        if Path(error.filename) == weights:
            told = f"params.yaml: model.weights is {weights}, which cannot be read ({error.strerror})"
        else:
            told = f"{error.filename}: cannot be read ({error.strerror}); run `dvc repro train`"
        raise UserError(told) from error
    return {**wanted, **sums, **{name: version(name) for name in LIBRARIES}}


def digest(parts: Mapping[str, Any]) -> str:
    """A name for what a training is made of."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _near(path: Path) -> Path:
    """A path as a person in the project's folder writes it, also where a working copy tells of it."""
    return path.relative_to(places.project()) if path.is_relative_to(places.project()) else path


def _tell_of_others(root: Path, parts: Mapping[str, Any]) -> None:
    found = [path for path in root.glob(f"[!.]*/{MADE_OF}") if not path.with_name(FINISHED).exists()]
    others = sorted((path for path in found if not _taken(path.parent)), key=lambda path: path.stat().st_mtime)
    if not others:
        return
    before = read_json(others[-1])
    names = [name for name in {**parts, **before} if parts.get(name) != before.get(name)]
    told = [
        f"{name} is {parts.get(name)}, was {before.get(name)}" if "/" not in name else f"{name} has changed"
        for name in names[:SHOWN]
    ]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    print(
        f"training afresh, not from the checkpoint in {_near(others[-1].parent)}: {'; '.join(told)}{more}. That one"
        f" goes on when all is as it was; remove the folder if it is not needed"
    )
