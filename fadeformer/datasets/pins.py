"""Pins: sha256, size and rows of downloaded files whose authors publish no checksum, as they were first verified.

They are kept in a small JSON file that belongs into version control, so that everyone works on the same files:

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
from fadeformer.files import write_json


class Pin(BaseModel):
    """What a file must be: size in bytes, and rows where the caller counts them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] | None = None


def read(lock: Path) -> dict[str, Pin]:
    """The pins by file name; none if there is no such file.

    Raises:
        UserError: `lock` does not hold pins.
    """
    if not lock.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Pin]).validate_json(lock.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{lock}: {where + ': ' if where else ''}{first['msg']}; bring the file back from version control"
        ) from error


def compare(lock: Path, found: Mapping[str, Pin]) -> None:
    """Makes sure that files are those that were pinned; one without a pin passes.

    Args:
        lock: the file of pins.
        found: the files as they are now, by name.

    Raises:
        UserError: a file differs from its pin.
    """
    pinned = read(lock)
    for name in sorted(found.keys() & pinned.keys()):
        was, now = pinned[name].model_dump(exclude_none=True), found[name].model_dump(exclude_none=True)
        differences = [
            f"{field} is {now[field]}, but {was[field]} is pinned"
            for field in was
            if field in now and now[field] != was[field]
        ]
        if differences:
            raise UserError(
                f"{name}: {'; '.join(differences)}. If its authors have really published a new file, delete the entry"
                f" {name} from {lock}; if not, delete the downloaded {name}; then run again"
            )


def pin(lock: Path, found: Mapping[str, Pin]) -> None:
    """Adds files that were verified, once they are all equal to the pins that they have.

    Args:
        lock: the file of pins, which is written whole or not at all.
        found: the files, by name; rows are added to a pin that has none.

    Raises:
        UserError: as `compare`.
    """
    compare(lock, found)
    pinned = read(lock)
    now = pinned | {name: file for name, file in found.items() if name not in pinned or file.rows is not None}
    if now != pinned:
        write_json(lock, {name: now[name].model_dump(exclude_none=True) for name in sorted(now)})
