"""Readable messages for pydantic validation errors in nested configs, with the closest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel


def describe_errors(problems: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> list[str]:
    """Write one message per invalid key.

    Args:
        problems: result of `ValidationError.errors()`; for a union type it has one entry per member.
        root: model that the values were validated against.
    """
    by_path: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for problem in problems:
        by_path.setdefault(_key_path([str(part) for part in problem["loc"]], root), []).append(problem)
    # an error below a key is more specific than the mismatches with the other members of its union
    paths = [path for path in by_path if not any(other != path and other[: len(path)] == path for other in by_path)]
    return [_error_message(list(path), by_path[path], root) for path in paths]


def _error_message(path: list[str], problems: Sequence[Mapping[str, Any]], root: type[BaseModel]) -> str:
    problem, key = problems[0], ".".join(path)
    if problem["type"] == "extra_forbidden":
        siblings = _field_types(_model_at(path[:-1], root))
        matches = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        prefix = ".".join([*path[:-1], ""])
        hint = f"did you mean {prefix}{matches[0]}?" if matches else f"valid keys: {', '.join(sorted(siblings))}"
        return f"unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"key {key} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    message = " or ".join(p["msg"].removeprefix("Input should be ") for p in problems)
    if problem["type"] == "model_type":
        message = f"a section with the keys {', '.join(_field_types(_model_at(path, root)))}"
    value, hint = problem["input"], ""
    if isinstance(value, str) and _is_number(value):
        hint = " (the YAML has it as text: remove the quotes, and write 1.0e-3 instead of 1e-3)"
    elif isinstance(value, str) and any(p["type"] == "literal_error" for p in problems):
        matches = difflib.get_close_matches(value, list(_literal_values(_annotation_at(path, root))), n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
    return f"{key} is {value!r}, but should be {message}{hint}"


def _key_path(parts: list[str], root: type[BaseModel]) -> tuple[str, ...]:
    """Key path of an error, without the union member name that pydantic inserts after a key of union type."""
    model: type[BaseModel] | None = root
    for number, part in enumerate(parts):
        if model is None or part not in _field_types(model):
            return tuple(parts)
        annotation = _field_types(model)[part]
        model = _nested_model(annotation)
        if model is None:
            is_union = len([member for member in _union_members(annotation) if member is not NoneType]) > 1
            return (*parts[: number + 1], *parts[number + 1 + is_union :])
    return tuple(parts)


def _field_types(model: type[BaseModel]) -> dict[str, Any]:
    """Keys of a model and their type annotations."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Model class in an annotation (directly, in a union, or as the value type of a dict); None if there is none."""
    members = get_args(annotation) if get_origin(annotation) is dict else _union_members(annotation)
    models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    return models[0] if models else None


def _union_members(annotation: Any) -> Sequence[Any]:
    """Members of a union, or the annotation itself if it is not a union."""
    is_single = get_origin(annotation) in (None, Literal, Annotated, list, dict)
    return (annotation,) if is_single else get_args(annotation)


def _model_at(path: Sequence[str], root: type[BaseModel]) -> type[BaseModel]:
    for part in path:
        root = _nested_model(_field_types(root).get(part)) or root
    return root


def _annotation_at(path: Sequence[str], root: type[BaseModel]) -> Any:
    return _field_types(_model_at(path[:-1], root))[path[-1]]


def _literal_values(annotation: Any) -> Iterator[str]:
    """All values of the `Literal` types in an annotation, at any depth."""
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
