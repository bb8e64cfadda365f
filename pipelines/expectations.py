"""The great-expectations suite that a manifest must pass, and its Data Docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd

from fadeformer.datasets import manifest
from fadeformer.datasets.facts import SPLITS, Facts


@dataclass(frozen=True)
class Check:
    """One expectation's outcome: its sentence, whether it holds, and the rows of the manifest that offend it."""

    sentence: str
    passed: bool
    rows: pd.DataFrame


def check(rows: pd.DataFrame, facts: Facts, allowed_duplicates: int, folder: Path) -> list[Check]:
    """Holds a manifest against the suite and writes Data Docs to `folder`, its start page being index.html.

    Args:
        rows: the manifest.
        facts: what is known of the data set.
        allowed_duplicates: images that may stand in two splits.
        folder: where the pages go.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    context.add_data_docs_site(site_name="validation", site_config=_site(folder))
    asset = context.data_sources.add_pandas(facts.name).add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("every image")
    suite = context.suites.add(gx.ExpectationSuite("manifest"))
    table = _with_derived_columns(rows)
    for expectation in _expectations(table, facts, allowed_duplicates):
        suite.add_expectation(expectation)
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
    return [_outcome(one, rows, facts) for one in outcome.results]


def _expectations(table: pd.DataFrame, facts: Facts, allowed_duplicates: int) -> Iterator[Any]:
    leaks = int(table["leaked"].sum())
    # great-expectations counts in shares: all that were found may stay if they are as few as allowed, else none.
    share = (len(table) - leaks) / len(table) if leaks <= allowed_duplicates else 1.0
    relaxed = f" (up to {allowed_duplicates} may: validate.max_cross_split_duplicates)" if allowed_duplicates else ""
    yield gxe.ExpectColumnDistinctValuesToEqualSet(
        column="split", value_set=list(SPLITS), description="train, val and test each have images"
    )
    if facts.counts:
        for split, count in facts.counts.items():
            yield gxe.ExpectColumnValuesToBeInSet(
                column="images_in_split", value_set=[count], description=f"{split} has the published {count} images",
                row_condition=f'split=="{split}"', condition_parser="pandas",
            )  # fmt: skip
    yield gxe.ExpectColumnValuesToBeInSet(
        column="leaked", value_set=[False], mostly=share, description=f"no image stands in two splits{relaxed}"
    )
    if table["group"].notna().any():  # of images whose group is not known it would hold without saying anything
        yield gxe.ExpectColumnValuesToBeBetween(
            column="splits_of_group", max_value=1, description="no group (patient, lesion, slide) stands in two splits"
        )
    mode = "RGB" if facts.channels == 3 else "L"
    yield gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=[mode], description=f"every image is {mode}")
    for side in ("height", "width"):
        yield gxe.ExpectColumnValuesToBeInSet(
            column=side, value_set=[facts.size], description=f"every image has a {side} of {facts.size} pixels"
        )
    values = [0, 1] if facts.kind.multi_label else list(range(len(facts.classes)))
    for column in facts.kind.label_columns(len(facts.classes)):
        yield gxe.ExpectColumnValuesToBeInSet(
            column=column, value_set=values, description=f"every {column} is from 0 to {values[-1]}"
        )
        for split in SPLITS:
            what = f"{column} is both 0 and 1 in {split}" if facts.kind.multi_label else f"every class is in {split}"
            yield gxe.ExpectColumnDistinctValuesToContainSet(
                column=column, value_set=values, description=what,
                row_condition=f'split=="{split}"', condition_parser="pandas",
            )  # fmt: skip


def _with_derived_columns(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds what an expectation on single rows can see.

    `leaked` marks one copy of each image that stands in several splits (the last, train before val before test), so
    that marks count images. `splits_of_group` counts the splits a group stands in; null where no group is known.
    """
    crossing = manifest.across_splits(rows)
    place = crossing["split"].map({split: i for i, split in enumerate(SPLITS)})
    last = crossing.assign(place=place).sort_values("place", kind="stable").drop_duplicates("sha256", keep="last")
    return rows.assign(
        leaked=rows.index.isin(last.index),
        splits_of_group=rows.groupby("group")["split"].transform("nunique"),
        images_in_split=rows.groupby("split")["id"].transform("size"),
    )


def _outcome(one: Any, rows: pd.DataFrame, facts: Facts) -> Check:
    config = one.expectation_config
    sentence = config.description
    if one.exception_info.get("raised_exception"):
        raise RuntimeError(f"great-expectations failed at {sentence!r}: {one.exception_info['exception_message']}")
    missing = one.result.get("partial_missing_list")
    if missing and config.kwargs["column"] == "label":
        sentence += f": it has no {', '.join(facts.classes[label] for label in missing)}"
    elif missing:
        sentence += f": missing {', '.join(str(value) for value in missing)}"
    offending = {entry["id"] for entry in one.result.get("unexpected_index_list") or []}
    chosen = rows[rows["id"].isin(offending)]
    if config.kwargs["column"] == "leaked":  # all copies, not only the one that was counted
        chosen = manifest.across_splits(rows)
    elif config.kwargs["column"] == "images_in_split":
        chosen = rows.head(0)  # the split is at fault, not its rows
        if not one.success:
            sentence += f", but the file has {one.result['partial_unexpected_list'][0]}"
    return Check(sentence, bool(one.success), chosen.assign(expectation=sentence))


def _site(folder: Path) -> dict[str, Any]:
    return {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.resolve())},
    }
