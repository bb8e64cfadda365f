"""No module of either package has mutable state: what a name at its top level is bound to never changes."""

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
FIXED = {"getLogger", "task"}  # what a name in lower case may be made by: a logger, a Prefect task of a function


def violations(source: str) -> Iterator[str]:
    """Lines of a module that make or change state of a module."""
    tree = ast.parse(source)
    bound = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
            made_by = node.value
            while isinstance(made_by, ast.Call):  # such as task(...)(function)
                made_by = made_by.func
            if made_by is node.value or ast.unparse(made_by).split(".")[-1] not in FIXED:
                lower = [name for name in names if name.islower() and not name.startswith("__")]
                yield from (f"{node.lineno}: {name} in lower case" for name in lower)
            bound |= set(names)
    for node in ast.walk(tree):
        changed: list[ast.AST] = []
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"
        elif isinstance(node, ast.Assign | ast.Delete):
            changed = [one for target in node.targets for one in ast.walk(target)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = [node.func]
        for place in changed:
            owner = ast.unparse(place.value) if isinstance(place, ast.Attribute | ast.Subscript) else ""
            if owner in bound or ("." in owner and owner.split(".")[-1].isupper()):
                yield f"{node.lineno}: {owner} is changed"


@pytest.mark.parametrize("path", MODULES, ids=[path.relative_to(ROOT).as_posix() for path in MODULES])
def test_a_module_has_no_state(path: Path):
    assert list(violations(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    global COUNT\n    COUNT = 1",
        "started = []",
        "FOUND = {}\ndef f():\n    FOUND['a'] = 1",
        "FOUND = {}\ndef f():\n    del FOUND['a']",
        "FOUND = []\ndef f():\n    FOUND.append(1)",
        "STATE = Thing()\ndef f():\n    STATE.done = True",
        "def f():\n    other.FOUND.clear()",
    ],
)
def test_state_is_found(source: str):
    assert list(violations(source))
