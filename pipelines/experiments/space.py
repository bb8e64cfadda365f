"""Search space of a sweep (SPACE.yaml): varied keys, number of trials, sampler and early stopping of trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field

from fadeformer.config import schema
from fadeformer.config.schema import ConfigModel, Params
from fadeformer.errors import UserError
from pipelines.config import overrides

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
POST_TRAINING_SECTIONS = ("evaluate.", "promote.")  # no effect on a trial, which stops after training


class SweepConfig(ConfigModel):
    """Content of SPACE.yaml; only `trials` and `space` are required.

    Attributes:
        name: Name of the sweep; by default the name of the file.
        trials: Number of trials, including pruned and failed ones, but not those that repeat the values of another.
        parallel_trials: Maximum number of parallel trials.
        sampler: `tpe` uses the results of previous trials, `random` does not.
        pruner: `median` stops a trial whose best value is worse than the median of the others at the same epoch.
        startup_trials: Number of trials with random values that run to completion before trials are pruned.
        warmup_epochs: Epochs of each trial before it can be pruned.
        seed: Seed of the sampler.
        fixed: Dotted keys of params.yaml with one value for all trials.
        space: Dotted keys of params.yaml, each with a list of values or the arguments of an Optuna distribution.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    trials: Annotated[int, Field(ge=1)]
    parallel_trials: Annotated[int, Field(ge=1)] = 1
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "none"] = "median"
    startup_trials: Annotated[int, Field(ge=0)] = 5
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    seed: Annotated[int, Field(ge=0)] = 0
    fixed: dict[str, Any] = Field(default_factory=dict)
    space: Annotated[dict[str, Any], Field(min_length=1)]


def load_sweep_config(path: Path, base: Params) -> SweepConfig:
    """Read and validate SPACE.yaml.

    Args:
        path: The file.
        base: Content of params.yaml; every bound of a range and every choice must be valid in it.

    Raises:
        UserError: The file is not valid.
    """
    values = schema.read_yaml(path)
    if isinstance(values, Mapping):
        values = {"name": path.stem.lower().replace("_", "-").replace(" ", "-"), **values}
    config = schema.validate_model(values, SweepConfig, str(path))
    for key, definition in config.space.items():
        if key.startswith(POST_TRAINING_SECTIONS):
            raise UserError(f"{path}: space.{key} has no effect on a trial, which stops after training")
        if key == "train.monitor":
            raise UserError(
                f"{path}: space.{key} cannot vary, because trials are compared by it; set it in fixed or in params.yaml"
            )
        try:
            distribution = parse_distribution(definition)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: space.{key} is {definition!r}, but should be a list of two or more values, or a range such as"
                f" {{low: 1.0e-4, high: 0.1, log: true}} ({error})"
            ) from error
        if isinstance(distribution, CategoricalDistribution):
            values_to_check: tuple[Any, ...] = distribution.choices
        else:
            values_to_check = (distribution.low, distribution.high)
        for value in values_to_check:
            params_with_overrides(base, {**config.fixed, key: value}, str(path))
    return config


def parse_distribution(definition: Any) -> Distribution:
    """Create the Optuna distribution of a key; an integer one if its bounds and step are integers.

    Raises:
        TypeError, ValueError: The definition is not valid.
    """
    if isinstance(definition, list):
        if len(definition) < 2 or not all(isinstance(value, bool | int | float | str | None) for value in definition):
            raise ValueError("not a list of two or more numbers, strings, true, false or null")
        return CategoricalDistribution(definition)
    numbers = [definition[name] for name in ("low", "high", "step") if name in definition]
    is_integer = all(isinstance(number, int) for number in numbers)
    return (IntDistribution if is_integer else FloatDistribution)(**definition)


def objective_of(config: SweepConfig, base: Params) -> tuple[str, Literal["maximize", "minimize"]]:
    """Return the metric and direction that rank trials: the metric by which training selects its best epoch."""
    monitor = config.fixed.get("train.monitor", base.train.monitor)
    return f"val_{monitor}", "minimize" if monitor == "loss" else "maximize"


def params_with_overrides(base: Params, changes: Mapping[str, Any], source: str = "params.yaml") -> dict[str, Any]:
    """Return all of params.yaml, nested, with some keys overridden.

    Args:
        base: Content of params.yaml.
        changes: Values by dotted keys.
        source: Origin of the changes, for error messages.

    Raises:
        UserError: The result is not valid.
    """
    values = overrides.deep_merge(
        base.as_nested_dict(), *(overrides.unflatten({key: value}) for key, value in changes.items())
    )
    schema.parse_params(values, source)
    return values
