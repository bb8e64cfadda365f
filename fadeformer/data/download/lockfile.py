"""Pins: SHA-256, size and rows of downloaded files whose authors publish no checksum, as they were first verified.

Pins are kept in a small JSON file that belongs in version control, so that everyone works on the same files:

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
    """What a file must be: size in bytes, and rows where the caller counts them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)] | None = None


def read_pins(lock: Path) -> dict[str, Pin]:
    """Read the pins by file name; none if there is no such file.

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


def verify_or_pin(lock: Path, files: Mapping[str, Pin]) -> None:
    """Compare files with their pins, and add those that have none.

    Args:
        lock: the file of pins, replaced atomically; unchanged if a file differs.
        files: the files as they are now, by name.

    Raises:
        UserError: a file differs from its pin, or `lock` does not hold pins.
    """
    pinned = read_pins(lock)
    for name in sorted(files.keys() & pinned.keys()):
        now = files[name].model_dump()
        was = pinned[name].model_dump(exclude_none=True)
        differences = [f"{key} is {now[key]}, but {was[key]} is pinned" for key in was if now[key] != was[key]]
        if differences:
            raise UserError(
                f"{name}: {'; '.join(differences)}. If its authors have really published a new file, delete the entry"
                f" {name} from {lock}; if not, delete the downloaded {name}; then run again"
            )
    if files.keys() - pinned.keys():
        everything = {**files, **pinned}
        write_json(lock, {name: everything[name].model_dump(exclude_none=True) for name in sorted(everything)})
