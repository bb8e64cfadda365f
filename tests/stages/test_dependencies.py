"""dvc.yaml lists for each stage the sources, parameters and outputs that its module has."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import paths
from pipelines.stages import STAGES

ROOT = Path(__file__).parents[2]
DVC = YAML(typ="safe").load(ROOT / "dvc.yaml")
LOCAL = ("fadeformer", "pipelines")
TEMPLATES = ROOT / "fadeformer" / "reporting" / "templates"
TABLE = "fadeformer/evaluation/published.csv"
# Sources that stages import and that cannot change what they make.
NO_INFLUENCE = {
    "fadeformer/errors.py": "the type of error that stops a stage",
    "fadeformer/config/validation.py": "how errors in params.yaml are told",
    "fadeformer/config/schema.py": "holds no default: what it lets through stands in params.yaml, whose sections are listed",
    "pipelines/environment.py": "where the tools keep their caches, and telemetry",
    "pipelines/tracking/resume.py": "which checkpoint a training resumes from; the result is that of an uninterrupted training",
    "pipelines/tracking/journal.py": "logs what an epoch has measured",
    "pipelines/tracking/relocate.py": "where MLflow's store keeps files",
    "pipelines/server.py": "which Prefect server sees the stage",
    "pipelines/paths.py": "the outputs that dvc.yaml lists itself",
    "pipelines/tracking/locations.py": "where the project keeps downloads and MLflow's store",
    "pipelines/stages/signals.py": "when a training is stopped; it resumes at the same batch",
    "pipelines/runner.py": "how errors are printed",
    "pipelines/tracking/store.py": "connects to MLflow",
    "pipelines/tracking/runs.py": "logs parameters, metrics and files that others made",
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
                names = [f"pipelines.registry.{str(node.value).removesuffix('.py')}"]
            elif isinstance(node, ast.Constant) and str(node.value).endswith(".html") and is_template(str(node.value)):
                found |= template(str(node.value))
            elif isinstance(node, ast.Constant) and node.value == Path(TABLE).name:
                found.add(TABLE)
            todo += [imported for imported in names if imported.split(".")[0] in LOCAL and is_module(imported)]
    return found


def is_template(name: str) -> bool:
    return (TEMPLATES / name).is_file()


def template(name: str) -> set[str]:
    """A template, and those that it includes."""
    text = (TEMPLATES / name).read_text()
    names = {name, *(other.name for other in TEMPLATES.glob("*.html") if f'"{other.name}"' in text)}
    return {f"fadeformer/reporting/templates/{one}" for one in names}


def imports_only(path: str) -> bool:
    """Whether a file is the `__init__.py` of a package, which re-exports names."""
    return path.endswith("/__init__.py")


def is_in(path: str, dependency: str) -> bool:
    return path == dependency or path.startswith(f"{dependency}/")


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def sections_of(module: str) -> set[str]:
    """Sections of params.yaml that a stage's module reads: attributes of what `params.load` returned."""
    known = {"seed", "dataset", "split", "validate_", "preprocess", "model", "augment", "train", "evaluate", "promote"}
    modules = (module, "train_worker") if module == "train" else (module,)  # a process of the training reads them again
    trees = [ast.parse((ROOT / "pipelines" / "stages" / f"{name}.py").read_text()) for name in modules]
    read = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr in known:
            value = node.value
            loaded = isinstance(value, ast.Call) and ast.unparse(value.func) == "schema.load_params"
            if loaded or (isinstance(value, ast.Name) and value.id in ("config", "wanted")):
                read.add(node.attr.removesuffix("_"))
    return read


def test_there_are_the_six_stages_of_the_design():
    assert tuple(DVC["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_command_runs_the_stage_of_that_name(stage):
    assert DVC["stages"][stage]["cmd"] == f"python -m pipelines {stage}"


def sources_and_listed(stage: str) -> tuple[set[str], set[str]]:
    """The sources that can change what a stage makes, and the files and packages that dvc.yaml lists for it."""
    sources = {path for path in sources_of(f"pipelines.stages.{stage}") - NO_INFLUENCE.keys() if not imports_only(path)}
    return sources, {path for path in DVC["stages"][stage]["deps"] if path.startswith(LOCAL)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_imported_source_is_a_dependency(stage):
    sources, listed = sources_and_listed(stage)
    assert {path for path in sources if not any(is_in(path, dependency) for dependency in listed)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_is_imported(stage):
    sources, listed = sources_and_listed(stage)
    assert {dependency for dependency in listed if not any(is_in(path, dependency) for path in sources)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_no_dependency_holds_sources_without_influence(stage):
    _, listed = sources_and_listed(stage)
    assert {path for path in NO_INFLUENCE if any(is_in(path, dependency) for dependency in listed)} == set()


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
