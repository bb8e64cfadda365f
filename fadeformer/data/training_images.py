"""Content hashes of the images that a model has seen, stored with the model.

A later model is compared with it only on test images that are not among them, whatever the split or the file names. A
hash is the SHA-256 of an image's pixels (`fadeformer.data.near_duplicates.content_hash`), from which the image cannot
be restored.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FILE = "training_images.parquet"
INITIAL = "initial weights"  # instead of a split: images that the initial weights were trained on


def collect(index: pd.DataFrame, initial_weights: Path | None) -> pd.DataFrame:
    """List the images of train and val, and those of the initial weights if their folder has such a list.

    Args:
        index: columns split and sha256, one row per image.
        initial_weights: file of the initial weights; None without.

    Returns:
        Table with columns sha256 and split.
    """
    own = index.loc[index["split"] != "test", ["sha256", "split"]]
    earlier = initial_weights.with_name(FILE) if initial_weights is not None else None
    if earlier is None or not earlier.is_file():
        return own.reset_index(drop=True)
    inherited = pd.read_parquet(earlier)[["sha256"]].drop_duplicates().assign(split=INITIAL)
    return pd.concat([own, inherited], ignore_index=True)


def read(path: Path) -> frozenset[str]:
    """Return the hashes of all images in a table."""
    return frozenset(pd.read_parquet(path)["sha256"])


def read_initial(path: Path) -> frozenset[str] | None:
    """Return the hashes of the images of the initial weights; None if they were not recorded."""
    table = pd.read_parquet(path)
    rows = table["split"] == INITIAL
    return frozenset(table.loc[rows, "sha256"]) if rows.any() else None
