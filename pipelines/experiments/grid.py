"""Grids: data sets x networks x seeds, as a YAML file of overrides of params.yaml, and their runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fadeformer.config import schema
from fadeformer.config.schema import Section
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.config import overrides, presets
from pipelines.experiments import engine
from pipelines.experiments.engine import Run

SHIPPED = Path(__file__).resolve().parent
DATA = "{data}"  # in a value of a grid: the folder that --data names
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # part of the name of a DVC experiment


class Images(Section):
    """One data set, with overrides of params.yaml."""

    title: str
    accuracy: Literal["accuracy", "balanced_accuracy"]  # which of them the tables show
    params: dict[str, Any]


class Network(Section):
    """One network; its overrides are of how it is built and trained."""

    title: str
    params: dict[str, Any]


class Grid(Section):
    """The whole. Of two overrides the later counts: preset, common, set, network."""

    preset: str | None
    common: dict[str, Any]
    reference: Name
    seeds: Annotated[list[int], Field(min_length=1)]
    sets: Annotated[dict[Name, Images], Field(min_length=1)]
    networks: Annotated[dict[Name, Network], Field(min_length=1)]

    @model_validator(mode="after")
    def _networks_can_be_compared(self) -> Grid:
        if self.reference not in self.networks:
            raise ValueError(f"reference is {self.reference}, but the networks are {', '.join(self.networks)}")
        for name, network in self.networks.items():
            if other := network.params.keys() - {"model", "augment", "train"}:
                raise ValueError(f"networks.{name}.params changes {', '.join(sorted(other))}, but all share the images")
        return self


@dataclass(frozen=True)
class Cell:
    """One training: of a network on a set, from a seed."""

    images: str
    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.images}/{self.network}/{self.seed}"


def find(name: str) -> Path:
    """Return the file of a grid: a path, or the name of one that is shipped."""
    shipped = SHIPPED / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        raise UserError(f"{name}: no such grid; name a YAML file, or one of: {names}")
    return path


def load(path: Path) -> Grid:
    """Read and check a grid."""
    return schema.checked(schema.read(path), Grid, str(path))


def cells(grid: Grid) -> Iterator[Cell]:
    """All cells, set after set and seed after seed."""
    for images in grid.sets:
        for seed in grid.seeds:
            for network in grid.networks:
                yield Cell(images, network, seed)


def runs(name: str, grid: Grid, data: Path | None) -> tuple[dict[str, Run], dict[Cell, Run]]:
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
    recipe = schema.read(presets.PRESETS / f"{grid.preset}.yaml") if grid.preset else {}
    base = overrides.merged(schema.load(paths.PARAMS).nested(), recipe, grid.common)

    def run(key: str, until: str, sections: tuple[str, ...], *changes: Mapping[str, Any]) -> Run:
        values = _filled(overrides.merged(base, *changes), key, data)
        config = schema.parse(values, f"{paths.PARAMS} with the overrides of {key}")
        return Run(f"{name}-{key.replace('/', '-')}-{engine.digest(config, sections)}", config.nested(), until)

    prepared = {name: run(name, "preprocess", engine.DATA, images.params) for name, images in grid.sets.items()}
    trained = {}
    for cell in cells(grid):
        changes = (grid.sets[cell.images].params, grid.networks[cell.network].params, {"seed": cell.seed})
        trained[cell] = run(str(cell), "evaluate", engine.TRAINING, *changes)
    return prepared, trained


def _filled(values: Mapping[str, Any], key: str, data: Path | None) -> Any:
    """The same with `{data}` replaced."""
    text = json.dumps(values, default=str)
    if DATA in text and data is None:
        raise UserError(f"{key} needs the folder of its files: give it with --data FOLDER")
    return json.loads(text.replace(DATA, json.dumps(str(data))[1:-1]))
