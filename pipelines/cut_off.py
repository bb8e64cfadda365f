"""What a DVC or git that was killed while it wrote has left: both refuse to go on, and all of it can be had again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from fadeformer.files import whole_file

FOLDER = Path(".dvc/tmp")
PROCESSES = FOLDER / "rwlock"  # DVC's list of who reads and writes which outputs
LOCK = Path("dvc.lock")
CONFLICT = "<<<<<<< "


def mend() -> None:
    """Makes this folder one in which DVC goes on, and tells what was lost; nothing while another DVC writes here.

    DVC's list of processes is removed if it was cut off, as all of them have ended. A `dvc.lock` that was is what git
    has of it again, or removed where git has none: DVC then finds in its run cache what stages have made, and runs the
    others. One with conflicts, or that git has so too, is a person's to look at.
    """
    if not FOLDER.is_dir():  # DVC has never run
        return
    from dvc.lock import LockError, make_lock

    try:
        with make_lock(str(FOLDER / "lock")):
            if PROCESSES.is_file() and not _whole_list(PROCESSES.read_text(errors="replace")):
                PROCESSES.unlink()
                print(f"{PROCESSES} was cut off when DVC was killed, and is removed")
            if LOCK.is_file() and not _whole_lock(LOCK.read_text(errors="replace")):
                _bring_back()
    except LockError:
        return


def _bring_back() -> None:
    known = subprocess.run(["git", "show", f":./{LOCK}"], capture_output=True, text=True, check=False)
    if known.returncode != 0:
        LOCK.unlink()
        became = "is removed"
    elif _whole_lock(known.stdout):
        with whole_file(LOCK) as path:
            path.write_text(known.stdout)
        became = "is what git has of it again"
    else:  # no kill has made it so, and DVC tells what it does not understand
        return
    print(f"{LOCK} was cut off when DVC was killed, and {became}; what DVC's cache has is not run again")


def mend_git() -> None:
    """Removes the locks of a git that was killed; for a folder in which no other can be at work."""
    for left in Path(".git").rglob("*.lock"):
        left.unlink()
        print(f"{left} was left by a git that was killed, and is removed")


def _whole_list(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _whole_lock(text: str) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML, YAMLError
    from voluptuous import Invalid

    if any(line.startswith(CONFLICT) for line in text.splitlines()):
        return True
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))
    except (YAMLError, Invalid):
        return False
    return True
