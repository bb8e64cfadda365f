"""What pydantic finds wrong in nested settings, told by key, with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel


def describe_errors(problems: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> list[str]:
    """One message for each key that is wrong.

    Args:
        problems: of `ValidationError.errors`. Of a key that may be of several kinds, each kind has one of its own.
        root: the model that was to be.
    """
    of_key: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for problem in problems:
        of_key.setdefault(_key_path([str(part) for part in problem["loc"]], root), []).append(problem)
    # what stands below a key tells more than that the key is of none of its other kinds
    told = [path for path in of_key if not any(other != path and other[: len(path)] == path for other in of_key)]
    return [_error_message(list(path), of_key[path], root) for path in told]


def _error_message(path: list[str], problems: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> str:
    problem, key = problems[0], ".".join(path)
    if problem["type"] == "extra_forbidden":
        siblings = _field_types(_model_at(path[:-1], root))
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        prefix = ".".join([*path[:-1], ""])
        hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys: {', '.join(sorted(siblings))}"
        return f"unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"key {key} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = " or ".join(one["msg"].removeprefix("Input should be ") for one in problems)
    if problem["type"] == "model_type":
        message = f"a section with the keys {', '.join(_field_types(_model_at(path, root)))}"
    value, hint = problem["input"], ""
    if isinstance(value, str) and _is_number(value):
        hint = " (it stands as text in the YAML: no quotes, and 1.0e-3 rather than 1e-3)"
    elif isinstance(value, str) and any(one["type"] == "literal_error" for one in problems):
        near = difflib.get_close_matches(value, list(_literal_values(_annotation_at(path, root))), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} is {value!r}, but should be {message}{hint}"


def _key_path(parts: list[str], root: type[BaseModel]) -> tuple[str, ...]:
    """The keys to a problem, without the name of the kind that pydantic puts behind a key of several."""
    section: type[BaseModel] | None = root
    for number, part in enumerate(parts):
        if section is None or part not in _field_types(section):
            return tuple(parts)
        annotation = _field_types(section)[part]
        section = _nested_model(annotation)
        if section is None:
            several = len([kind for kind in _union_members(annotation) if kind is not NoneType]) > 1
            return (*parts[: number + 1], *parts[number + 1 + several :])
    return tuple(parts)


def _field_types(section: type[BaseModel]) -> dict[str, Any]:
    """Keys of a section and what their values may be."""
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The section that a value is, or each value of a dictionary, if it is one."""
    kinds = get_args(annotation) if get_origin(annotation) is dict else _union_members(annotation)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return sections[0] if sections else None


def _union_members(annotation: Any) -> Sequence[Any]:
    """What a value may be: the members of a union, or the one."""
    one = get_origin(annotation) in (None, Literal, Annotated, list, dict)
    return (annotation,) if one else get_args(annotation)


def _model_at(path: Sequence[str], root: type[BaseModel]) -> type[BaseModel]:
    for part in path:
        root = _nested_model(_field_types(root).get(part)) or root
    return root


def _annotation_at(path: Sequence[str], root: type[BaseModel]) -> Any:
    return _field_types(_model_at(path[:-1], root))[path[-1]]


def _literal_values(annotation: Any) -> Iterator[str]:
    """Every choice by name, whatever it stands in."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(argument)
        else:
            yield from _literal_values(argument)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
