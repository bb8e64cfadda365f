"""A user's own images as stored in data/raw: one zip of images and one CSV table with a row per image."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.data.dataset_card import DatasetCard

IMAGES_FILE = "images.zip"
LABELS_FILE = "labels.csv"
UNPARSED_LABEL = "unparsed_label"  # column with the original text of a label that could not be parsed
TEXT_COLUMNS = ("path", "member", "split", "id", "group")
# manifest columns; a user's column of the same name is renamed to own_NAME
RESERVED_COLUMNS = {
    *TEXT_COLUMNS, "index", "label", "sha256", "height", "width", "mode", "brightness", "contrast", "problem",
}  # fmt: skip


def image_table(card: DatasetCard, folder: Path) -> pd.DataFrame:
    """Return one row per image: path, member, split, id, group, labels, and any further columns."""
    types = dict.fromkeys(TEXT_COLUMNS, "string") | dict.fromkeys(
        card.task_spec.label_columns(len(card.classes)), "Int64"
    )
    # low_memory would infer dtypes chunk by chunk, so a column could mix numbers and text
    rows = pd.read_csv(folder / LABELS_FILE, dtype=types, keep_default_na=False, na_values=[""], low_memory=False)
    split = rows["split"].astype(object)
    return rows.assign(split=split.where(split.notna(), None))
