"""The manifest: one row per image of a data set, with all that can be known before training.

Columns: `path` (archive), `split`, `index` (row in the split), `id`, `group` (patient, lesion or slide; null if not
known), the label columns of the task, `sha256` (of the pixels), `height`, `width` (pixels), `mode` (L or RGB).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from fadeformer.datasets import npz
from fadeformer.datasets.facts import SPLITS, Facts


def build(facts: Facts, folder: Path) -> pd.DataFrame:
    """Reads every image once.

    Args:
        facts: what is known of the data set.
        folder: where its archive lies.

    Raises:
        UserError: the archive is damaged.
    """
    archive = folder / facts.file
    # A published set has the same images in the same order at every size; anything else is told by its content.
    prefix = facts.name if facts.counts else f"{facts.name}-{facts.sha256[:8]}"
    parts = []
    for split in SPLITS:
        labels = npz.read(archive, f"{split}_labels").astype("int64")
        columns = facts.kind.label_columns(len(facts.classes))
        part = pd.DataFrame(labels.reshape(len(labels), len(columns)), columns=columns)
        part.insert(0, "split", split)
        part.insert(1, "index", range(len(part)))
        part.insert(2, "id", [f"{prefix}/{split}/{i}" for i in range(len(part))])
        part.insert(3, "group", npz.groups(archive, split, len(part)))
        (count, height, width, *channels), _ = npz.header(archive, f"{split}_images")
        progress = tqdm(total=count, desc=f"{facts.name} {split}", unit="image", disable=None)
        hashes: list[str] = []
        for images in npz.rows(archive, f"{split}_images"):
            hashes += [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
            progress.update(len(images))
        progress.close()
        parts.append(part.assign(sha256=hashes, height=height, width=width, mode="RGB" if channels else "L"))
    rows = pd.concat(parts, ignore_index=True)
    rows.insert(0, "path", facts.file)
    return rows


def across_splits(manifest: pd.DataFrame) -> pd.DataFrame:
    """Images that stand in more than one split by content: one row per copy, copies of an image together."""
    splits = manifest.groupby("sha256")["split"].transform("nunique")
    return manifest[splits > 1].sort_values(["sha256", "id"], kind="stable")


def without_group(manifest: pd.DataFrame) -> str:
    """A sentence that says of how many images no group is known; empty where all have one."""
    count = int(manifest["group"].isna().sum())
    who = "no image has a" if count == len(manifest) else f"{count:,} of {len(manifest):,} images have no"
    return f"{who} known group (patient, lesion): one that stands in two splits is not seen" if count else ""


def within_splits(manifest: pd.DataFrame) -> dict[str, int]:
    """How many images of each split have an earlier copy in it."""
    copies = manifest.duplicated(["split", "sha256"]).groupby(manifest["split"]).sum()
    return {split: int(copies.get(split, 0)) for split in SPLITS}
