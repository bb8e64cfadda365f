"""Modules have no mutable state: module-level names are constants."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted([*ROOT.glob("fadeformer/**/*.py"), *ROOT.glob("pipelines/**/*.py")])
MUTATORS = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "put", "remove", "reverse", "set",
    "setdefault", "sort", "update",
}  # fmt: skip
ALLOWED_CALLS = {"getLogger", "task"}  # lowercase names may be loggers and Prefect tasks


def violations(source: str) -> Iterator[str]:
    """Yield the lines that create or change module state."""
    tree = ast.parse(source)
    bound = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)]
            function = node.value
            while isinstance(function, ast.Call):  # such as task(...)(function)
                function = function.func
            if function is node.value or ast.unparse(function).split(".")[-1] not in ALLOWED_CALLS:
                lowercase = [name for name in names if name.islower() and not name.startswith("__")]
                yield from (f"{node.lineno}: {name} in lowercase" for name in lowercase)
            bound |= set(names)
    for node in ast.walk(tree):
        changed: list[ast.AST] = []
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"
        elif isinstance(node, ast.Assign | ast.Delete):
            changed = [child for target in node.targets for child in ast.walk(target)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = [node.func]
        for target in changed:
            owner = ast.unparse(target.value) if isinstance(target, ast.Attribute | ast.Subscript) else ""
            if owner in bound or ("." in owner and owner.split(".")[-1].isupper()):
                yield f"{node.lineno}: {owner} is changed"


@pytest.mark.parametrize("path", MODULES, ids=[path.relative_to(ROOT).as_posix() for path in MODULES])
def test_module_has_no_mutable_state(path: Path):
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    global COUNT\n    COUNT = 1",
        "started = []",
        "CACHE = {}\ndef f():\n    CACHE['a'] = 1",
        "CACHE = {}\ndef f():\n    del CACHE['a']",
        "CACHE = []\ndef f():\n    CACHE.append(1)",
        "STATE = Thing()\ndef f():\n    STATE.done = True",
        "def f():\n    other.CACHE.clear()",
    ],
)
def test_mutable_state_is_detected(source: str):
    assert list(violations(source))
