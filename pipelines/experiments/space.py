"""SPACE.yaml: what a sweep varies, how many trials it makes, and which of them are not worth their last epochs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field, ValidationError, model_validator

from fadeformer import params
from fadeformer.errors import UserError
from fadeformer.explain import explain
from fadeformer.params import Params, Section
from pipelines import overrides

AFTER_TRAINING = ("evaluate.", "promote.")  # sections that change nothing of a trial, which ends with its training
CHOICE = (bool, int, float, str, type(None))  # what Optuna takes for a choice
Kind = TypeVar("Kind", bound=Section)


class Range(Section):
    """Numbers from `low` to `high`, both included; whole ones where both are.

    Attributes:
        log: as likely from 0.001 to 0.01 as from 0.01 to 0.1.
        step: only low, low + step and so on.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}; high has to be the larger one")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}; with log it has to be above 0")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step is {self.step}; it has to be above 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))


class Sweep(Section):
    """What SPACE.yaml says; only `trials` and `space` have to be there.

    Attributes:
        name: of the sweep; else that of the file.
        trials: all in all, those that are stopped early and those that fail among them, but not those whose values
            were tried before.
        at_once: trials that run side by side.
        sampler: `tpe` learns from the trials before, `random` does not.
        pruner: `median` stops a trial whose best is worse than the median of the others at the same epoch.
        startup_trials: run to their end before one is stopped, and are drawn at random.
        warmup_epochs: of each trial in which it is not stopped.
        seed: of the sampler.
        fixed: keys of params.yaml that are the same in every trial, by dotted names.
        space: keys of params.yaml, and of each a list of values or a `Range`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    trials: Annotated[int, Field(ge=1)]
    at_once: Annotated[int, Field(ge=1)] = 1
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    startup_trials: Annotated[int, Field(ge=0)] = 5
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    seed: Annotated[int, Field(ge=0)] = 0
    fixed: dict[str, Any] = Field(default_factory=dict)
    space: Annotated[dict[str, Any], Field(min_length=1)]


def load(path: Path, present: Params) -> Sweep:
    """Reads and checks SPACE.yaml.

    Args:
        path: the file.
        present: params.yaml, to whose keys every end of a range and every choice must be allowed.

    Raises:
        UserError: it cannot be read, or has a key or value that is not allowed.
    """
    values = params.read(path)
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: must hold trials: and space:, but is empty or a list")
    called = path.stem.lower().replace("_", "-").replace(" ", "-")
    plan = _checked(Sweep, {"name": called, **values}, f"{path}: ")
    plan = plan.model_copy(update={"space": {key: _varied(key, of, path) for key, of in plan.space.items()}})
    for key in {**plan.fixed, **plan.space}:
        if key not in present.flat():
            near = difflib.get_close_matches(key, present.flat(), n=1)
            hint = f"did you mean {near[0]}?" if near else "such as train.learning_rate, with its section"
            raise UserError(f"{path}: params.yaml has no key {key}; {hint}")
    if both := plan.fixed.keys() & plan.space.keys():
        raise UserError(f"{path}: {', '.join(sorted(both))} stands in fixed and in space")
    for key, of_key in plan.space.items():
        for value in (of_key.low, of_key.high) if isinstance(of_key, Range) else of_key:
            try:
                values_of(present, {**plan.fixed, key: value})
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
    return plan


def metric_of(plan: Sweep, present: Params) -> tuple[str, Literal["maximize", "minimize"]]:
    """By which a trial is judged, and what is better: that by which its training chooses the epoch that it keeps."""
    monitor = plan.fixed.get("train.monitor", present.train.monitor)
    return f"val_{monitor}", "minimize" if monitor == "loss" else "maximize"


def values_of(present: Params, changes: Mapping[str, Any]) -> dict[str, Any]:
    """All of params.yaml with some keys changed, nested.

    Args:
        present: params.yaml.
        changes: by dotted names.

    Raises:
        UserError: the result would not be valid.
    """
    values = overrides.nested({**present.flat(), **changes})
    params.parse(values, "params.yaml")
    return values


def _varied(key: str, value: Any, path: Path) -> Range | list[Any]:
    if key.startswith(AFTER_TRAINING):
        raise UserError(f"{path}: space.{key} changes nothing in a trial, which ends with its training")
    if key == "train.monitor":
        raise UserError(f"{path}: space.{key} is what trials are compared by; it stands in fixed or in params.yaml")
    if isinstance(value, Mapping):
        return _checked(Range, value, f"{path}: space.{key}: ")
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, CHOICE) for one in value):
        return value
    raise UserError(
        f"{path}: space.{key} is {value!r}, but should be a list of two or more values, or a range such as"
        " {low: 0.0, high: 0.3}"
    )


def _checked(kind: type[Kind], values: Mapping[str, Any], prefix: str) -> Kind:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = explain(cast(list[Mapping[str, Any]], error.errors()), kind)
        raise UserError("\n".join(prefix + problem for problem in problems)) from error
