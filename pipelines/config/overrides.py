"""Changes to params.yaml that keep its comments: presets, and the parameters of a deployment run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model
from ruamel.yaml import YAML

from fadeformer.config import schema
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_write


def apply_overrides(path: Path, changes: Mapping[str, Any]) -> None:
    """Writes changes into params.yaml, checked first, its comments kept.

    Args:
        path: params.yaml.
        changes: nested by section, only what is to be changed.

    Raises:
        UserError: the result would not be valid; the file is then as it was.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    schema.load_params(path)  # whatever is wrong with it is told by key
    document = yaml.load(path)
    _merge_into_document(document, changes)
    text = io.StringIO()
    yaml.dump(document, text)
    schema.parse_params(YAML(typ="safe").load(text.getvalue()), str(path))
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


@contextmanager
def temporary_overrides(path: Path, changes: Mapping[str, Any]) -> Iterator[None]:
    """The same for the length of a block; then the file is again what it was, unless it was edited in between."""
    if not changes:
        yield
        return
    before = path.read_bytes()
    apply_overrides(path, changes)
    during = path.read_bytes()
    try:
        yield
    finally:
        if path.read_bytes() == during:
            with atomic_write(path) as temporary:
                temporary.write_bytes(before)
        else:
            print(f"{path} was edited during the run: it keeps that edit, and the run's overrides {dict(changes)}")


def optional_section(section: type[BaseModel], key: str, present: CurrentParams) -> type[BaseModel]:
    """A section of params.yaml of which every key may be left out; Prefect makes a form of it.

    Args:
        section: its type.
        key: of the section, such as `train`.
        present: what the form begins with, and what explains it.
    """
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        called = f"{key}.{field.alias or name}"
        inner = next((c for c in (field.annotation, *get_args(field.annotation)) if _is_section(c)), None)
        if inner is not None:
            kind: Any = optional_section(inner, called, present)
            begins = kind() if any(other.startswith(f"{called}.") for other in present.values) else None
            kind = kind if inner is field.annotation else kind | None
        else:
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            begins = present.values.get(called)
        fields[name] = (kind, Field(default=begins, alias=field.alias, description=present.comments.get(called)))
    name = section.__name__.replace("Params", "Overrides")
    return create_model(name, __config__=ConfigDict(extra="forbid", serialize_by_alias=True), **fields)


class CurrentParams(NamedTuple):
    """What params.yaml says now, by dotted keys.

    Attributes:
        values: of all that is no section.
        told: the comment beside each key.
    """

    values: Mapping[str, Any]
    comments: Mapping[str, str]


def read_current_params(path: Path) -> CurrentParams:
    """Reads params.yaml, which must be valid."""
    return CurrentParams(schema.load_params(path).as_flat_dict(), parse_comments(path.read_text(encoding="utf-8")))


def parse_comments(text: str) -> dict[str, str]:
    """The comment beside each key of params.yaml, by its dotted name, and those of the lines below it that go on."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indents and names of the sections around a line
    last = ""
    for line in text.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            while above and above[-1][0] >= len(key[1]):
                above.pop()
            above.append((len(key[1]), key[2]))
            last = ".".join(name for _, name in above)
            if comment := re.search(r"\s# *(.*)", line):
                found[last] = comment[1]
        elif last in found and (more := re.match(r"\s+# *(.*)", line)):
            found[last] += f" {more[1]}"
    return found


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections: {"train.epochs": 3} as {"train": {"epochs": 3}}."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return found


def deep_merge(below: Mapping[str, Any], *above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them, section by section; of two values the later counts."""
    found = dict(below)
    for layer in above:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = deep_merge(found[key], value) if both else value
    return found


def explicit_values(section: BaseModel | None) -> dict[str, Any]:
    """The keys of a partial section that were given."""
    return {} if section is None else section.model_dump(exclude_unset=True, by_alias=True)


def _merge_into_document(document: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if key not in document:
            raise UserError(f"params.yaml has no key {key}")
        if isinstance(value, Mapping) and isinstance(document[key], Mapping):
            _merge_into_document(document[key], value)
        elif document[key] == value and isinstance(document[key], bool) == isinstance(value, bool):
            continue  # it stays as it is written there
        elif isinstance(value, list) and isinstance(document[key], list):
            document[key][:] = value
        else:
            document[key] = value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
