"""What has arrived of a file: `NAME.part`, and `NAME.part.json` that says which file it is the beginning of.

Both stay when a download breaks off, or its process is killed, so that the next attempt asks only for the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from fadeformer.files import check_room, read_json, write_json

AT_ONCE = 2**20  # bytes


class Origin(NamedTuple):
    """What a server says of a file, by which to know the same file again (RFC 9110, section 13.1.5)."""

    url: str
    etag: str | None
    date: str | None
    length: int | None

    @property
    def validator(self) -> str | None:
        """For If-Range, which takes no weak ETag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.date

    def fits(self, other: Origin) -> bool:
        """Whether nothing speaks against their being of the same file."""
        return all(mine is None or its is None or mine == its for mine, its in zip(self, other, strict=True))


class Part:
    """The bytes of a file that have arrived, counted and hashed.

    Args:
        path: where the file will be.
        algorithms: the digests to keep, by names that hashlib knows.
    """

    def __init__(self, path: Path, algorithms: Iterable[str]) -> None:
        self.path = path.with_name(f"{path.name}.part")
        self.card = path.with_name(f"{path.name}.part.json")
        self.algorithms = set(algorithms)
        self.origin: Origin | None = None
        self.size = 0
        self.digests = _digests(self.algorithms)

    def take_up(self, now: Origin) -> None:
        """Goes on from what an earlier run left, or removes it if it is not of the file of which `now` is known."""
        held = self.path.stat().st_size if self.path.is_file() else 0
        try:
            origin = Origin(**read_json(self.card))
        except (FileNotFoundError, ValueError, TypeError):  # there is none, or a power cut tore it
            origin = None
        if origin is None or not origin.fits(now) or held == 0:
            self.discard()
        else:
            self.origin, self.size, self.digests = origin, held, digests(self.path, self.algorithms)

    def begin(self, origin: Origin) -> None:
        """Starts anew. The card is written first: bytes without their card are never taken up."""
        self.discard()
        check_room(self.path.parent, origin.length or 0, "the download")
        write_json(self.card, origin._asdict())
        self.origin = origin

    def append(self, file: IO[bytes], chunk: bytes) -> None:
        """Adds to the file, which is open at its end."""
        file.write(chunk)
        file.flush()  # so that a kill loses nothing
        self.size += len(chunk)
        for digest in self.digests.values():
            digest.update(chunk)

    def discard(self) -> None:
        """Removes the bytes first: a card without bytes says nothing."""
        self.path.unlink(missing_ok=True)
        self.card.unlink(missing_ok=True)
        self.origin, self.size, self.digests = None, 0, _digests(self.algorithms)

    def rename(self, path: Path) -> None:
        """Gives the whole file its name."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        self.path.replace(path)
        self.card.unlink(missing_ok=True)


def digests(path: Path, algorithms: Iterable[str]) -> dict[str, Any]:
    """Several digests of a file in one reading, as objects of hashlib."""
    made = _digests(algorithms)
    with path.open("rb") as file:
        while chunk := file.read(AT_ONCE):
            for digest in made.values():
                digest.update(chunk)
    return made


def _digests(algorithms: Iterable[str]) -> dict[str, Any]:
    return {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
