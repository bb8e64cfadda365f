"""The manifest: one row per image of a data set, with all that can be known before training.

Columns: `path` (archive or folder in data/raw) and `member` (in it), `split`, `index` (row in the split), `id`, `group`
(patient, lesion or slide; null if not known), the label columns of the task, whatever else a source knows of an image
(age, sex, view), and what was seen in its pixels: `sha256` (of the content), `height`, `width` (pixels), `mode` (L or
RGB), `brightness` (mean, 0 to 255), `contrast` (standard deviation), or, where it cannot be read, `problem`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fadeformer.data import image_stream, near_duplicates, splits
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.decode import resize_to_square, to_channels
from fadeformer.data.sources import chestxray14, isic2019, npz, user_table
from fadeformer.data.sources.phantom import patients
from fadeformer.io.atomic import checksum

TABLE_READERS: dict[str, Callable[[DatasetCard, Path], pd.DataFrame]] = {
    "npz": npz.image_table, "packed": user_table.image_table, "isic2019": isic2019.image_table, "chestxray14": chestxray14.image_table,
    "phantom": patients.image_table,
}  # fmt: skip
CONTENT_COLUMNS = ("sha256", "height", "width", "mode", "brightness", "contrast")
LEAKAGE_CHECKS = (
    "image_in_two_splits",
    "near_duplicate_in_two_splits",
    "group_in_two_splits",
)  # checks of the data gate
EXAMPLES_PER_CLASS = 8  # of each class
EXAMPLE_SIDE = 96  # pixels


@dataclass(frozen=True)
class Manifest:
    """A data set, read.

    Attributes:
        rows: one per image, as the module says, train before val before test.
        near: pairs of near duplicates: `first` and `second` (ids) and `similarity`.
        thumbnails: of each row, grey, small; None where it cannot be read or shows nothing.
        examples: a few images of each class or finding, (side, side, 3), by id.
        split: name of the split: published, or that of the file in which it is written down.
        is_authors: whether the authors' parts are kept: their counts can be asked of no other split.
    """

    rows: pd.DataFrame
    near_duplicates: pd.DataFrame
    thumbnails: Sequence[NDArray[np.uint8] | None]
    examples: dict[str, NDArray[np.uint8]]
    split: str
    is_published_split: bool = True


class _ImageInfo(NamedTuple):
    sha256: str
    height: int
    width: int
    mode: str
    brightness: float
    contrast: float
    signature: near_duplicates.ImageSignature | None
    example: NDArray[np.uint8] | None


def build_manifest(
    facts: DatasetCard,
    folder: Path,
    *,
    near_duplicate_similarity: float,
    resplit: bool,
    fractions: Sequence[float],
    seed: int,
    split_file: Path | None,
    split_folder: Path,
) -> Manifest:
    """Reads every image once.

    Args:
        facts: what is known of the data set.
        folder: where its files lie.
        near_duplicate_similarity: from which two images count as near duplicates, 0 to 1.
        resplit: whether to make a split even where the authors gave one.
        fractions: of train, val and test in a split that is made.
        seed: of that split.
        split_file: a split that was written down; it is the one then. None for none.
        split_folder: folder where splits are written down that were made, and from which they are taken again.

    Raises:
        UserError: an archive or a table is damaged, or the adopted split does not fit.
    """
    table = TABLE_READERS[facts.layout](facts, folder)
    columns = facts.task_spec.label_columns(len(facts.classes))
    present = splits.label_indicators(table[columns], len(facts.classes), facts.task_spec.multi_label)
    shown = {int(row) for label in present.T for row in _evenly_spaced(np.flatnonzero(label))}
    found: list[_ImageInfo | None] = [None] * len(table)
    problems: list[str | None] = ["no such file in the archive"] * len(table)
    for row, seen in image_stream.map_images(
        table, folder, lambda row, image: _inspect_image(image, row in shown), desc=facts.name
    ):
        found[row], problems[row] = (seen, None) if isinstance(seen, _ImageInfo) else (None, str(seen))
    seen_of = {name: [None if one is None else getattr(one, name) for one in found] for name in CONTENT_COLUMNS}
    rows = pd.concat([table, pd.DataFrame({**seen_of, "problem": problems}, index=table.index)], axis=1)
    near = _near_duplicate_table(rows, found, near_duplicate_similarity)
    cluster = leakage_clusters(rows, near)
    name = "published"
    if split_file is not None:
        rows["split"] = splits.read_split_file(split_file, rows["id"])
        name = f"{split_file.name} (SHA-256 {checksum(split_file, 'sha256')[:8]})"
    else:
        if resplit:
            rows["split"] = None
        if not rows["split"].isin(SPLITS).all():
            name = f"{facts.name}-{splits.cache_key(rows, present, cluster, fractions, seed)}.csv"
            if not (split_folder / name).exists():
                splits.write_split_file(
                    split_folder / name, rows["id"], splits.complete(rows, present, cluster, fractions, seed)
                )
            rows["split"] = splits.read_split_file(split_folder / name, rows["id"])
    order = np.argsort(pd.Categorical(rows["split"], categories=list(SPLITS)).codes, kind="stable").tolist()
    rows = rows.iloc[order].reset_index(drop=True)
    rows.insert(rows.columns.get_loc("split") + 1, "index", rows.groupby("split").cumcount())
    thumbnails = [None if (one := found[i]) is None or one.sketch is None else one.sketch.thumbnail for i in order]
    examples = {
        str(name): one.example for name, one in zip(table["id"], found, strict=True) if one and one.example is not None
    }
    return Manifest(rows, near, thumbnails, examples, name, split_file is None and not resplit)


def _evenly_spaced(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """A few of them, from the first to the last."""
    chosen = np.linspace(0, len(positions) - 1, min(EXAMPLES_PER_CLASS, len(positions))).round().astype(int)
    return np.asarray(positions[chosen])


def _inspect_image(image: Image.Image, shown: bool) -> _ImageInfo:
    pixels = np.asarray(image)
    # an even surface has no features that could be compared, and an image of few pixels too few
    alike = min(pixels.shape[:2]) >= near_duplicates.MIN_SIDE and np.ptp(pixels) > 0
    return _ImageInfo(
        sha256=near_duplicates.content_hash(pixels),
        height=pixels.shape[0],
        width=pixels.shape[1],
        mode=image.mode,
        brightness=float(pixels.mean()),
        contrast=float(pixels.std()),
        signature=near_duplicates.compute_signature(image) if alike else None,
        example=np.asarray(resize_to_square(to_channels(image, 3), EXAMPLE_SIDE, "pad")) if shown else None,
    )


def _near_duplicate_table(rows: pd.DataFrame, found: Sequence[_ImageInfo | None], least: float) -> pd.DataFrame:
    """Pairs by their ids; of images with the same content the first stands for all."""
    first = np.flatnonzero(~rows["sha256"].duplicated() & rows["sha256"].notna()).tolist()
    kept = [(i, one.signature) for i in first if (one := found[i]) is not None and one.signature is not None]
    pairs = near_duplicates.find_near_duplicates([sketch for _, sketch in kept], least)
    ids = rows["id"].to_numpy()[[i for i, _ in kept]]
    return pairs.assign(first=ids[pairs["first"]], second=ids[pairs["second"]])


def _exact_duplicates(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Each later copy of an image with the first, by position, (copies, 2)."""
    first: dict[str, int] = {}
    pairs = [
        (before, row)
        for row, content in enumerate(rows["sha256"])
        if isinstance(content, str) and (before := first.setdefault(content, row)) != row
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def leakage_clusters(
    rows: pd.DataFrame, near: pd.DataFrame, leaks: Collection[str] = LEAKAGE_CHECKS
) -> NDArray[np.int64]:
    """Number of the images that must stay together, (images,): a group, its copies, and their groups.

    Args:
        rows: of a manifest.
        near: its pairs of near duplicates.
        leaks: those of `LEAKS` that there must not be.
    """
    links = [np.empty((0, 2), np.int64)]
    if {"image_in_two_splits", "near_duplicate_in_two_splits"} & set(leaks):
        links.append(_exact_duplicates(rows))
    if "near_duplicate_in_two_splits" in leaks:
        place = pd.Series(np.arange(len(rows)), index=rows["id"])
        links.append(np.stack([place.loc[near["first"]], place.loc[near["second"]]], axis=1))
    group = rows["group"] if "group_in_two_splits" in leaks else pd.Series([None] * len(rows), dtype=object)
    return splits.connected_clusters(len(rows), group, np.concatenate(links))


def describe_uncompared(found: Manifest) -> str:
    """A sentence that says how many images could not be looked for among others; empty where all were."""
    readable = found.rows["problem"].isna()
    count = sum(one is None and bool(seen) for one, seen in zip(found.thumbnails, readable, strict=True))
    return (
        f"{count:,} images are too small, or of one value: near duplicates of them are not looked for" if count else ""
    )


def is_usable(rows: pd.DataFrame, facts: DatasetCard) -> pd.Series:
    """Of each row, whether its image can be read and has its labels: others are left out of the manifest."""
    return rows["problem"].isna() & rows[facts.task_spec.label_columns(len(facts.classes))].notna().all(axis=1)


def label_names(rows: pd.DataFrame, facts: DatasetCard) -> pd.Series:
    """The class of each image, or its findings, for people."""
    values = rows[facts.task_spec.label_columns(len(facts.classes))].astype(object).to_numpy().tolist()
    return pd.Series([label_name(row, facts) for row in values], index=rows.index, dtype=object)


def label_name(values: Sequence[Any], facts: DatasetCard) -> str:
    """The class or the findings of one image, from its label columns."""
    if facts.task_spec.multi_label:
        return ", ".join(filter(None, map(_format_finding, facts.classes, values))) or "no finding"
    if pd.isna(values[0]):
        return "no label"
    label = int(values[0])
    return facts.classes[label] if 0 <= label < len(facts.classes) else f"label {label}"


def _format_finding(name: str, value: Any) -> str:
    if pd.isna(value):
        return f"{name}: not known"
    return {0: "", 1: name}.get(value, f"{name}: {value}")


def cross_split_duplicates(rows: pd.DataFrame) -> pd.DataFrame:
    """Images that stand in more than one split by content: one row per copy, copies of an image together."""
    counts = rows.groupby("sha256")["split"].transform("nunique")
    return rows[counts > 1].sort_values(["sha256", "id"], kind="stable")


def cross_split_near_duplicates(rows: pd.DataFrame, near: pd.DataFrame) -> pd.DataFrame:
    """Pairs of near duplicates that stand in different splits, the most alike first.

    The ids are those of images that stand in different splits: where an image has exact copies, one of them.
    """
    content = dict(zip(rows["id"], rows["sha256"], strict=True))
    copied = rows[rows["sha256"].isin({content[one] for one in {*near["first"], *near["second"]}})]
    places: dict[str, list[tuple[str, str]]] = {}  # of each content: id and split of a copy in every split
    one_each = copied.drop_duplicates(["sha256", "split"])
    for sha256, name, split in zip(one_each["sha256"], one_each["id"], one_each["split"], strict=True):
        places.setdefault(sha256, []).append((name, split))
    found = []
    for first, second, alike in zip(near["first"], near["second"], near["similarity"], strict=True):
        both = itertools.product(places[content[first]], places[content[second]])
        apart = next(((a, b) for (a, split), (b, other) in both if split != other), None)
        if apart is not None:
            found.append((*apart, alike))
    return pd.DataFrame(found, columns=["first", "second", "similarity"]).sort_values("similarity", ascending=False)


def conflicting_near_duplicates(rows: pd.DataFrame, near: pd.DataFrame, facts: DatasetCard) -> pd.DataFrame:
    """Pairs of near duplicates that do not have the same labels, the most alike first."""
    columns = facts.task_spec.label_columns(len(facts.classes))
    labels = rows.set_index("id")[columns].astype("Int64").fillna(-1)
    first, second = labels.loc[near["first"]].to_numpy(), labels.loc[near["second"]].to_numpy()
    apart: pd.DataFrame = near[(first != second).any(axis=1)]
    return apart.sort_values("similarity", ascending=False, kind="stable")


def describe_ungrouped(rows: pd.DataFrame) -> str:
    """A sentence that says of how many images no group is known; empty where all have one."""
    count = int(rows["group"].isna().sum())
    who = "no image has a" if count == len(rows) else f"{count:,} of {len(rows):,} images have no"
    return f"{who} known group (patient, lesion): one that stands in two splits is not seen" if count else ""


def count_within_split_duplicates(rows: pd.DataFrame) -> dict[str, int]:
    """How many images of each split have an earlier copy in it."""
    known = rows[rows["sha256"].notna()]
    copies = known.duplicated(["split", "sha256"]).groupby(known["split"]).sum()
    return {split: int(copies.get(split, 0)) for split in SPLITS}
