"""Group-stratified train/val/test splits: whole groups (patient, lesion), stratified by class or finding, seeded.

Greedy iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data",
ECML PKDD), applied to groups instead of images: groups are assigned one by one, those with the largest share of a
label first, each to the split that is most short of its labels. The same procedure handles single-label and multi-label
data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fadeformer.data.dataset_card import SPLITS
from fadeformer.data.sources.csv_text import parse_rows
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_write

MAX_PASSES = 10
SCORE_DIGITS = 12  # rounding of assignment scores
TRAIN_VAL = "train_val"  # published part that has yet to be divided into train and val


def label_indicators(labels: pd.DataFrame, classes: int, multi_label: bool) -> NDArray[np.bool_]:
    """Binary label indicator matrix, (images, labels); for multi-label data a last column marks "no finding".

    Args:
        labels: label columns of a manifest.
        classes: number of classes or findings.
        multi_label: whether there is one column per finding.
    """
    values = labels.to_numpy(dtype=np.int64, na_value=-1)
    if not multi_label:
        return np.asarray(values == np.arange(classes))
    findings = values == 1
    return np.concatenate([findings, ~findings.any(axis=1, keepdims=True)], axis=1)


def connected_clusters(images: int, groups: pd.Series, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components of images that share a group or are duplicates: cluster number of each image, (images,).

    Args:
        images: number of images.
        groups: group name of each image; null if unknown.
        pairs: positions of duplicate images, (pairs, 2).
    """
    codes, _ = pd.factorize(groups)
    order = np.flatnonzero(codes >= 0)
    order = order[np.argsort(codes[order], kind="stable")]
    same = codes[order[1:]] == codes[order[:-1]]
    links = np.concatenate([np.stack([order[:-1][same], order[1:][same]], axis=1), pairs])
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(images, images))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def assign(
    present: NDArray[np.bool_], cluster: NDArray[np.int64], fractions: Mapping[str, float], seed: int
) -> NDArray[np.object_]:
    """Assign images to splits, keeping clusters whole: split name of each image, (images,).

    If a label would be missing from a split although it has as many clusters as there are splits, each split is first
    given one cluster of that label, its smallest one for the smallest split.

    Args:
        present: result of `label_indicators`.
        cluster: cluster number of each image.
        fractions: positive fraction of each split by name; normalized to sum to 1.
        seed: random seed for the order of equal clusters.
    """
    indicators = _with_count_column(present)
    fraction = np.array(list(fractions.values()), float)
    desired = fraction[:, None] / fraction.sum() * indicators.sum(axis=0)
    reserved: dict[int, int] = {}
    assignment = _assign_clusters(indicators, cluster, desired, seed)
    while new := _reserve_clusters(indicators, cluster, assignment, fraction, reserved):
        reserved |= new
        assignment = _assign_clusters(indicators, cluster, desired, seed, reserved)
    return np.asarray(np.array(list(fractions), dtype=object)[assignment])


def _reserve_clusters(
    indicators: NDArray[np.bool_],
    cluster: NDArray[np.int64],
    assignment: NDArray[np.int64],
    fraction: NDArray[np.float64],
    reserved: Mapping[int, int],
) -> dict[int, int]:
    """Choose a cluster of the rarest label that is missing from a split, for each split without a reserved one.

    Returns:
        Split number by cluster number; empty if no split misses a label that its free clusters could give it.
    """
    labels = [np.unique(cluster[rows], return_counts=True) for rows in indicators.T]
    for label in sorted(range(len(labels)), key=lambda label: len(labels[label][0])):
        clusters, counts = labels[label]
        if len(clusters) < len(fraction) or len(np.unique(assignment[indicators[:, label]])) == len(fraction):
            continue
        by_size = clusters[np.argsort(counts, kind="stable")].tolist()
        free = [c for c in by_size if c not in reserved]
        served = {reserved[c] for c in by_size if c in reserved}
        splits = [int(split) for split in np.argsort(fraction, kind="stable") if split not in served]
        if new := dict(zip(free, splits, strict=False)):
            return new
    return {}


def _with_count_column(present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Append a column of ones, so that the number of images is balanced like a label."""
    return np.concatenate([present, np.ones((len(present), 1), bool)], axis=1)


def _assign_clusters(
    indicators: NDArray[np.bool_],
    cluster: NDArray[np.int64],
    lacking: NDArray[np.float64],
    seed: int,
    reserved: Mapping[int, int] | None = None,
) -> NDArray[np.int64]:
    """Assign each image to the number of a split, (images,).

    Args:
        indicators: labels of each image, (images, labels).
        cluster: cluster number of each image, (images,).
        lacking: desired number of images per label, (splits, labels).
        seed: random seed for the order of equal clusters.
        reserved: split number of clusters that are assigned beforehand; None for none.
    """
    numbers, cluster = np.unique(cluster, return_inverse=True)
    counts = np.zeros((cluster.max(initial=-1) + 1, indicators.shape[1]))  # images per label in each cluster
    np.add.at(counts, cluster, indicators)
    totals = np.maximum(counts.sum(axis=0), 1)
    lacking = lacking.copy()
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    max_share = (counts / totals).max(axis=1)[shuffled]
    order = shuffled[np.argsort(-max_share, kind="stable")]
    split_of = np.full(len(counts), -1)
    for number, split in (reserved or {}).items():
        c = int(np.searchsorted(numbers, number))
        split_of[c] = split
        lacking[split] -= counts[c]
    order = order[split_of[order] < 0]
    for _ in range(MAX_PASSES):  # passes after the first one reassign clusters
        before = split_of.copy()
        for c in order:
            if split_of[c] >= 0:
                lacking[split_of[c]] += counts[c]
            # The split that reduces the sum of (lacking / total)^2 most. Rounded, because the last bits of a sum depend
            # on the CPU, and ties must be broken in the same way on every machine.
            split_of[c] = np.argmax(np.round(lacking @ (counts[c] / totals**2), SCORE_DIGITS))
            lacking[split_of[c]] -= counts[c]
        if (split_of == before).all():
            break
    return np.asarray(split_of[cluster])


def complete(
    rows: pd.DataFrame, present: NDArray[np.bool_], cluster: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> NDArray[np.object_]:
    """Complete a partial split: assign images that have no split or only `TRAIN_VAL`.

    Args:
        rows: manifest rows whose `split` is train, val, test, `TRAIN_VAL`, or null.
        present: result of `label_indicators`.
        cluster: result of `connected_clusters`.
        fractions: fractions of train, val and test.
        seed: random seed of the split.

    Returns:
        Split name of each image, (images,).
    """
    split: NDArray[np.object_] = np.array(rows["split"].where(rows["split"].notna(), None), dtype=object)
    # an image without a split follows its cluster
    given = pd.Series(split, dtype=object).groupby(cluster).transform("first")
    split = np.array(given.where(pd.isna(split), split), dtype=object)
    by_name = dict(zip(SPLITS, fractions, strict=True))
    for mask, names in ((pd.isna(split), SPLITS), (split == TRAIN_VAL, SPLITS[:2])):
        if mask.any():
            split[mask] = assign(present[mask], cluster[mask], {name: by_name[name] for name in names}, seed)
    return split


def repair(split: NDArray[np.object_], present: NDArray[np.bool_], cluster: NDArray[np.int64]) -> NDArray[np.object_]:
    """Repair leakage: reassign the clusters that are spread over several splits, and keep all others.

    Reassigned clusters restore the label counts of the original split, so that classes stay balanced.

    Args:
        split: train, val or test for each image.
        present: result of `label_indicators`.
        cluster: result of `connected_clusters`.
    """
    numbers = pd.Categorical(split, categories=list(SPLITS)).codes.astype(np.int64)
    by_cluster = pd.Series(numbers).groupby(cluster)
    is_spread = (by_cluster.transform("min") != by_cluster.transform("max")).to_numpy()
    if not is_spread.any():
        return split.copy()
    indicators = _with_count_column(present)
    lacking = np.stack(
        [indicators[is_spread & (numbers == number)].sum(axis=0) for number in range(len(SPLITS))]
    ).astype(float)
    numbers[is_spread] = _assign_clusters(indicators[is_spread], cluster[is_spread], lacking, seed=0)
    return np.asarray(np.array(SPLITS, dtype=object)[numbers])


def cache_key(
    rows: pd.DataFrame, present: NDArray[np.bool_], cluster: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> str:
    """Cache key of a new split: a hash of image ids, given splits, labels, clusters, fractions and seed."""
    content = rows[["id", "split"]].assign(cluster=cluster).to_csv(index=False) + repr((list(fractions), seed))
    return hashlib.sha256(content.encode() + np.packbits(present).tobytes()).hexdigest()[:12]


def content_digest(ids: pd.Series, split: NDArray[np.object_]) -> str:
    """Hash of the assignments of a split."""
    content = pd.DataFrame({"id": ids.to_numpy(), "split": split}).to_csv(index=False)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def write_split_file(path: Path, ids: pd.Series, split: NDArray[np.object_]) -> None:
    """Write a split as a CSV with the columns `id` and `split`."""
    with atomic_write(path) as temporary:
        pd.DataFrame({"id": ids.to_numpy(), "split": split}).to_csv(temporary, index=False)


def read_split_file(path: Path, ids: pd.Series) -> NDArray[np.object_]:
    """Read a split CSV, in the order of `ids`.

    Raises:
        UserError: the file is not such a table, or does not assign every image to train, val or test.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a split ({error}); a CSV with the columns id and split is expected"
        ) from error
    (_, header), *lines = parse_rows(data, str(path), ("id", "split")) or [(0, [""])]
    if not {"id", "split"} <= set(header):
        raise UserError(f"{path}: has the columns {', '.join(header)}; expected: id and split")
    table = pd.DataFrame(
        [(row + [""] * len(header))[: len(header)] for _, row in lines],
        columns=header,
        index=[line for line, _ in lines],
        dtype=object,
    )
    invalid = table[~table["split"].isin(SPLITS)]
    if len(invalid):
        raise UserError(
            f"{path}: line {invalid.index[0]} has split {invalid['split'].iloc[0]!r}; expected: train, val or test"
        )
    duplicates = table[table["id"].duplicated()]
    if len(duplicates):
        raise UserError(f"{path}: duplicate id {duplicates['id'].iloc[0]}")
    split = table.set_index("id")["split"].reindex(ids.map(str.strip).to_numpy())
    if split.isna().any():
        first = split.index[split.isna()][0]
        raise UserError(f"{path}: {int(split.isna().sum()):,} images have no split in it, such as {first}")
    return split.to_numpy(dtype=object)
