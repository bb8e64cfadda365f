"""SPACE.yaml: what a sweep varies, how many trials it makes, and which of them are not worth their last epochs."""

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
POST_TRAINING_SECTIONS = (
    "evaluate.",
    "promote.",
)  # sections that change nothing of a trial, which ends with its training


class SweepConfig(ConfigModel):
    """What SPACE.yaml says; only `trials` and `space` are required.

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
        space: keys of params.yaml, and of each a list of values, or the arguments of a distribution of Optuna.
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


def load_sweep_config(path: Path, present: Params) -> SweepConfig:
    """Read and check SPACE.yaml.

    Args:
        path: the file.
        present: params.yaml, in which every end of a range and every choice must be valid.
    """
    values = schema.read_yaml(path)
    if isinstance(values, Mapping):
        values = {"name": path.stem.lower().replace("_", "-").replace(" ", "-"), **values}
    plan = schema.validate_model(values, SweepConfig, str(path))
    for key, of_key in plan.space.items():
        if key.startswith(POST_TRAINING_SECTIONS):
            raise UserError(f"{path}: space.{key} changes nothing in a trial, which ends with its training")
        if key == "train.monitor":
            raise UserError(f"{path}: space.{key} is what trials are compared by; set it in fixed or in params.yaml")
        try:
            found = parse_distribution(of_key)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: space.{key} is {of_key!r}, but should be a list of two or more values, or a range such as"
                f" {{low: 1.0e-4, high: 0.1, log: true}} ({error})"
            ) from error
        for value in found.choices if isinstance(found, CategoricalDistribution) else (found.low, found.high):
            params_with_overrides(present, {**plan.fixed, key: value}, str(path))
    return plan


def parse_distribution(of_key: Any) -> Distribution:
    """The distribution of Optuna for a key: of whole numbers where its ends and step are.

    Raises:
        TypeError, ValueError: there is none.
    """
    if isinstance(of_key, list):
        if len(of_key) < 2 or not all(isinstance(one, bool | int | float | str | None) for one in of_key):
            raise ValueError("not a list of two or more numbers, texts, true, false or null")
        return CategoricalDistribution(of_key)
    numbers = [of_key[name] for name in ("low", "high", "step") if name in of_key]
    return (IntDistribution if all(isinstance(one, int) for one in numbers) else FloatDistribution)(**of_key)


def objective_of(plan: SweepConfig, present: Params) -> tuple[str, Literal["maximize", "minimize"]]:
    """By which a trial is judged, and what is better: that by which its training chooses the epoch that it keeps."""
    monitor = plan.fixed.get("train.monitor", present.train.monitor)
    return f"val_{monitor}", "minimize" if monitor == "loss" else "maximize"


def params_with_overrides(present: Params, changes: Mapping[str, Any], source: str = "params.yaml") -> dict[str, Any]:
    """All of params.yaml with some keys changed, nested.

    Args:
        present: params.yaml.
        changes: by dotted names.
        source: of the changes, for the message.

    Raises:
        UserError: the result would not be valid.
    """
    values = overrides.deep_merge(
        present.as_nested_dict(), *(overrides.unflatten({key: value}) for key, value in changes.items())
    )
    schema.parse_params(values, source)
    return values
