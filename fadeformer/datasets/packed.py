"""A user's own images as they lie in data/raw: one zip of images, and one table with a row for each of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fadeformer.datasets.facts import Facts

IMAGES = "images.zip"
LABELS = "labels.csv"
TEXT = ("path", "member", "split", "id", "group")


def table(facts: Facts, folder: Path) -> pd.DataFrame:
    """One row per image: path, member, split, id, group, labels, and what else was known."""
    types = dict.fromkeys(TEXT, "string") | dict.fromkeys(facts.kind.label_columns(len(facts.classes)), "Int64")
    rows = pd.read_csv(folder / LABELS, dtype=types, keep_default_na=False, na_values=[""])
    split = rows["split"].astype(object)
    return rows.assign(split=split.where(split.notna(), None))
