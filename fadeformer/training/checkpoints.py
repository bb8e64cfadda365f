"""The state of a training on disk: written whole, the last two kept, read without running any code."""

from __future__ import annotations

import io
import time
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from fadeformer.errors import UserError
from fadeformer.io.atomic import DISK_FULL_ERRNOS, atomic_write

MAX_CHECKPOINTS = 2
READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    RuntimeError,
    UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
)


class CheckpointManager:
    """Checkpoints of one training, `step-00000417.pt` and so on.

    Args:
        folder: where they lie.
        minutes: from one to the next within an epoch.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.interval_seconds = 60 * minutes
        self.last_saved = time.monotonic()
        for begun in folder.glob(".step-*"):  # by a process that was killed
            begun.unlink()

    @property
    def paths(self) -> list[Path]:
        """Those there are, the newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def is_due(self) -> bool:
        """Whether the last one is older than it should be."""
        return time.monotonic() - self.last_saved >= self.interval_seconds

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Writes a state, and removes all but the last two.

        Raises:
            UserError: the disk is full; what was there before is whole.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        try:
            with atomic_write(self.folder / f"step-{step:08d}.pt") as path:
                path.write_bytes(buffer.getbuffer())
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            before = f"{self.paths[0]} is whole" if self.paths else "there is none yet"
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error.strerror}); the one before,"
                f" {before}; free some space, then run again: training goes on from there"
            ) from error
        for path in self.paths[MAX_CHECKPOINTS:]:
            path.unlink()
        self.last_saved = time.monotonic()

    def load_latest(self) -> dict[str, Any] | None:
        """The last state that can be read; None where there is no checkpoint. Damaged files are told and passed over.

        Raises:
            UserError: there are some, and none can be read.
        """
        for path in self.paths:
            try:
                return _load_checkpoint(path)
            except READ_ERRORS as error:
                warnings.warn(f"{path} is damaged ({type(error).__name__}) and passed over", stacklevel=2)
        if self.paths:
            raise UserError(f"{self.folder}: none of the checkpoints can be read; remove the folder to train afresh")
        return None


def _load_checkpoint(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch does not look at the checksums that it writes
        if (wrong := file.testzip()) is not None:
            raise zipfile.BadZipFile(wrong)
    return dict(torch.load(path, map_location="cpu", weights_only=True))
