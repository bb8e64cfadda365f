"""Schema of params.yaml: frozen, strict pydantic models that reject unknown keys, wrong types and invalid values.

No key has a default, so params.yaml determines a run completely, and the sections listed for a stage in dvc.yaml are
its entire configuration.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fadeformer.config.validation import describe_errors
from fadeformer.errors import UserError

DatasetName = Literal[
    "phantom", "folder", "npz", "isic2019", "chestxray14",
    "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist",
    "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
Number = Annotated[float, BeforeValidator(lambda value: float(value) if type(value) is int else value)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Rate = Annotated[Number, Field(ge=0, lt=1)]
# one number or a list of numbers; parsed to a list
Prevalences = Annotated[
    list[Annotated[Number, Field(gt=0, lt=1)]], BeforeValidator(lambda v: [v] if type(v) in (int, float) else v)
]
# YAML 1.1, which some editors write, parses off as false
Severity = Annotated[Literal["stop", "warn", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
RENAMED_KEYS = {("evaluate", "bootstrap_draws"): "bootstrap_resamples"}  # former names that are still accepted
ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigModel(BaseModel):
    """Frozen and strict base model that forbids unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatasetParams(ConfigModel):
    """Dataset that the download stage fetches."""

    name: DatasetName
    size: Annotated[int, Field(ge=16, le=1024)]
    mirror: str | None
    edition: Literal["published", "other"]
    archives: Annotated[list[Annotated[int, Field(ge=1, le=12)]], Field(min_length=1)]
    root: Annotated[str, Field(min_length=1)]
    classes: list[str] | None
    pixel_range: Literal["ask", "auto"] | Annotated[list[Number], Field(min_length=2, max_length=2)]
    images: Annotated[int, Field(ge=200)]
    task: Literal["multi-class", "ordinal-regression", "multi-label, binary-class"] | None
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check_size_and_classes(self) -> DatasetParams:
        _refuse_home("dataset.root", self.root)
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("dataset.classes has a duplicate name")
        if isinstance(self.pixel_range, list) and self.pixel_range[0] >= self.pixel_range[1]:
            raise ValueError(f"dataset.pixel_range is {self.pixel_range}; it must be [minimum, maximum]")
        if self.name.endswith("mnist") and self.size not in (28, 64, 128, 224):
            raise ValueError(f"dataset.size is {self.size}; {self.name} is published at 28, 64, 128 and 224 pixels")
        return self


class SplitParams(ConfigModel):
    """Assignment of images to train, val and test."""

    adopted: Annotated[str, Field(min_length=1)]
    exclude: Annotated[str, Field(min_length=1)]
    group_from: str | None
    resplit: bool
    fractions: Annotated[list[Annotated[Number, Field(gt=0, lt=1)]], Field(min_length=3, max_length=3)]
    seed: Annotated[int, Field(ge=0)]

    @field_validator("group_from")
    @classmethod
    def _check_group_from(cls, value: str | None) -> str | None:
        try:
            groups = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"split.group_from is {value!r}, which is not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(
                f"split.group_from is {value!r}; put the part of the file name that is the patient in parentheses, such"
                r" as '^(person\d+)_', and use (?:...) for other parentheses"
            )
        return value

    @model_validator(mode="after")
    def _check_fractions(self) -> SplitParams:
        _refuse_home("split.adopted", self.adopted)
        _refuse_home("split.exclude", self.exclude)
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"split.fractions is {self.fractions}; the fractions of train, val and test must sum to 1")
        return self


class SeverityParams(ConfigModel):
    """Severity of each data validation check."""

    split_missing: Severity
    published_counts: Severity
    unreadable_image: Severity
    blank_image: Severity
    unexpected_mode: Severity
    unexpected_size: Severity
    colliding_names: Severity
    image_in_two_splits: Severity
    near_duplicate_in_two_splits: Severity
    group_in_two_splits: Severity
    patients_in_file_names: Severity
    same_image_two_labels: Severity
    near_duplicate_two_labels: Severity
    label_out_of_range: Severity
    class_missing: Severity
    class_too_small: Severity
    finding_without_images: Severity
    label_shift: Severity


class ValidateParams(ConfigModel):
    """Thresholds and severities of data validation."""

    max_cross_split_duplicates: Annotated[int, Field(ge=0)]
    near_duplicate_similarity: Annotated[Number, Field(gt=0, le=1)]
    min_per_class: Annotated[int, Field(ge=1)]
    max_label_shift: Fraction
    severity: SeverityParams


class PreprocessParams(ConfigModel):
    """Image arrays that training reads."""

    image_size: Annotated[int, Field(ge=16, le=1024)] | None
    channels: Literal[1, 3]
    aspect: Literal["squash", "crop", "pad"]
    threads: Annotated[int, Field(ge=1)] | None


class FadeParams(ConfigModel):
    """Fade layers; `K` and `alpha` are named as in the published implementation."""

    variant: Literal["published", "diffusion"]
    after_blocks: list[int | str]
    num_heads: Annotated[int, Field(ge=1)]
    dropout: Rate
    K: Annotated[int, Field(ge=0)]
    alpha: Number

    @model_validator(mode="after")
    def _check_after_blocks(self) -> FadeParams:
        blocks = ", ".join(map(str, self.after_blocks))
        is_valid = [block == "last" or (isinstance(block, int) and block >= 1) for block in self.after_blocks]
        if not is_valid or not all(is_valid):
            raise ValueError(f"model.fade.after_blocks is [{blocks}]; it must list block numbers from 1, or last")
        if self.variant == "published" and self.after_blocks != ["last"]:
            raise ValueError(
                f"model.fade.after_blocks is [{blocks}]; the published variant follows the last block: set [last]"
            )
        return self


class ModelParams(ConfigModel):
    """Model architecture and initial weights."""

    backbone: str
    pretrained: bool
    weights: Annotated[str, Field(min_length=1)]
    dropout: Rate
    drop_path: Rate
    head: Literal["auto", "cumulative"]
    normalize: Literal["backbone", "imagenet", "data"]
    fade: FadeParams | None

    @model_validator(mode="after")
    def _check_weights_path(self) -> ModelParams:
        _refuse_home("model.weights", self.weights)
        if PurePosixPath(self.weights).parts[:1] == ("models",):
            raise ValueError(
                f"model.weights is {self.weights}, but training recreates models/; copy the file elsewhere, such as to"
                " data/weights/"
            )
        return self


class AugmentParams(ConfigModel):
    """Data augmentation of training images."""

    horizontal_flip: Fraction | Literal["auto"]
    rotation: Annotated[Number, Field(ge=0, le=180)]
    scale: Rate
    translate: Rate
    border: Literal["zeros", "border", "reflection"]
    interpolation: Literal["nearest", "bilinear"]
    brightness: Fraction
    contrast: Fraction
    saturation: Fraction
    erasing: Fraction
    erasing_scale: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    randaugment_operations: Annotated[int, Field(ge=0, le=14)]
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)]
    mixup: Annotated[Number, Field(ge=0)]
    cutmix: Annotated[Number, Field(ge=0)]

    @model_validator(mode="after")
    def _check_erasing_scale(self) -> AugmentParams:
        low, high = self.erasing_scale
        if low > high:
            raise ValueError(f"augment.erasing_scale is [{low}, {high}]; the smaller fraction comes first")
        return self


class TrainParams(ConfigModel):
    """Training hyperparameters and hardware."""

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)]
    optimizer: str
    learning_rate: Annotated[Number, Field(gt=0)]
    weight_decay: Annotated[Number, Field(ge=0)]
    layer_decay: Annotated[Number, Field(gt=0, le=1)]
    schedule: Literal["cosine", "plateau", "constant"]
    warmup_epochs: Annotated[Number, Field(ge=0)]
    plateau_factor: Annotated[Number, Field(gt=0, lt=1)]
    plateau_patience: Annotated[int, Field(ge=0)]
    probe_epochs: Annotated[int, Field(ge=0)]
    label_smoothing: Rate
    clip: Annotated[Number, Field(gt=0)] | None
    ema: Rate
    monitor: Literal["loss", "accuracy", "auc"]
    early_stopping_patience: Annotated[int, Field(ge=1)]
    sampling: Literal["weighted", "uniform"]
    class_weights: Literal["none", "auto"] | dict[str, Annotated[Number, Field(ge=0)]]
    focal_gamma: Annotated[Number, Field(ge=0)]
    calibrate: bool
    precision: Literal["auto", 32, "bf16", 16]
    device: Literal["auto", "cpu", "cuda"]
    devices: Literal["auto"] | Annotated[int, Field(ge=1)]
    checkpoint_minutes: Annotated[Number, Field(gt=0)]

    @model_validator(mode="after")
    def _check_epochs(self) -> TrainParams:
        if self.probe_epochs + self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"train.probe_epochs ({self.probe_epochs}) and train.warmup_epochs ({self.warmup_epochs:g}) leave"
                f" no epoch of train.epochs ({self.epochs})"
            )
        return self


class EvaluateParams(ConfigModel):
    """Predictions, metrics, confidence intervals and figures."""

    batch_size: Annotated[int, Field(ge=1)]
    figure_dpi: Annotated[int, Field(ge=50, le=600)]
    confidence: Annotated[Number, Field(ge=0.5, le=0.999)]
    bootstrap_resamples: Annotated[int, Field(ge=100, le=100_000)]
    bootstrap_seed: Annotated[int, Field(ge=0)]
    sensitivity_at_least: Fraction
    specificity_at_least: Fraction
    prevalence: Prevalences | dict[str, Prevalences] | None
    subgroups: Literal["auto"] | list[str]
    age_bands: list[Number]

    @field_validator("age_bands")
    @classmethod
    def _check_age_bands(cls, value: list[float]) -> list[float]:
        if not value or any(after <= before for before, after in itertools.pairwise(value)):
            raise ValueError("evaluate.age_bands must be increasing, such as [0, 18, 40, 60, 80]")
        return value


class PromoteParams(ConfigModel):
    """Model registry and promotion rules."""

    # characters that MLflow allows, without quotes
    model_name: Annotated[str, Field(pattern=r"^([\w .-]|\{dataset\})+$")]
    min_auc: Fraction
    min_class_auc: Fraction | None
    min_subgroup_auc: Fraction | dict[str, Fraction] | None
    min_cases: Annotated[int, Field(ge=1)]
    max_ece: Fraction | None
    operating_point: Literal["youden", "sensitivity", "specificity"]
    min_sensitivity: Fraction | None
    margin: Fraction
    class_margin: Fraction | None
    recall_margin: Fraction | None
    min_gain: Fraction | None
    not_assessed: Literal["refuse", "allow"]


class Params(ConfigModel):
    """All sections of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    dataset: DatasetParams
    split: SplitParams
    validate_: Annotated[ValidateParams, Field(alias="validate")]
    preprocess: PreprocessParams
    model: ModelParams
    augment: AugmentParams
    train: TrainParams
    evaluate: EvaluateParams
    promote: PromoteParams

    def as_nested_dict(self) -> dict[str, Any]:
        """Convert to nested dictionaries with the keys of params.yaml."""
        return self.model_dump(by_alias=True)

    def as_flat_dict(self) -> dict[str, Any]:
        """Convert to one flat dictionary with dotted keys such as `train.learning_rate`."""
        return _flatten(self.as_nested_dict(), "")


def _refuse_home(key: str, value: str) -> None:
    """Refuse a path with ~, which DVC takes literally where the file is a dependency."""
    if value.startswith("~"):
        raise ValueError(f"{key} is {value}, but DVC does not expand ~; write {Path(value).expanduser()}")


def load_params(path: Path) -> Params:
    """Read and validate params.yaml.

    Raises:
        UserError: the file is missing, is not valid YAML, or contains an invalid key or value.
    """
    return parse_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file into plain Python values; raises UserError if it is missing or not valid YAML."""
    try:
        return YAML(typ="safe").load(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the project's folder") from error
    except YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from error


def parse_params(values: Any, source: str) -> Params:
    """Validate plain values against the schema of params.yaml.

    Args:
        values: nested dictionaries as read from YAML.
        source: name of the file in error messages.

    Raises:
        UserError: lists every invalid key by its full path, with the closest valid key.
    """
    return validate_model(_rename_former_keys(values, source), Params, source)


def _rename_former_keys(values: Any, source: str) -> Any:
    """Return the values with former key names replaced; warns about each of them."""
    for (section, former), name in RENAMED_KEYS.items():
        if isinstance(values, Mapping) and isinstance(values.get(section), Mapping) and former in values[section]:
            warnings.warn(f"{source}: {section}.{former} is now called {section}.{name}; rename it", FutureWarning, 2)
            rest = {key: value for key, value in values[section].items() if key != former}
            values = {**values, section: {**rest, name: values[section][former]}}
    return values


def validate_model(values: Any, model: type[ModelT], source: str) -> ModelT:
    """Validate plain values against any `ConfigModel`, such as the schema of another YAML file; as `parse_params`."""
    if not isinstance(values, Mapping):
        names = ", ".join(field.alias or name for name, field in model.model_fields.items())
        raise UserError(f"{source}: must be a mapping with the keys {names}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = describe_errors(cast(list[Mapping[str, Any]], error.errors()), model)
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems)) from error


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
