"""Lock file with pins: SHA-256, size and rows of downloaded files whose authors publish no checksum.

A file is pinned when it is first downloaded. The lock file is JSON and belongs in version control, so that everyone
works on the same files:

    {
      "Data_Entry_2017_v2020.csv": {
        "sha256": "0123...",
        "size": 7861760,
        "rows": 112120
      }
    }
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fadeformer.errors import UserError
from fadeformer.io.atomic import write_json


class Pin(BaseModel):
    """Expected SHA-256, size in bytes and, for tables and lists, number of rows of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] | None = None


def read_pins(lock: Path) -> dict[str, Pin]:
    """Read the pins by file name; a missing lock file has none.

    Raises:
        UserError: `lock` is not a valid lock file.
    """
    if not lock.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Pin]).validate_json(lock.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{lock}: {key + ': ' if key else ''}{first['msg']}; restore the file from version control"
        ) from error


def verify_or_pin(lock: Path, files: Mapping[str, Pin]) -> None:
    """Compare files with their pins, and pin those that are new.

    Args:
        lock: the lock file, written atomically; unchanged if a file differs.
        files: the current files by name.

    Raises:
        UserError: a file differs from its pin, or `lock` is not a valid lock file.
    """
    pinned = read_pins(lock)
    for name in sorted(files.keys() & pinned.keys()):
        current = files[name].model_dump()
        expected = pinned[name].model_dump(exclude_none=True)
        differences = [
            f"{key} is {current[key]}, but {expected[key]} is pinned"
            for key in expected
            if current[key] != expected[key]
        ]
        if differences:
            raise UserError(
                f"{name}: {'; '.join(differences)}. If the authors have published a new version, delete the entry"
                f" {name} from {lock}; if not, delete the downloaded {name}; then run again"
            )
    if files.keys() - pinned.keys():
        pins = {**files, **pinned}
        write_json(lock, {name: pins[name].model_dump(exclude_none=True) for name in sorted(pins)})
