"""Published scores as data (`published.csv`), and which of them are comparable with a model of this project.

A row is one method on one data set. Scores are in [0, 1] with the digits of their source; a missing score is empty.
Other columns:

- `resolution`: side of the images in the data set that the method used, pixels, before any resizing or padding by the
  method itself. `any`: irrelevant; `several`: an ensemble; `unknown`: not reported.
- `balanced_accuracy`: mean recall of the classes, called BMCA in the ISIC challenge.
- `split`: `published` (the test set of the data set authors), `other`, or `unknown`: not reported.
- `selection`: data for checkpoint selection: `val` (held out of training, disjoint from test), `test`, or `unknown`:
not
  reported.
- `origin`: who reports the score: `authors` (of the method, or of the benchmark that trained it), `quoted` (a table in
  another paper), `recalled` (from memory, not checked against the source), or `unknown`: not reported.
- `note`: further remarks on the score.

docs/reference/evaluation.md explains how the selection of each checkpoint was determined.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import pandas as pd

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.splits import TRAIN_VAL

SCORE_COLUMNS = ("auc", "accuracy", "balanced_accuracy")
TEXT_COLUMNS = ("dataset", "resolution", "method", "split", "selection", "origin", "source", "note")
RESOLUTION_REASONS = {"several": "its images have several sizes", "unknown": "its image size is not reported"}
SPLIT_REASONS = {"other": "it uses another split", "unknown": "its split is not reported"}
SELECTION_CAVEATS = {"unknown": "its checkpoint selection is not reported"}
ORIGIN_CAVEATS = {"quoted": "quoted by others", "unknown": "its origin is not reported"}


def read() -> pd.DataFrame:
    """Read all rows; missing scores are NaN."""
    with (resources.files("fadeformer.evaluation") / "published.csv").open(encoding="utf-8") as file:
        rows: pd.DataFrame = pd.read_csv(
            file,
            dtype={**dict.fromkeys(TEXT_COLUMNS, str), **dict.fromkeys(SCORE_COLUMNS, float)},
            keep_default_na=False,
            na_values={name: [""] for name in SCORE_COLUMNS},
        )
    return rows


def comparison_table(meta: ArrayMetadata) -> pd.DataFrame:
    """List the published scores of a data set with their comparability.

    A score is comparable if it is of the same complete data set, image size and published test set, and its checkpoint
    was not selected on test. An unreported image size or split counts as different; an unreported checkpoint selection
    is a caveat.

    Args:
        meta: of the arrays that our model was trained and evaluated on.

    Returns:
        The rows of this data set, comparable ones first, with the columns of the file and `comparable`, `reason` (why
        not comparable; empty otherwise) and `caveat` (may be empty). Empty for a data set without published scores,
        such as the user's own.
    """
    rows = read()
    rows = rows[rows["dataset"] == meta.dataset["name"]]
    own_reasons = [] if rows.empty else _own_reasons(meta)
    records = rows.to_dict("records")
    reasons = ["; ".join([*own_reasons, *_row_reasons(row, _image_size(meta))]) for row in records]
    table: pd.DataFrame = rows.assign(
        comparable=[not reason for reason in reasons], reason=reasons, caveat=[_caveat(row) for row in records]
    )
    return table.sort_values("comparable", ascending=False, kind="stable", ignore_index=True)


def _image_size(meta: ArrayMetadata) -> int:
    """Return the image side in the data set, pixels; if it varies, the side of the model input."""
    return int(meta.dataset["size"] or meta.image_size)


def _own_reasons(meta: ArrayMetadata) -> list[str]:
    """Return the reasons why our score is comparable with no published score."""
    reasons = []
    if not _is_complete(meta):
        reasons.append("ours is not the complete published data set, but a subset, a sample or another edition")
    if not _is_authors_test(meta):
        reasons.append(f"ours uses the split {meta.split}")
    if meta.image_size < _image_size(meta):
        reasons.append(f"ours were downsized from {_image_size(meta)} to {meta.image_size} pixels")
    return reasons


def _is_complete(meta: ArrayMetadata) -> bool:
    """Whether the number of images equals the published one; samples and other editions have no published counts."""
    counts = meta.dataset["counts"]
    return counts is not None and sum(meta.counts.values()) == counts.get("all", sum(counts.values()))


def _is_authors_test(meta: ArrayMetadata) -> bool:
    """Whether our test set is that of the data set authors.

    NIH ChestX-ray14 has no published val split, so its split is named after the one made here. The name does not show
    whether test was made here too (`split.resplit`), but the number of test images does.
    """
    if meta.split == "published":
        return True
    counts = meta.dataset["counts"] or {}
    made = re.fullmatch(rf"{re.escape(meta.dataset['name'])}-[0-9a-f]{{12}}\.csv", meta.split)
    return made is not None and TRAIN_VAL in counts and meta.counts["test"] == counts["test"]


def _row_reasons(row: dict[Any, Any], side: int) -> list[str]:
    """Return the reasons why a published score is not comparable with ours on images of that side."""
    reasons = [RESOLUTION_REASONS.get(row["resolution"], f"its images have {row['resolution']} pixels, ours {side}")]
    if row["resolution"] in ("any", str(side)):
        reasons = []
    if row["split"] != "published":
        reasons.append(SPLIT_REASONS[row["split"]])
    if row["selection"] == "test":
        reasons.append("its checkpoint was selected on test")
    if row["origin"] == "recalled":
        reasons.append("recalled, not checked against its source")
    return reasons


def _caveat(row: dict[Any, Any]) -> str:
    caveats = [SELECTION_CAVEATS.get(row["selection"]), ORIGIN_CAVEATS.get(row["origin"]), row["note"]]
    return "; ".join(filter(None, caveats))
