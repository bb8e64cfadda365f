"""Grids: data sets x networks x seeds, as a strict YAML file of overrides of params.yaml, and their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fadeformer import params
from fadeformer.errors import UserError
from fadeformer.explain import explain
from pipelines import overrides, paths, preset
from pipelines.experiments.engine import DATA as DATA_SECTIONS
from pipelines.experiments.engine import Listed, Run, digest

SHIPPED = Path(__file__).resolve().parent
DATA = "{data}"  # in a value of a grid: the folder that --data names
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # part of the name of a DVC experiment
Overrides: Any = overrides.partial(params.Params)


class Strict(BaseModel):
    """A part of a grid."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Images(Strict):
    """One data set; its overrides are of the sections that bring and prepare images, or of how they are trained on."""

    title: str
    accuracy: Literal["accuracy", "balanced_accuracy"]  # which of them is told
    params: Overrides


class Network(Strict):
    """One network; its overrides are of `model:`, or of how it is trained."""

    title: str
    params: Overrides


class Grid(Strict):
    """The whole. Of two overrides the later counts: preset, common, set, network."""

    preset: str | None
    common: Overrides
    reference: Name
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    sets: Annotated[dict[Name, Images], Field(min_length=1)]
    networks: Annotated[dict[Name, Network], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_known(self) -> Grid:
        if self.reference not in self.networks:
            raise ValueError(f"reference is {self.reference}, but the networks are {', '.join(self.networks)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice")
        if self.preset is not None and self.preset not in preset_names():
            raise ValueError(f"preset is {self.preset}; there are: {', '.join(preset_names())}")
        for name, images in self.sets.items():
            given = set(overrides.given(images.params)) & {"seed", "model"}
            if given:
                raise ValueError(f"sets.{name}.params changes {', '.join(sorted(given))}, which the cells say")
        for name, network in self.networks.items():
            given = set(overrides.given(network.params)) - {"model", "augment", "train"}
            if given:
                raise ValueError(f"networks.{name}.params changes {', '.join(sorted(given))}, but all share the images")
        return self


@dataclass(frozen=True)
class Cell:
    """One training: of a network on a set, from a seed."""

    images: str
    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.images}/{self.network}/{self.seed}"


def preset_names() -> list[str]:
    """The recipes of pipelines/presets."""
    return sorted(path.stem for path in preset.PRESETS.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a grid: a path, or the name of one that is shipped.

    Raises:
        UserError: there is none.
    """
    shipped = SHIPPED / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        raise UserError(f"{name}: no such grid; name a YAML file, or one of: {names}")
    return path


def load(path: Path) -> Grid:
    """Reads and checks a grid.

    Raises:
        UserError: it cannot be read, or names every wrong key by its full path.
    """
    try:
        values = YAML(typ="safe").load(path)
    except (OSError, YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: must hold a grid: {', '.join(Grid.model_fields)}")
    values = dict(values)
    kinds: dict[str, type[BaseModel]] = {"sets": Images, "networks": Network}
    for part, kind in kinds.items():
        if isinstance(values.get(part), Mapping):
            values[part] = {
                name: _checked(kind, value, f"{path}: in {part}.{name}") for name, value in values[part].items()
            }
    return cast(Grid, _checked(Grid, values, str(path)))


def _checked(kind: type[BaseModel], value: Any, where: str) -> BaseModel:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = explain(cast(list[Mapping[str, Any]], error.errors()), kind)
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems)) from error


def cells(grid: Grid) -> Iterator[Cell]:
    """All cells, set after set and seed after seed, so that the first tables come early."""
    for images in grid.sets:
        for seed in grid.seeds:
            for network in grid.networks:
                yield Cell(images, network, seed)


def plan(name: str, grid: Grid, data: Path | None, say: Callable[[str], None] = print) -> Listed:
    """The runs of a grid: the data stages once for each set, then each cell of it.

    A cell is trained again if the parameters that decide its training, or its data, have changed. Another version of
    the code is reported in the tables and is no reason: a comment would train the whole grid again.

    Args:
        name: of the grid.
        grid: its definition.
        data: what `{data}` in it stands for.
        say: prints a line.

    Raises:
        UserError: sets or cells have parameters that are not valid.
    """
    base = params.load(paths.PARAMS).nested()
    runs: dict[str, Run] = {}
    problems: list[str] = []
    for of in (*(Cell(images, "", 0) for images in grid.sets), *cells(grid)):
        network, seed = (of.network, of.seed) if of.network else (None, None)
        key = str(of) if of.network else of.images
        changed = _merged(base, changes(grid, of.images, network, seed, data))
        try:
            config = params.parse(changed, f"{paths.PARAMS} with the overrides of {key}")
        except UserError as error:
            problems.append(f"{key}: {error}")
            continue
        fingerprint = digest(config) if of.network else digest(config, DATA_SECTIONS)
        until = "evaluate" if of.network else "preprocess"
        runs[key] = Run(f"{name}-{key.replace('/', '-')}-{fingerprint}", config.nested(), until)
    if problems:
        raise UserError("\n".join(problems))
    return Listed(runs, {str(cell): cell.images for cell in cells(grid)}, say)


def changes(grid: Grid, images: str, network: str | None, seed: int | None, data: Path | None) -> dict[str, Any]:
    """Overrides of params.yaml for a set, and for a network and a seed on it.

    Args:
        grid: the whole.
        images: name of the set.
        network: name of the network; None for the data stages, which know of none.
        seed: of training; None likewise.
        data: what `{data}` stands for.

    Raises:
        UserError: the set needs `--data`, and it was not given.
    """
    recipe = YAML(typ="safe").load(preset.PRESETS / f"{grid.preset}.yaml") if grid.preset else {}
    layers = [recipe, overrides.given(grid.common), overrides.given(grid.sets[images].params)]
    if network is not None:
        layers.append(overrides.given(grid.networks[network].params))
    if seed is not None:
        layers.append({"seed": seed})
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer)
    return cast(dict[str, Any], _filled(merged, images, data))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if nested else value
    return found


def _filled(value: Any, images: str, data: Path | None) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(inner, images, data) for key, inner in value.items()}
    if isinstance(value, str) and DATA in value:
        if data is None:
            raise UserError(f"the set {images} needs the folder of its files: give it with --data FOLDER")
        return value.replace(DATA, str(data))
    return value
