"""Override values of params.yaml and keep its comments: for presets and the parameters of deployment runs."""

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
    """Write changes to params.yaml; comments and formatting stay.

    Args:
        path: Path of params.yaml.
        changes: The changed keys, nested by section.

    Raises:
        UserError: The file or the result is invalid; the file is not changed.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    schema.load_params(path)  # reports errors by key
    document = yaml.load(path)
    _merge_into_document(document, changes)
    text = io.StringIO()
    yaml.dump(document, text)
    schema.parse_params(YAML(typ="safe").load(text.getvalue()), str(path))
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


@contextmanager
def temporary_overrides(path: Path, changes: Mapping[str, Any]) -> Iterator[None]:
    """Apply overrides inside a `with` block, then restore the file unless it was edited in the block."""
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


def optional_section(section: type[BaseModel], key: str, current: CurrentParams) -> type[BaseModel]:
    """Create a model of a section of params.yaml in which every key is optional; Prefect renders it as a form.

    Args:
        section: The section's type.
        key: The section's key, such as `train`.
        current: The values and comments of params.yaml: default values and descriptions of the form.
    """
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        dotted_key = f"{key}.{field.alias or name}"
        subsection = next((c for c in (field.annotation, *get_args(field.annotation)) if _is_section(c)), None)
        if subsection is not None:
            field_type: Any = optional_section(subsection, dotted_key, current)
            default = field_type() if any(other.startswith(f"{dotted_key}.") for other in current.values) else None
            field_type = field_type if subsection is field.annotation else field_type | None
        else:
            field_type = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            default = current.values.get(dotted_key)
        fields[name] = (
            field_type,
            Field(default=default, alias=field.alias, description=current.comments.get(dotted_key)),
        )
    name = section.__name__.replace("Params", "Overrides")
    return create_model(name, __config__=ConfigDict(extra="forbid", serialize_by_alias=True), **fields)


class CurrentParams(NamedTuple):
    """Current contents of params.yaml, by dotted keys.

    Attributes:
        values: The values of all keys that are not sections.
        comments: The comment of each key.
    """

    values: Mapping[str, Any]
    comments: Mapping[str, str]


def read_current_params(path: Path) -> CurrentParams:
    """Read values and comments of params.yaml; raises a UserError if it is invalid."""
    return CurrentParams(schema.load_params(path).as_flat_dict(), parse_comments(path.read_text(encoding="utf-8")))


def parse_comments(text: str) -> dict[str, str]:
    """Return the comment of each key of params.yaml, by dotted key, with its continuation lines."""
    result: dict[str, str] = {}
    parents: list[tuple[int, str]] = []  # indentation and names of the enclosing sections
    last = ""
    for line in text.splitlines():
        if key := re.match(r"( *)(\w+):", line):
            while parents and parents[-1][0] >= len(key[1]):
                parents.pop()
            parents.append((len(key[1]), key[2]))
            last = ".".join(name for _, name in parents)
            if comment := re.search(r"\s# *(.*)", line):
                result[last] = comment[1]
        elif last in result and (more := re.match(r"\s+# *(.*)", line)):
            result[last] += f" {more[1]}"
    return result


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: {"train.epochs": 3} becomes {"train": {"epochs": 3}}."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        parent = result
        for section in sections:
            parent = parent.setdefault(section, {})
        parent[name] = value
    return result


def deep_merge(base: Mapping[str, Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, key by key; later ones take precedence."""
    result = dict(base)
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = deep_merge(result[key], value) if both else value
    return result


def explicit_values(section: BaseModel | None) -> dict[str, Any]:
    """Return the explicitly set keys of an optional section."""
    return {} if section is None else section.model_dump(exclude_unset=True, by_alias=True)


def _merge_into_document(document: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if key not in document:
            raise UserError(f"params.yaml has no key {key}")
        if isinstance(value, Mapping) and isinstance(document[key], Mapping):
            _merge_into_document(document[key], value)
        elif document[key] == value and isinstance(document[key], bool) == isinstance(value, bool):
            continue  # keep the way it is written
        elif isinstance(value, list) and isinstance(document[key], list):
            document[key][:] = value
        else:
            document[key] = value


def _is_section(field_type: Any) -> bool:
    return isinstance(field_type, type) and issubclass(field_type, BaseModel)
