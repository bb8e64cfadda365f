"""Grids: data sets x networks x seeds, as a YAML file of overrides of params.yaml, and their runs."""

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
DATA_PLACEHOLDER = "{data}"  # in a value of a grid: the folder that --data names
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # part of the name of a DVC experiment


class GridDataset(ConfigModel):
    """One data set, with overrides of params.yaml."""

    title: str
    accuracy: Literal["accuracy", "balanced_accuracy"]  # which of them the tables show
    params: dict[str, Any]


class GridModel(ConfigModel):
    """One network; its overrides are of how it is built and trained."""

    title: str
    params: dict[str, Any]


class Grid(ConfigModel):
    """The whole. Of two overrides the later counts: preset, common, set, network."""

    preset: str | None
    common: dict[str, Any]
    reference: Slug
    seeds: Annotated[list[int], Field(min_length=1)]
    sets: Annotated[dict[Slug, GridDataset], Field(min_length=1)]
    networks: Annotated[dict[Slug, GridModel], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_models(self) -> Grid:
        if self.reference not in self.networks:
            raise ValueError(f"reference is {self.reference}, but the networks are {', '.join(self.networks)}")
        for name, network in self.networks.items():
            if other := network.params.keys() - {"model", "augment", "train"}:
                raise ValueError(f"networks.{name}.params changes {', '.join(sorted(other))}, but all share the images")
        return self


@dataclass(frozen=True)
class Cell:
    """One training: of a network on a set, from a seed."""

    dataset: str
    model: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}/{self.model}/{self.seed}"


def find_grid(name: str) -> Path:
    """Return the file of a grid: a path, or the name of one that is shipped."""
    shipped = GRIDS_FOLDER / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in GRIDS_FOLDER.glob("*.yaml")))
        raise UserError(f"{name}: no such grid; name a YAML file, or one of: {names}")
    return path


def load_grid(path: Path) -> Grid:
    """Read and check a grid."""
    return schema.validate_model(schema.read_yaml(path), Grid, str(path))


def iter_cells(grid: Grid) -> Iterator[Cell]:
    """All cells, set after set and seed after seed."""
    for images in grid.sets:
        for seed in grid.seeds:
            for network in grid.networks:
                yield Cell(images, network, seed)


def plan_runs(name: str, grid: Grid, data: Path | None) -> tuple[dict[str, PipelineRun], dict[Cell, PipelineRun]]:
    """Return the runs that prepare the images of each set, and those of the cells.

    A cell is trained again if the parameters that decide its training, or its data, have changed. Another version of
    the code is reported in the tables and is no reason: a comment would train the whole grid again.

    Args:
        name: of the grid.
        grid: its definition.
        data: what `{data}` in it stands for.

    Raises:
        UserError: the parameters of a set or a cell are not valid.
    """
    recipe = schema.read_yaml(presets.PRESET_FOLDER / f"{grid.preset}.yaml") if grid.preset else {}
    base = overrides.deep_merge(schema.load_params(paths.PARAMS).as_nested_dict(), recipe, grid.common)

    def run(key: str, until: str, sections: tuple[str, ...], *changes: Mapping[str, Any]) -> PipelineRun:
        values = _fill_placeholder(overrides.deep_merge(base, *changes), key, data)
        config = schema.parse_params(values, f"{paths.PARAMS} with the overrides of {key}")
        return PipelineRun(
            f"{name}-{key.replace('/', '-')}-{engine.params_digest(config, sections)}", config.as_nested_dict(), until
        )

    prepared = {
        name: run(name, "preprocess", engine.DATA_SECTIONS, images.params) for name, images in grid.sets.items()
    }
    trained = {}
    for cell in iter_cells(grid):
        changes = (grid.sets[cell.dataset].params, grid.networks[cell.model].params, {"seed": cell.seed})
        trained[cell] = run(str(cell), "evaluate", engine.TRAINING_SECTIONS, *changes)
    return prepared, trained


def _fill_placeholder(values: Mapping[str, Any], key: str, data: Path | None) -> Any:
    """The same with `{data}` replaced."""
    text = json.dumps(values, default=str)
    if DATA_PLACEHOLDER in text and data is None:
        raise UserError(f"{key} needs the folder of its files: give it with --data FOLDER")
    return json.loads(text.replace(DATA_PLACEHOLDER, json.dumps(str(data))[1:-1]))
