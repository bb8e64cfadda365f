"""A user's own images as they lie in data/raw: one zip of images, and one table with a row for each of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.data.dataset_card import DatasetCard

IMAGES_FILE = "images.zip"
LABELS_FILE = "labels.csv"
UNPARSED_LABEL = "unparsed_label"  # column of what stands in place of a label, where that is none
TEXT_COLUMNS = ("path", "member", "split", "id", "group")
# What a manifest has of every image; a user's column of such a name is called own_NAME.
RESERVED_COLUMNS = {
    *TEXT_COLUMNS,
    "index",
    "label",
    "sha256",
    "height",
    "width",
    "mode",
    "brightness",
    "contrast",
    "problem",
}


def image_table(facts: DatasetCard, folder: Path) -> pd.DataFrame:
    """One row per image: path, member, split, id, group, labels, and what else was known."""
    types = dict.fromkeys(TEXT_COLUMNS, "string") | dict.fromkeys(
        facts.task_spec.label_columns(len(facts.classes)), "Int64"
    )
    # low_memory: it would give numbers and text of one column their own kinds, piece by piece
    rows = pd.read_csv(folder / LABELS_FILE, dtype=types, keep_default_na=False, na_values=[""], low_memory=False)
    split = rows["split"].astype(object)
    return rows.assign(split=split.where(split.notna(), None))
