"""The great-expectations suite that a manifest must pass, and its Data Docs."""

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

GX_SEVERITIES = {"stop": "critical", "warn": "warning"}  # ours, and great-expectations' names for them
SPLIT_COLUMNS = {
    "images_in_split",
    "label_shift",
}  # columns that are the same for a whole split: its rows are not at fault


@dataclass(frozen=True)
class Check:
    """One expectation's outcome.

    Attributes:
        name: of the check, as in `validate.severity`.
        severity: stop or warn.
        sentence: what is expected.
        passed: whether it holds.
        rows: of the manifest, that offend it.
    """

    name: str
    severity: str
    description: str
    passed: bool
    rows: pd.DataFrame

    @property
    def is_blocking(self) -> bool:
        """Whether it shuts the gate."""
        return not self.passed and self.severity == "stop"


def validate_manifest(
    found: Manifest,
    facts: DatasetCard,
    *,
    severity: Mapping[str, str],
    allowed_duplicates: int,
    min_per_class: int,
    max_label_shift: float,
    folder: Path,
) -> list[Check]:
    """Holds a manifest against the suite and writes Data Docs to `folder`, its start page being index.html.

    Args:
        found: the manifest.
        facts: what is known of the data set.
        severity: stop, warn or off for each check by name.
        allowed_duplicates: images that may stand in two splits.
        min_per_class: images of each class, or positives and negatives of each finding, that every split needs.
        max_label_shift: Jensen-Shannon divergence of the labels of val and of test from those of train, bits.
        folder: where the pages go.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]  # a dict works
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())}
    index = {"class_name": "DefaultSiteIndexBuilder"}
    site = {"class_name": "SiteBuilder", "site_index_builder": index, "store_backend": store}
    context.add_data_docs_site(site_name="validation", site_config=site)  # type: ignore[arg-type]  # a dict works
    asset = context.data_sources.add_pandas(facts.name).add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("every image")
    suite = context.suites.add(gx.ExpectationSuite("manifest"))
    table = columns.add_derived_columns(found, facts)
    counts = facts.counts or {}
    if counts and not found.is_published_split:
        counts = {"all": counts.get("all", sum(counts.values()))}
    for name, kind, settings in _build_expectations(
        table, facts, counts, allowed_duplicates, min_per_class, max_label_shift
    ):
        if severity[name] != "off":
            suite.add_expectation(kind(**settings, severity=GX_SEVERITIES[severity[name]], meta={"check": name}))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="manifest", data=batch, suite=suite))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="manifest",
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["validation"])],
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
        )
    )
    identity = gx.RunIdentifier(run_name=facts.name)
    result = checkpoint.run(batch_parameters={"dataframe": table}, run_id=identity)
    (outcome,) = result.run_results.values()
    return [_to_check(one, found, facts, severity) for one in outcome.results]


ExpectationSpec = tuple[str, Any, dict[str, Any]]  # name of the check, class and arguments


def _build_expectations(
    table: pd.DataFrame,
    facts: DatasetCard,
    counts: Mapping[str, int],
    allowed_duplicates: int,
    min_per_class: int,
    max_label_shift: float,
) -> Iterator[ExpectationSpec]:
    told = "train, val and test each have images"
    yield _expectation(
        "split_missing", gxe.ExpectColumnDistinctValuesToEqualSet, "used_in", told, value_set=list(SPLITS)
    )
    yield from _file_expectations(facts, counts)
    yield from _leakage_expectations(table, allowed_duplicates)
    yield from _label_expectations(table, facts, min_per_class)
    for split in SPLITS[1:]:
        told = f"the labels of {split} diverge by no more than {max_label_shift} bits from those of train"
        yield _between(
            "label_shift", "label_shift", told, max_value=max_label_shift, **_row_condition("used_in", [split])
        )


def _file_expectations(facts: DatasetCard, counts: Mapping[str, int]) -> Iterator[ExpectationSpec]:
    of = {"train_val": "train and val together", "all": "the data set"}
    for part, count in counts.items():
        where = {} if part == "all" else _row_condition("split", SPLITS[:2] if part == "train_val" else [part])
        column = "images_in_split" if part in SPLITS else f"images_in_{part}"
        yield _in_set(
            "published_counts", column, [count], f"{of.get(part, part)} has the published {count:,} images", **where
        )
    yield _expectation("unreadable_image", gxe.ExpectColumnValuesToBeNull, "problem", "every image can be read")
    yield _between("blank_image", "contrast", "no image is of one value all over", min_value=0, strict_min=True)
    told = "no two file names differ in case, or in how an accent is written, alone"
    yield _in_set("colliding_names", "collides", [False], told)
    if facts.channels is not None:
        mode = "RGB" if facts.channels == 3 else "L"
        yield _in_set("unexpected_mode", "mode", [mode], f"every image is {mode}")
    if facts.size is not None:
        for side in ("height", "width"):
            yield _in_set("unexpected_size", side, [facts.size], f"every image has a {side} of {facts.size} pixels")


def _leakage_expectations(table: pd.DataFrame, allowed_duplicates: int) -> Iterator[ExpectationSpec]:
    leaks = int(table["leaked"].sum())
    # great-expectations counts in shares: all that were found may stay if they are as few as allowed, else none.
    share = (len(table) - leaks) / len(table) if leaks <= allowed_duplicates else 1.0
    relaxed = f" (up to {allowed_duplicates} may: validate.max_cross_split_duplicates)" if allowed_duplicates else ""
    told = f"no image stands in two splits{relaxed}"
    yield _in_set("image_in_two_splits", "leaked", [False], told, mostly=share)
    told = "no image stands in one split and a near duplicate of it in another"
    yield _in_set("near_duplicate_in_two_splits", "near_leaked", [False], told)
    if table["group"].notna().any():  # of images whose group is not known it would hold without saying anything
        told = "no group (patient, lesion, slide) stands in two splits"
        yield _between("group_in_two_splits", "splits_of_group", told, max_value=1)
    told = "copies of an image have the same label"
    yield _between("same_image_two_labels", "labels_of_image", told, max_value=1)
    told = "near duplicates of an image have the same label"
    yield _in_set("near_duplicate_two_labels", "near_other_label", [False], told)


def _label_expectations(table: pd.DataFrame, facts: DatasetCard, min_per_class: int) -> Iterator[ExpectationSpec]:
    many = facts.task_spec.multi_label
    values = [0, 1] if many else list(range(len(facts.classes)))
    for column, finding in zip(facts.task_spec.label_columns(len(facts.classes)), facts.classes, strict=False):
        what = f"label {finding}" if many else "label"
        yield _expectation("label_out_of_range", gxe.ExpectColumnValuesToNotBeNull, column, f"every image has a {what}")
        yield _in_set("label_out_of_range", column, values, f"every {what} is from 0 to {values[-1]}")
        for split in SPLITS:
            used = table.loc[table["used_in"] == split, column]
            if many:
                yield from _finding_expectations(finding, split, used, min_per_class)
            else:
                missing = [facts.classes[value] for value in values if value not in set(used)]
                told = f"every class is in {split}" + (f": it has no {', '.join(missing)}" if missing else "")
                kind, where = gxe.ExpectColumnDistinctValuesToContainSet, _row_condition("used_in", [split])
                yield _expectation("class_missing", kind, column, told, value_set=values, **where)
    if not many and min_per_class > 1:
        told = f"every class has {min_per_class} or more images in each split"
        yield _between("class_too_small", "images_of_class", told, min_value=min_per_class)


def _finding_expectations(finding: str, split: str, labels: pd.Series, fewest: int) -> Iterator[ExpectationSpec]:
    """Enough images of a split with and without a finding."""
    for how, value, limits in (
        ("with", 1, {"min_value": fewest}),
        ("without", 0, {"max_value": len(labels) - fewest}),
    ):
        found = int((labels == value).sum())
        told = f"{split} has {fewest:,} or more images {how} {finding} (it has {found:,})"
        kind, where = gxe.ExpectColumnSumToBeBetween, _row_condition("used_in", [split])
        yield _expectation("finding_without_images", kind, str(labels.name), told, **limits, **where)


def _expectation(check: str, kind: Any, column: str, sentence: str, **settings: Any) -> ExpectationSpec:
    return check, kind, {"column": column, "description": sentence, **settings}


def _in_set(check: str, column: str, values: list[Any], sentence: str, **settings: Any) -> ExpectationSpec:
    return _expectation(check, gxe.ExpectColumnValuesToBeInSet, column, sentence, value_set=values, **settings)


def _between(check: str, column: str, sentence: str, **settings: Any) -> ExpectationSpec:
    return _expectation(check, gxe.ExpectColumnValuesToBeBetween, column, sentence, **settings)


def _row_condition(column: str, values: Any) -> dict[str, str]:
    return {"row_condition": f"{column} in {list(values)}", "condition_parser": "pandas"}


def _to_check(one: Any, found: Manifest, facts: DatasetCard, severity: Mapping[str, str]) -> Check:
    config = one.expectation_config
    name, sentence, rows = config.meta["check"], config.description, found.rows
    if one.exception_info.get("raised_exception"):
        raise RuntimeError(f"great-expectations failed at {sentence!r}: {one.exception_info['exception_message']}")
    missing = one.result.get("partial_missing_list")
    if missing and name == "split_missing":
        sentence += f": missing {', '.join(str(value) for value in missing)}"
    offending = {entry["id"] for entry in one.result.get("unexpected_index_list") or []}
    chosen = rows[rows["id"].isin(offending)]
    column = config.kwargs["column"]
    if column == "leaked":  # all copies, not only the one that was counted
        chosen = manifest.cross_split_duplicates(rows)
    elif column in SPLIT_COLUMNS or column.startswith("images_in_"):
        chosen = rows.head(0)
        if not one.success:
            value = one.result["partial_unexpected_list"][0]
            sentence += f", but by {value:.3f}" if column == "label_shift" else f", but there are {value:,}"
    return Check(name, severity[name], sentence, bool(one.success), chosen.assign(expectation=sentence))
