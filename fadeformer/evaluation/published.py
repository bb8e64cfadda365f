"""Published scores as data (`published.csv`), and which of them a score of ours may stand beside.

A row is one method on one data set. Scores are in [0, 1], as many digits as their source tells; where it tells none, a
cell is empty. Its other columns:

- `resolution`: side of the images of the data set that the method was given, pixels; what it did with them, such as to
  enlarge or to pad, is told with the method. `any`: it does not matter; `several`: an ensemble; `unknown`: not told.
- `balanced_accuracy`: mean recall of the classes, which ISIC's challenge calls BMCA.
- `split`: `published` (test is the one that the authors of the data set gave), `other`, or `unknown`: not told.
- `selection`: what the checkpoint was chosen on: `val` (images held out of training, never those of test), `test`, or
  `unknown`: not told.
- `origin`: who tells the score: `authors` (of the method, or of the benchmark that trained it), `quoted` (a table of
  somebody else's), `recalled` (from memory, not checked against the source), or `unknown`: not told.
- `note`: what a reader of the score must know besides.

docs/reference/evaluation.md says how it was found what a checkpoint was chosen on.
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
RESOLUTION_REASONS = {"several": "its images are of several sizes", "unknown": "the size of its images is not told"}
SPLIT_REASONS = {"other": "its split is another one", "unknown": "its split is not told"}
SELECTION_CAVEATS = {"unknown": "what its checkpoint was chosen on is not told"}
ORIGIN_CAVEATS = {"quoted": "quoted by others", "unknown": "who trained it is not told"}


def read() -> pd.DataFrame:
    """Every row, in the columns of the file; a score that is not told is a NaN."""
    with (resources.files("fadeformer.evaluation") / "published.csv").open(encoding="utf-8") as file:
        rows: pd.DataFrame = pd.read_csv(
            file,
            dtype={**dict.fromkeys(TEXT_COLUMNS, str), **dict.fromkeys(SCORE_COLUMNS, float)},
            keep_default_na=False,
            na_values={name: [""] for name in SCORE_COLUMNS},
        )
    return rows


def comparison_table(meta: ArrayMetadata) -> pd.DataFrame:
    """The published scores of a data set, and whether those of a model of ours on its test images may be compared.

    They may where the data set is the same and whole, its images are of the same size, test is the one that the authors
    of the data set gave, and the checkpoint was not chosen on it. A size or a split that is not told counts as another
    one; where the choice of the checkpoint is not told, that is a caveat.

    Args:
        meta: of the arrays that our model was trained and judged on.

    Returns:
        The rows of that data set, those that compare first, in the columns of the file and `comparable`, `reason` (why
        not; empty where it does) and `caveat` (what to bear in mind; may be empty). No row of a data set that nothing
        is known of, such as a user's own.
    """
    rows = read()
    rows = rows[rows["dataset"] == meta.dataset["name"]]
    of_ours = [] if rows.empty else _own_reasons(meta)
    told = rows.to_dict("records")
    reasons = ["; ".join([*of_ours, *_row_reasons(row, _image_size(meta))]) for row in told]
    judged: pd.DataFrame = rows.assign(
        comparable=[not reason for reason in reasons], reason=reasons, caveat=[_caveat(row) for row in told]
    )
    return judged.sort_values("comparable", ascending=False, kind="stable", ignore_index=True)


def _image_size(meta: ArrayMetadata) -> int:
    """Side of the images as the data set has them, pixels; where theirs differ, as the model saw them."""
    return int(meta.dataset["size"] or meta.image_size)


def _own_reasons(meta: ArrayMetadata) -> list[str]:
    """Why no published score may stand beside ours."""
    reasons = []
    if not _is_complete(meta):
        reasons.append("ours is not the whole data set as published, but a part, a sample or another edition")
    if not _is_authors_test(meta):
        reasons.append(f"ours is the split {meta.split}")
    if meta.image_size < _image_size(meta):
        reasons.append(f"ours were reduced from {_image_size(meta)} to {meta.image_size} pixels")
    return reasons


def _is_complete(meta: ArrayMetadata) -> bool:
    """Whether there are as many images as published; a sample or another edition is asked for no counts."""
    counts = meta.dataset["counts"]
    return counts is not None and sum(meta.counts.values()) == counts.get("all", sum(counts.values()))


def _is_authors_test(meta: ArrayMetadata) -> bool:
    """Whether the authors' test images are ours.

    Of NIH's radiographs val is made here, and so the split is named after what was made. Its name does not say whether
    test was made too (`split.anew`), but the number of its images does.
    """
    if meta.split == "published":
        return True
    counts = meta.dataset["counts"] or {}
    made = re.fullmatch(rf"{re.escape(meta.dataset['name'])}-[0-9a-f]{{12}}\.csv", meta.split)
    return made is not None and TRAIN_VAL in counts and meta.counts["test"] == counts["test"]


def _row_reasons(row: dict[Any, Any], side: int) -> list[str]:
    """Why one published score may not stand beside ours on images of that side."""
    reasons = [
        RESOLUTION_REASONS.get(row["resolution"], f"its images are of {row['resolution']} pixels, ours of {side}")
    ]
    if row["resolution"] in ("any", str(side)):
        reasons = []
    if row["split"] != "published":
        reasons.append(SPLIT_REASONS[row["split"]])
    if row["selection"] == "test":
        reasons.append("its checkpoint was chosen on test")
    if row["origin"] == "recalled":
        reasons.append("recalled, not checked against its source")
    return reasons


def _caveat(row: dict[Any, Any]) -> str:
    return "; ".join(
        filter(None, [SELECTION_CAVEATS.get(row["selection"]), ORIGIN_CAVEATS.get(row["origin"]), row["note"]])
    )
