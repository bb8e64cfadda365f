"""dvc.yaml lists the sources, parameters and outputs of each stage's module."""

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
OUTPUTS = "pipelines/paths.py"  # names HTML files that are outputs, not templates
# Sources that stages import and that cannot change their outputs.
NO_INFLUENCE = {
    "fadeformer/errors.py": "error types",
    "fadeformer/config/validation.py": "messages about errors in params.yaml",
    "fadeformer/config/schema.py": "has no defaults: all values are in params.yaml, whose sections are listed",
    "pipelines/environment.py": "where the tools keep their caches, and telemetry",
    "pipelines/tracking/resume.py": "which checkpoint a training resumes from; the result does not depend on it",
    "pipelines/tracking/journal.py": "logs epochs",
    "pipelines/tracking/relocate.py": "where MLflow's store has its files",
    "pipelines/server.py": "which Prefect server the flows report to",
    "pipelines/paths.py": "paths, which dvc.yaml lists itself",
    "pipelines/tracking/locations.py": "where downloads and MLflow's store are",
    "pipelines/stages/signals.py": "when a training is stopped; it resumes at the same batch",
    "pipelines/runner.py": "how errors are printed",
    "pipelines/tracking/store.py": "connects to MLflow",
    "pipelines/tracking/runs.py": "logs parameters, metrics and files",
}


def imported_sources(module: str) -> set[str]:
    """Return the files of this project that a module imports, directly or indirectly."""
    sources: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).resolve().relative_to(ROOT).as_posix()
        if path in sources:
            continue
        sources.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and str(node.value).endswith(
                ".py"
            ):  # a file that is given to MLflow by name
                names = [f"pipelines.registry.{str(node.value).removesuffix('.py')}"]
            elif isinstance(node, ast.Constant) and is_template(str(node.value)) and path != OUTPUTS:
                sources |= template_files(str(node.value))
            elif isinstance(node, ast.Constant) and node.value == Path(TABLE).name:
                sources.add(TABLE)
            pending += [imported for imported in names if imported.split(".")[0] in LOCAL and is_module(imported)]
    return sources


def is_template(name: str) -> bool:
    return name.endswith(".html") and (TEMPLATES / name).is_file()


def template_files(name: str) -> set[str]:
    """Return a template and those that it includes."""
    text = (TEMPLATES / name).read_text()
    names = {name, *(other.name for other in TEMPLATES.glob("*.html") if f'"{other.name}"' in text)}
    return {f"fadeformer/reporting/templates/{name}" for name in names}


def is_package_init(path: str) -> bool:
    """Return True for the `__init__.py` of a package that only re-exports names: it computes and defines nothing."""
    computes = ast.Call | ast.Subscript | ast.FunctionDef | ast.ClassDef
    return path.endswith("/__init__.py") and not any(
        isinstance(node, computes) for node in ast.walk(ast.parse((ROOT / path).read_text()))
    )


def is_in(path: str, dependency: str) -> bool:
    return path == dependency or path.startswith(f"{dependency}/")


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def sections_read(module: str) -> set[str]:
    """Return the sections of params.yaml that a stage reads: attributes of the result of `schema.load_params`."""
    keys = {"seed", "dataset", "split", "validate_", "preprocess", "model", "augment", "train", "evaluate", "promote"}
    modules = (module, "train_worker") if module == "train" else (module,)  # the training process also reads them
    trees = [ast.parse((ROOT / "pipelines" / "stages" / f"{name}.py").read_text()) for name in modules]
    read = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and node.attr in keys:
            value = node.value
            loaded = isinstance(value, ast.Call) and ast.unparse(value.func) == "schema.load_params"
            if loaded or (isinstance(value, ast.Name) and value.id == "config"):
                read.add(node.attr.removesuffix("_"))
    return read


def test_dvc_yaml_has_all_stages_in_order():
    assert tuple(DVC["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_command_runs_the_stage(stage):
    assert DVC["stages"][stage]["cmd"] == f"python -m pipelines {stage}"


def sources_and_listed(stage: str) -> tuple[set[str], set[str]]:
    """Return the sources that can change a stage's outputs, and the files and packages that dvc.yaml lists for it."""
    sources = {
        path
        for path in imported_sources(f"pipelines.stages.{stage}") - NO_INFLUENCE.keys()
        if not is_package_init(path)
    }
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
def test_no_dependency_contains_sources_without_influence(stage):
    _, listed = sources_and_listed(stage)
    assert {path for path in NO_INFLUENCE if any(is_in(path, dependency) for dependency in listed)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_the_stage_reads(stage):
    assert set(DVC["stages"][stage].get("params", [])) == sections_read(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_and_data_are_known_paths(stage):
    entry = DVC["stages"][stage]
    outs = [
        next(iter(out)) if isinstance(out, dict) else out for out in [*entry.get("outs", []), *entry.get("metrics", [])]
    ]
    data = [dep for dep in entry["deps"] if not dep.startswith(("${", "fadeformer/", "pipelines/"))]
    sections = {value.as_posix() for name, value in vars(paths).items() if name.isupper()}
    assert {*outs, *data} <= sections
    assert outs
