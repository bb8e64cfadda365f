"""The Great Expectations suite that a manifest must pass, and its Data Docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd

from fadeformer.data import manifest
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import Manifest
from pipelines.validation import columns

GX_SEVERITIES = {"stop": "critical", "warn": "warning"}  # from `validate.severity` to Great Expectations
# Columns with one value per split: no single row offends an expectation on them.
SPLIT_COLUMNS = {"images_in_split", "label_shift"}


@dataclass(frozen=True)
class Check:
    """Outcome of one expectation.

    Attributes:
        name: Name of the check, a key of `validate.severity`.
        severity: `stop` or `warn`.
        description: The expectation in words.
        passed: Whether the data meet it.
        rows: Rows of the manifest that do not.
    """

    name: str
    severity: str
    description: str
    passed: bool
    rows: pd.DataFrame

    @property
    def is_blocking(self) -> bool:
        """Return True if the check failed and its severity is `stop`."""
        return not self.passed and self.severity == "stop"


def validate_manifest(
    data: Manifest,
    card: DatasetCard,
    *,
    severity: Mapping[str, str],
    allowed_duplicates: int,
    min_per_class: int,
    max_label_shift: float,
    folder: Path,
) -> list[Check]:
    """Run the suite on a manifest and write Data Docs to `folder`, with index.html as start page.

    Args:
        data: The manifest.
        card: The dataset card.
        severity: `stop`, `warn` or `off` for each check, by name.
        allowed_duplicates: Number of images that may be in two splits.
        min_per_class: Images of each class, or positives and negatives of each finding, that every split needs.
        max_label_shift: Largest Jensen-Shannon divergence of the labels of val and test from those of train, bits.
        folder: Folder for the Data Docs.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]  # a dict works
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": store}
    context.add_data_docs_site(site_name="validation", site_config=site)  # type: ignore[arg-type]  # a dict works
    asset = context.data_sources.add_pandas(card.name).add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("every image")
    suite = context.suites.add(gx.ExpectationSuite("manifest"))
    table = columns.add_derived_columns(data, card)
    counts = card.counts or {}
    if counts and not data.is_published_split:
        counts = {"all": counts.get("all", sum(counts.values())) - data.excluded}
    for name, expectation, settings in _build_expectations(
        table, card, counts, allowed_duplicates, min_per_class, max_label_shift
    ):
        if severity[name] != "off":
            suite.add_expectation(expectation(**settings, severity=GX_SEVERITIES[severity[name]], meta={"check": name}))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="manifest", data=batch, suite=suite))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="manifest",
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["validation"])],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
        )
    )
    identity = gx.RunIdentifier(run_name=card.name)
    run_result = checkpoint.run(batch_parameters={"dataframe": table}, run_id=identity)
    (outcome,) = run_result.run_results.values()
    return [_to_check(result, data, card, severity) for result in outcome.results]


ExpectationSpec = tuple[str, Any, dict[str, Any]]  # name of the check, class of the expectation, its arguments


def _build_expectations(
    table: pd.DataFrame,
    card: DatasetCard,
    counts: Mapping[str, int],
    allowed_duplicates: int,
    min_per_class: int,
    max_label_shift: float,
) -> Iterator[ExpectationSpec]:
    description = "train, val and test each have images"
    yield _expectation(
        "split_missing", gxe.ExpectColumnDistinctValuesToEqualSet, "used_in", description, value_set=list(SPLITS)
    )
    yield from _file_expectations(card, counts)
    yield from _leakage_expectations(table, allowed_duplicates)
    yield from _label_expectations(table, card, min_per_class)
    for split in SPLITS[1:]:
        description = f"the labels of {split} diverge by no more than {max_label_shift} bits from those of train"
        yield _between(
            "label_shift", "label_shift", description, max_value=max_label_shift, **_row_condition("used_in", [split])
        )


def _file_expectations(card: DatasetCard, counts: Mapping[str, int]) -> Iterator[ExpectationSpec]:
    names = {"train_val": "train and val together", "all": "the data set"}
    for part, count in counts.items():
        where = {} if part == "all" else _row_condition("split", SPLITS[:2] if part == "train_val" else [part])
        column = "images_in_split" if part in SPLITS else f"images_in_{part}"
        yield _in_set(
            "published_counts", column, [count], f"{names.get(part, part)} has the published {count:,} images", **where
        )
    yield _expectation("unreadable_image", gxe.ExpectColumnValuesToBeNull, "problem", "every image can be read")
    yield _between("blank_image", "contrast", "no image is blank", min_value=0, strict_min=True)
    description = "no two file names differ only in case or Unicode normalization"
    yield _in_set("colliding_names", "collides", [False], description)
    if card.channels is not None:
        mode = "RGB" if card.channels == 3 else "L"
        yield _in_set("unexpected_mode", "mode", [mode], f"every image is {mode}")
    if card.size is not None:
        for side in ("height", "width"):
            yield _in_set("unexpected_size", side, [card.size], f"every image has a {side} of {card.size} pixels")


def _leakage_expectations(table: pd.DataFrame, allowed_duplicates: int) -> Iterator[ExpectationSpec]:
    leaks = int(table["leaked"].sum())
    # Great Expectations has a minimum fraction of valid rows: either all duplicates are allowed, or none.
    valid_fraction = (len(table) - leaks) / len(table) if leaks <= allowed_duplicates else 1.0
    relaxed = f" (up to {allowed_duplicates} may: validate.max_cross_split_duplicates)" if allowed_duplicates else ""
    description = f"no image is in two splits{relaxed}"
    yield _in_set("image_in_two_splits", "leaked", [False], description, mostly=valid_fraction)
    description = "no image has a near-duplicate in another split"
    yield _in_set("near_duplicate_in_two_splits", "near_leaked", [False], description)
    if table["group"].notna().any():  # without known groups the check would pass trivially
        description = "no group (patient, lesion, slide) is in two splits"
        yield _between("group_in_two_splits", "splits_of_group", description, max_value=1)
    if table["stem_in_two_splits"].any():
        description = "no patient is in two splits by the file names"
        yield _in_set("patients_in_file_names", "stem_in_two_splits", [False], description)
    description = "exact duplicates have the same label"
    yield _between("same_image_two_labels", "labels_of_image", description, max_value=1)
    description = "near-duplicates have the same label"
    yield _in_set("near_duplicate_two_labels", "near_other_label", [False], description)


def _label_expectations(table: pd.DataFrame, card: DatasetCard, min_per_class: int) -> Iterator[ExpectationSpec]:
    multi_label = card.task_spec.multi_label
    values = [0, 1] if multi_label else list(range(len(card.classes)))
    for column, finding in zip(card.task_spec.label_columns(len(card.classes)), card.classes, strict=False):
        label_name = f"label {finding}" if multi_label else "label"
        yield _expectation(
            "label_out_of_range", gxe.ExpectColumnValuesToNotBeNull, column, f"every image has a {label_name}"
        )
        yield _in_set("label_out_of_range", column, values, f"every {label_name} is from 0 to {values[-1]}")
        for split in SPLITS:
            labels = table.loc[table["used_in"] == split, column]
            if multi_label:
                yield from _finding_expectations(finding, split, labels, min_per_class)
            else:
                missing = [card.classes[value] for value in values if value not in set(labels)]
                description = f"every class is in {split}" + (f": it has no {', '.join(missing)}" if missing else "")
                expectation, where = gxe.ExpectColumnDistinctValuesToContainSet, _row_condition("used_in", [split])
                yield _expectation("class_missing", expectation, column, description, value_set=values, **where)
    if not multi_label and min_per_class > 1:
        description = f"every class has {min_per_class} or more images in each split"
        yield _between("class_too_small", "images_of_class", description, min_value=min_per_class)


def _finding_expectations(finding: str, split: str, labels: pd.Series, min_count: int) -> Iterator[ExpectationSpec]:
    """Yield the expectations that a split has enough images with and without a finding."""
    for how, value, limits in (
        ("with", 1, {"min_value": min_count}),
        ("without", 0, {"max_value": len(labels) - min_count}),
    ):
        count = int((labels == value).sum())
        description = f"{split} has {min_count:,} or more images {how} {finding} (it has {count:,})"
        expectation, where = gxe.ExpectColumnSumToBeBetween, _row_condition("used_in", [split])
        yield _expectation("finding_without_images", expectation, str(labels.name), description, **limits, **where)


def _expectation(check: str, expectation: Any, column: str, description: str, **settings: Any) -> ExpectationSpec:
    return check, expectation, {"column": column, "description": description, **settings}


def _in_set(check: str, column: str, values: list[Any], description: str, **settings: Any) -> ExpectationSpec:
    return _expectation(check, gxe.ExpectColumnValuesToBeInSet, column, description, value_set=values, **settings)


def _between(check: str, column: str, description: str, **settings: Any) -> ExpectationSpec:
    return _expectation(check, gxe.ExpectColumnValuesToBeBetween, column, description, **settings)


def _row_condition(column: str, values: Any) -> dict[str, str]:
    return {"row_condition": f"{column} in {list(values)}", "condition_parser": "pandas"}


def _to_check(result: Any, data: Manifest, card: DatasetCard, severity: Mapping[str, str]) -> Check:
    config = result.expectation_config
    name, description, rows = config.meta["check"], config.description, data.rows
    if result.exception_info.get("raised_exception"):
        raise RuntimeError(
            f"great-expectations failed at {description!r}: {result.exception_info['exception_message']}"
        )
    missing = result.result.get("partial_missing_list")
    if missing and name == "split_missing":
        description += f": missing {', '.join(str(value) for value in missing)}"
    if name == "patients_in_file_names" and data.name_pattern is not None:
        description += f", but {data.name_pattern.stems:,} of {data.name_pattern.pattern} are"
    ids = {entry["id"] for entry in result.result.get("unexpected_index_list") or []}
    offending_rows = rows[rows["id"].isin(ids)]
    column = config.kwargs["column"]
    if column == "leaked":  # all copies, not only the one that is marked
        offending_rows = manifest.cross_split_duplicates(rows)
    elif column in SPLIT_COLUMNS or column.startswith("images_in_"):
        offending_rows = rows.head(0)
        if not result.success:
            value = result.result["partial_unexpected_list"][0]
            description += f", but by {value:.3f}" if column == "label_shift" else f", but there are {value:,}"
    return Check(
        name, severity[name], description, bool(result.success), offending_rows.assign(expectation=description)
    )
