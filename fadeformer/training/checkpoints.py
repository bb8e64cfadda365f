"""Checkpoints of the training state: written atomically, the last two kept, loaded without running code."""

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
    zipfile.BadZipFile, zlib.error, OSError, RuntimeError, UnpicklingError, EOFError, LookupError, ValueError,
)  # fmt: skip


class CheckpointManager:
    """Checkpoints of one training run, `step-00000417.pt` and so on.

    Args:
        folder: folder of the checkpoints.
        minutes: interval between checkpoints within an epoch.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.interval_seconds = 60 * minutes
        self.last_saved = time.monotonic()
        for path in folder.glob(".step-*"):  # temporary files of a killed process
            path.unlink()

    @property
    def paths(self) -> list[Path]:
        """Paths of the checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def is_due(self) -> bool:
        """Return True if the last checkpoint is older than the interval."""
        return time.monotonic() - self.last_saved >= self.interval_seconds

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Save a state, and remove all checkpoints but the last two.

        Raises:
            UserError: the disk is full; the previous checkpoint is intact.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        try:
            with atomic_write(self.folder / f"step-{step:08d}.pt") as path:
                path.write_bytes(buffer.getbuffer())
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            previous = (
                f"the previous checkpoint, {self.paths[0]}, is intact" if self.paths else "there is no checkpoint yet"
            )
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error.strerror});"
                f" {previous}; free some disk space, then run again to resume"
            ) from error
        for path in self.paths[MAX_CHECKPOINTS:]:
            path.unlink()
        self.last_saved = time.monotonic()

    def load_latest(self) -> dict[str, Any] | None:
        """Load the newest readable state, or None without checkpoints; damaged files cause a warning.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        for path in self.paths:
            try:
                return _load_checkpoint(path)
            except READ_ERRORS as error:
                warnings.warn(f"{path} is damaged ({type(error).__name__}) and was skipped", stacklevel=2)
        if self.paths:
            raise UserError(
                f"{self.folder}: none of the checkpoints can be read; remove the folder to restart training"
            )
        return None


def _load_checkpoint(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch.load does not verify the checksums
        if (damaged := file.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)
    return dict(torch.load(path, map_location="cpu", weights_only=True))
