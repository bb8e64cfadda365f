"""Grid definition: datasets x models x seeds, in a YAML file with overrides of params.yaml, and the runs of a grid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fadeformer.config import schema
from fadeformer.config.schema import ConfigModel
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.config import overrides, presets
from pipelines.experiments import engine
from pipelines.experiments.engine import PipelineRun

GRIDS_FOLDER = Path(__file__).resolve().parent
DATA_PLACEHOLDER = "{data}"  # in the values of a grid: stands for the folder of the option --data
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # becomes a part of the DVC experiment's name


class GridDataset(ConfigModel):
    """One dataset, with overrides of params.yaml."""

    title: str
    accuracy: Literal["accuracy", "balanced_accuracy"]  # the one that the tables show
    params: dict[str, Any]


class GridModel(ConfigModel):
    """One model, with overrides of its architecture, augmentation and training."""

    title: str
    params: dict[str, Any]


class Grid(ConfigModel):
    """A grid file. Later overrides win: preset, common, dataset, model."""

    preset: str | None
    common: dict[str, Any]
    reference: Slug
    seeds: Annotated[list[int], Field(min_length=1)]
    datasets: Annotated[dict[Slug, GridDataset], Field(min_length=1)]
    models: Annotated[dict[Slug, GridModel], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_models(self) -> Grid:
        if self.reference not in self.models:
            raise ValueError(f"reference is {self.reference}, but the models are {', '.join(self.models)}")
        for name, model in self.models.items():
            if other := model.params.keys() - {"model", "augment", "train"}:
                raise ValueError(
                    f"models.{name}.params changes {', '.join(sorted(other))}, but all models must get the same images"
                )
        return self


@dataclass(frozen=True)
class Cell:
    """One training run: a model on a dataset with a seed."""

    dataset: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}/{self.model}/{self.seed}"


def find_grid(name: str) -> Path:
    """Return the file of a grid, given its path or the name of an included grid."""
    included = GRIDS_FOLDER / f"{name}.yaml"
    path = included if included.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in GRIDS_FOLDER.glob("*.yaml")))
        raise UserError(f"{name}: no such grid; give a YAML file, or one of: {names}")
    return path


def load_grid(path: Path) -> Grid:
    """Read and validate a grid file."""
    return schema.validate_model(schema.read_yaml(path), Grid, str(path))


def iter_cells(grid: Grid) -> Iterator[Cell]:
    """Iterate over all cells: dataset by dataset, in it seed by seed, in it model by model."""
    for dataset in grid.datasets:
        for seed in grid.seeds:
            for model in grid.models:
                yield Cell(dataset, model, seed)


def plan_runs(name: str, grid: Grid, data: Path | None) -> tuple[dict[str, PipelineRun], dict[Cell, PipelineRun]]:
    """Return the runs that preprocess each dataset, and the runs of the cells.

    A cell is trained again if its parameters or its data have changed. A new version of the code does not train it
    again, because every changed comment would; the tables report the version instead.

    Args:
        name: Name of the grid.
        grid: Definition of the grid.
        data: Folder that replaces `{data}` in the grid.

    Raises:
        UserError: The parameters of a dataset or a cell are not valid.
    """
    recipe = schema.read_yaml(presets.PRESET_FOLDER / f"{grid.preset}.yaml") if grid.preset else {}
    base = overrides.deep_merge(schema.load_params(paths.PARAMS).as_nested_dict(), recipe, grid.common)

    def create_run(key: str, last_stage: str, sections: tuple[str, ...], *changes: Mapping[str, Any]) -> PipelineRun:
        values = _fill_placeholder(overrides.deep_merge(base, *changes), key, data)
        config = schema.parse_params(values, f"{paths.PARAMS} with the overrides of {key}")
        digest = engine.params_digest(config, sections)
        return PipelineRun(f"{name}-{key.replace('/', '-')}-{digest}", config.as_nested_dict(), last_stage)

    preprocessing = {
        key: create_run(key, "preprocess", engine.DATA_SECTIONS, dataset.params)
        for key, dataset in grid.datasets.items()
    }
    training = {}
    for cell in iter_cells(grid):
        changes = (grid.datasets[cell.dataset].params, grid.models[cell.model].params, {"seed": cell.seed})
        training[cell] = create_run(str(cell), "evaluate", engine.TRAINING_SECTIONS, *changes)
    return preprocessing, training


def _fill_placeholder(values: Mapping[str, Any], key: str, data: Path | None) -> Any:
    """Replace `{data}` in nested values."""
    text = json.dumps(values, default=str)
    if DATA_PLACEHOLDER in text and data is None:
        raise UserError(f"{key} needs the folder with its files; add --data FOLDER")
    return json.loads(text.replace(DATA_PLACEHOLDER, json.dumps(str(data))[1:-1]))
