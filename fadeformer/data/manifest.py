"""Manifest: a table with one row per image of a dataset, its split, labels, metadata and pixel statistics.

Columns: `path` (archive or folder in data/raw) and `member` (file in it), `split`, `index` (row in the split), `id`,
`group` (patient, lesion or slide; null if unknown), the label columns of the task, source-specific metadata (age, sex,
view), and the results of decoding: `sha256` (of the pixels), `height`, `width` (pixels), `mode` (L or RGB),
`brightness` (mean, 0 to 255), `contrast` (standard deviation) or, if decoding failed, `problem`.
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

from fadeformer.data import exclusions, file_names, image_stream, near_duplicates, splits
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.decode import resize_to_square, to_channels
from fadeformer.data.sources import chestxray14, isic2019, npz, user_table
from fadeformer.data.sources.phantom import patients
from fadeformer.io.atomic import checksum

TABLE_READERS: dict[str, Callable[[DatasetCard, Path], pd.DataFrame]] = {
    "npz": npz.image_table, "user_table": user_table.image_table, "isic2019": isic2019.image_table,
    "chestxray14": chestxray14.image_table, "phantom": patients.image_table,
}  # fmt: skip
CONTENT_COLUMNS = ("sha256", "height", "width", "mode", "brightness", "contrast")
LEAKAGE_CHECKS = ("image_in_two_splits", "near_duplicate_in_two_splits", "group_in_two_splits")
EXAMPLES_PER_CLASS = 8
EXAMPLE_SIDE = 96  # pixels


@dataclass(frozen=True)
class Manifest:
    """Manifest of a dataset with near-duplicates and example images.

    Attributes:
        rows: one row per image with the columns listed above, ordered train, val, test.
        near_duplicates: pairs of near-duplicates: `first` and `second` (ids) and `similarity`.
        thumbnails: grayscale thumbnail per row; None if the image is unreadable, blank or too small.
        examples: a few images of each class or finding, (side, side, 3), by id.
        split: name of the split: `published`, or the name of the split file.
        is_published_split: whether the split is that of the source, neither adopted from a file nor computed again,
            and without excluded images.
        excluded: number of images that `split.exclude` left out.
        name_pattern: pattern of patients in the file names of images without a group, if any are in two splits.
    """

    rows: pd.DataFrame
    near_duplicates: pd.DataFrame
    thumbnails: Sequence[NDArray[np.uint8] | None]
    examples: dict[str, NDArray[np.uint8]]
    split: str
    is_published_split: bool = True
    excluded: int = 0
    name_pattern: file_names.NamePattern | None = None


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
    card: DatasetCard,
    folder: Path,
    *,
    near_duplicate_similarity: float,
    resplit: bool,
    fractions: Sequence[float],
    seed: int,
    split_file: Path | None,
    split_folder: Path,
    exclude: Path | None = None,
    group_from: str | None = None,
) -> Manifest:
    """Decode every image once and build the manifest.

    Args:
        card: dataset card.
        folder: folder of the raw data.
        near_duplicate_similarity: minimum similarity of near-duplicates, 0 to 1.
        resplit: ignore the published split and make a new one.
        fractions: fractions of train, val and test in a new split.
        seed: random seed of a new split.
        split_file: CSV of an existing split to use instead; None for none.
        split_folder: cache folder of new splits; a split with the same inputs is read from there.
        exclude: list of images to leave out; None for none.
        group_from: pattern of the group in the names of files without a known group; None for none.

    Raises:
        UserError: an archive or a table is corrupt, the split file or the list does not match the dataset, or the
            pattern matches no file name.
    """
    table = TABLE_READERS[card.layout](card, folder)
    num_images = len(table)
    if exclude is not None:
        table = table[~exclusions.read_excluded(exclude, table["id"])].reset_index(drop=True)
    if group_from is not None:
        table["group"] = _fill_groups(table, group_from)
    columns = card.task_spec.label_columns(len(card.classes))
    present = splits.label_indicators(table[columns], len(card.classes), card.task_spec.multi_label)
    example_rows = {int(row) for label in present.T for row in _evenly_spaced(np.flatnonzero(label))}
    infos: list[_ImageInfo | None] = [None] * len(table)
    problems: list[str | None] = ["no such file in the archive"] * len(table)
    if "problem" in table:  # of files that the source could not read
        stored = table.pop("problem")
        problems = stored.astype(object).where(stored.notna(), problems[0]).tolist()
    for row, result in image_stream.map_images(
        table,
        folder,
        lambda row, image: _inspect_image(image, row in example_rows),
        desc=card.name,
        pixel_range=card.pixel_range,
    ):
        infos[row], problems[row] = (result, None) if isinstance(result, _ImageInfo) else (None, str(result))
    contents = {name: [None if info is None else getattr(info, name) for info in infos] for name in CONTENT_COLUMNS}
    rows = pd.concat([table, pd.DataFrame({**contents, "problem": problems}, index=table.index)], axis=1)
    pairs = _near_duplicate_table(rows, infos, near_duplicate_similarity)
    cluster = leakage_clusters(rows, pairs)
    name = "published"
    if split_file is not None:
        rows["split"] = splits.read_split_file(split_file, rows["id"])
        name = f"{split_file.name} (SHA-256 {checksum(split_file, 'sha256')[:8]})"
    else:
        if resplit:
            rows["split"] = None
        if not rows["split"].isin(SPLITS).all():
            name = f"{card.name}-{splits.cache_key(rows, present, cluster, fractions, seed)}.csv"
            if not (split_folder / name).exists():
                splits.write_split_file(
                    split_folder / name, rows["id"], splits.complete(rows, present, cluster, fractions, seed)
                )
            rows["split"] = splits.read_split_file(split_folder / name, rows["id"])
    if exclude is not None:
        name += (
            f", without {num_images - len(table):,} images ({exclude.name}, SHA-256 {checksum(exclude, 'sha256')[:8]})"
        )
    order = np.argsort(pd.Categorical(rows["split"], categories=list(SPLITS)).codes, kind="stable").tolist()
    rows = rows.iloc[order].reset_index(drop=True)
    rows.insert(rows.columns.get_loc("split") + 1, "index", rows.groupby("split").cumcount())
    signatures = [None if (info := infos[i]) is None else info.signature for i in order]
    thumbnails = [None if signature is None else signature.thumbnail for signature in signatures]
    examples = {
        str(name): info.example
        for name, info in zip(table["id"], infos, strict=True)
        if info and info.example is not None
    }
    return Manifest(
        rows, pairs, thumbnails, examples, name,
        is_published_split=split_file is None and not resplit and exclude is None,
        excluded=num_images - len(table),
        name_pattern=_find_name_pattern(rows, columns) if group_from is None else None,
    )  # fmt: skip


def _fill_groups(table: pd.DataFrame, pattern: str) -> pd.Series:
    """Return the group of each image; where the source knows none, the one in the file name."""
    unknown = table["group"].isna()
    groups = table["group"].astype("string")
    if unknown.any():
        groups[unknown] = file_names.groups_from_names(table.loc[unknown, "member"], pattern)
    return groups


def _find_name_pattern(rows: pd.DataFrame, label_columns: Sequence[str]) -> file_names.NamePattern | None:
    """Search the names of the images without a group for patients in two splits."""
    unknown = rows[rows["group"].isna()]
    labels = unknown[list(label_columns)].astype("string").fillna("").agg(",".join, axis=1)
    return file_names.find_pattern(unknown["member"], labels, unknown["split"]) if len(unknown) else None


def _evenly_spaced(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Select up to `EXAMPLES_PER_CLASS` evenly spaced positions."""
    indices = np.linspace(0, len(positions) - 1, min(EXAMPLES_PER_CLASS, len(positions))).round().astype(int)
    return np.asarray(positions[indices])


def _inspect_image(image: Image.Image, is_example: bool) -> _ImageInfo:
    pixels = np.asarray(image)
    # blank and tiny images have no features to compare
    is_comparable = min(pixels.shape[:2]) >= near_duplicates.MIN_SIDE and np.ptp(pixels) > 0
    return _ImageInfo(
        sha256=near_duplicates.content_hash(pixels),
        height=pixels.shape[0],
        width=pixels.shape[1],
        mode=image.mode,
        brightness=float(pixels.mean()),
        contrast=float(pixels.std()),
        signature=near_duplicates.compute_signature(image) if is_comparable else None,
        example=np.asarray(resize_to_square(to_channels(image, 3), EXAMPLE_SIDE, "pad")) if is_example else None,
    )


def _near_duplicate_table(rows: pd.DataFrame, infos: Sequence[_ImageInfo | None], threshold: float) -> pd.DataFrame:
    """Near-duplicate pairs by id; exact duplicates are represented by their first copy."""
    first = np.flatnonzero(~rows["sha256"].duplicated() & rows["sha256"].notna()).tolist()
    compared = [(i, info.signature) for i in first if (info := infos[i]) is not None and info.signature is not None]
    pairs = near_duplicates.find_near_duplicates([signature for _, signature in compared], threshold)
    ids = rows["id"].to_numpy()[[i for i, _ in compared]]
    return pairs.assign(first=ids[pairs["first"]], second=ids[pairs["second"]])


def _exact_duplicates(rows: pd.DataFrame) -> NDArray[np.int64]:
    """Positions of the first and each later exact duplicate, (pairs, 2)."""
    first: dict[str, int] = {}
    pairs = [
        (before, row)
        for row, content in enumerate(rows["sha256"])
        if isinstance(content, str) and (before := first.setdefault(content, row)) != row
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def leakage_clusters(
    rows: pd.DataFrame, pairs: pd.DataFrame, checks: Collection[str] = LEAKAGE_CHECKS
) -> NDArray[np.int64]:
    """Cluster images that must be in the same split: groups joined through duplicates.

    Args:
        rows: rows of a manifest.
        pairs: its near-duplicate pairs.
        checks: leakage checks (from `LEAKAGE_CHECKS`) that the split must pass.

    Returns:
        Cluster number of each image, (images,).
    """
    links = [np.empty((0, 2), np.int64)]
    if {"image_in_two_splits", "near_duplicate_in_two_splits"} & set(checks):
        links.append(_exact_duplicates(rows))
    if "near_duplicate_in_two_splits" in checks:
        position = pd.Series(np.arange(len(rows)), index=rows["id"])
        links.append(np.stack([position.loc[pairs["first"]], position.loc[pairs["second"]]], axis=1))
    group = rows["group"] if "group_in_two_splits" in checks else pd.Series([None] * len(rows), dtype=object)
    return splits.connected_clusters(len(rows), group, np.concatenate(links))


def describe_uncompared(manifest: Manifest) -> str:
    """Sentence on the number of images excluded from the near-duplicate search; empty if none."""
    readable = manifest.rows["problem"].isna()
    count = sum(
        thumbnail is None and bool(is_readable)
        for thumbnail, is_readable in zip(manifest.thumbnails, readable, strict=True)
    )
    return f"{count:,} images are too small or blank and not searched for near-duplicates" if count else ""


def is_usable(rows: pd.DataFrame, card: DatasetCard) -> pd.Series:
    """Mask of rows that are readable and fully labeled; other rows are dropped from the saved manifest."""
    return rows["problem"].isna() & rows[card.task_spec.label_columns(len(card.classes))].notna().all(axis=1)


def label_names(rows: pd.DataFrame, card: DatasetCard) -> pd.Series:
    """Readable class or findings of each image."""
    values = rows[card.task_spec.label_columns(len(card.classes))].astype(object).to_numpy().tolist()
    return pd.Series([label_name(row, card) for row in values], index=rows.index, dtype=object)


def label_name(values: Sequence[Any], card: DatasetCard) -> str:
    """Readable class or findings of one image, from its label columns."""
    if card.task_spec.multi_label:
        return ", ".join(filter(None, map(_format_finding, card.classes, values))) or "no finding"
    if pd.isna(values[0]):
        return "no label"
    label = int(values[0])
    return card.classes[label] if 0 <= label < len(card.classes) else f"label {label}"


def _format_finding(name: str, value: Any) -> str:
    if pd.isna(value):
        return f"{name}: unknown"
    return {0: "", 1: name}.get(value, f"{name}: {value}")


def cross_split_duplicates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of exact duplicates that occur in more than one split, sorted so that duplicates are adjacent."""
    counts = rows.groupby("sha256")["split"].transform("nunique")
    return rows[counts > 1].sort_values(["sha256", "id"], kind="stable")


def cross_split_near_duplicates(rows: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Near-duplicate pairs across splits, the most similar first.

    If an image has exact duplicates, the id of a copy is given that is in a different split than the other image.
    """
    content = dict(zip(rows["id"], rows["sha256"], strict=True))
    duplicates = rows[rows["sha256"].isin({content[name] for name in {*pairs["first"], *pairs["second"]}})]
    copies_of: dict[str, list[tuple[str, str]]] = {}  # by content hash: id and split of one copy per split
    copies = duplicates.drop_duplicates(["sha256", "split"])
    for sha256, name, split in zip(copies["sha256"], copies["id"], copies["split"], strict=True):
        copies_of.setdefault(sha256, []).append((name, split))
    crossing = []
    for first, second, similarity in zip(pairs["first"], pairs["second"], pairs["similarity"], strict=True):
        candidates = itertools.product(copies_of[content[first]], copies_of[content[second]])
        pair = next(((a, b) for (a, split), (b, other) in candidates if split != other), None)
        if pair is not None:
            crossing.append((*pair, similarity))
    return pd.DataFrame(crossing, columns=["first", "second", "similarity"]).sort_values("similarity", ascending=False)


def conflicting_near_duplicates(rows: pd.DataFrame, pairs: pd.DataFrame, card: DatasetCard) -> pd.DataFrame:
    """Near-duplicate pairs with different labels, the most similar first."""
    columns = card.task_spec.label_columns(len(card.classes))
    labels = rows.set_index("id")[columns].astype("Int64").fillna(-1)
    first, second = labels.loc[pairs["first"]].to_numpy(), labels.loc[pairs["second"]].to_numpy()
    conflicting: pd.DataFrame = pairs[(first != second).any(axis=1)]
    return conflicting.sort_values("similarity", ascending=False, kind="stable")


def describe_ungrouped(rows: pd.DataFrame) -> str:
    """Sentence on the number of images without a known group; empty if none."""
    count = int(rows["group"].isna().sum())
    subject = "no image has a" if count == len(rows) else f"{count:,} of {len(rows):,} images have no"
    return f"{subject} known group (patient, lesion): a group in two splits is not detected" if count else ""


def count_within_split_duplicates(rows: pd.DataFrame) -> dict[str, int]:
    """Number of repeated exact duplicates within each split."""
    readable = rows[rows["sha256"].notna()]
    copies = readable.duplicated(["split", "sha256"]).groupby(readable["split"]).sum()
    return {split: int(copies.get(split, 0)) for split in SPLITS}
