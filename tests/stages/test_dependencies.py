"""dvc.yaml lists for each stage exactly the sources, parameters and outputs that its module has."""

import ast
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import paths
from pipelines.__main__ import STAGES

ROOT = Path(__file__).parents[1]
DVC = YAML(typ="safe").load(ROOT / "dvc.yaml")
LOCAL = ("fadeformer", "pipelines")
PACKAGE_DATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fadeformer"]
# Sources that stages import and that cannot change what they make.
NO_INFLUENCE = {
    "fadeformer/datasets/__init__.py": "a docstring",
    "fadeformer/errors.py": "the type of error that stops a stage",
    "fadeformer/explain.py": "how errors in params.yaml are told",
    "fadeformer/params.py": "holds no default: what it lets through stands in params.yaml, whose sections are listed",
    "pipelines/__init__.py": "where the tools keep their caches",
    "pipelines/begun.py": "which checkpoint a training resumes from; the result is that of an uninterrupted training",
    "pipelines/journal.py": "logs what an epoch has measured",
    "pipelines/moved.py": "where MLflow's store keeps files",
    "pipelines/orchestrator.py": "which Prefect server sees the stage",
    "pipelines/paths.py": "the outputs that dvc.yaml lists itself",
    "pipelines/places.py": "where the project keeps downloads and MLflow's store",
    "pipelines/signals.py": "when a training is stopped; it resumes at the same batch",
    "pipelines/stage.py": "how errors are printed",
    "pipelines/store.py": "connects to MLflow",
    "pipelines/tracking.py": "logs parameters, metrics and files that others made",
    "pipelines/verdict_table.py": "how a decision is printed",
}


def sources_of(module: str) -> set[str]:
    """Files of this project that a module imports, however indirectly."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).resolve().relative_to(ROOT).as_posix()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and str(node.value).endswith(".py"):  # a file handed to MLflow by name
                names = [f"pipelines.{str(node.value).removesuffix('.py')}"]
            elif isinstance(node, ast.Constant) and node.value in PACKAGE_DATA:
                found |= page(str(node.value))
            todo += [imported for imported in names if imported.split(".")[0] in LOCAL and is_module(imported)]
    return found


def page(name: str) -> set[str]:
    """A template, and those that it names."""
    text = (ROOT / "fadeformer" / name).read_text()
    return {f"fadeformer/{one}" for one in (name, *PACKAGE_DATA) if one == name or f'"{one}"' in text}


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def sections_of(module: str) -> set[str]:
    """Sections of params.yaml that a stage's module reads: attributes of what `params.load` returned."""
    known = {"seed", "dataset", "split", "validate_", "preprocess", "model", "augment", "train", "evaluate", "promote"}
    modules = (module, "fitting") if module == "train" else (module,)  # a process of the training reads them again
    trees = [ast.parse((ROOT / "pipelines" / f"{name}.py").read_text()) for name in modules]
    read = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr in known:
            value = node.value
            loaded = isinstance(value, ast.Call) and ast.unparse(value.func) == "params.load"
            if loaded or (isinstance(value, ast.Name) and value.id == "wanted"):
                read.add(node.attr.removesuffix("_"))
    return read


def test_there_are_the_six_stages_of_the_design():
    assert tuple(DVC["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_command_runs_the_stage_of_that_name(stage):
    assert DVC["stages"][stage]["cmd"] == f"python -m pipelines {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_sources_are_those_that_the_stage_imports(stage):
    listed = {dep for dep in DVC["stages"][stage]["deps"] if dep.startswith(LOCAL)}
    assert listed == sources_of(f"pipelines.{stage}") - NO_INFLUENCE.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_the_sections_that_the_stage_reads(stage):
    assert set(DVC["stages"][stage].get("params", [])) == sections_of(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_and_data_dependencies_are_known_paths(stage):
    entry = DVC["stages"][stage]
    outs = [
        next(iter(out)) if isinstance(out, dict) else out for out in [*entry.get("outs", []), *entry.get("metrics", [])]
    ]
    data = [dep for dep in entry["deps"] if not dep.startswith(("${", "fadeformer/", "pipelines/"))]
    known = {value.as_posix() for name, value in vars(paths).items() if name.isupper()}
    assert {*outs, *data} <= known
    assert outs
