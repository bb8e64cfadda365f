"""Splits made here: grouped (patient, lesion), stratified by class or finding, and the same again from the same seed.

Whole groups are dealt out one by one, those that hold most of a label first, each to the split that lacks its labels
most: the idea of Sechidis, Tsoumakas and Vlahavas (2011, "On the stratification of multi-label data", ECML PKDD) for
groups in place of images. One procedure serves single labels and findings alike.
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
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_write

MAX_PASSES = 10  # at most
SCORE_DIGITS = 12
TRAIN_VAL = "train_val"  # authors' part that is yet to be divided into train and val


def label_indicators(labels: pd.DataFrame, classes: int, multi_label: bool) -> NDArray[np.bool_]:
    """Which label is present in which image, (images, labels); of findings a last column says that none is.

    Args:
        labels: the label columns of a manifest.
        classes: how many classes or findings.
        multi_label: whether they are findings, one column each.
    """
    values = labels.to_numpy(dtype=np.int64, na_value=-1)
    if not multi_label:
        return np.asarray(values == np.arange(classes))
    found = values == 1
    return np.concatenate([found, ~found.any(axis=1, keepdims=True)], axis=1)


def connected_clusters(images: int, groups: pd.Series, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images that have to stay together, by number of cluster, (images,).

    Args:
        images: how many.
        groups: name of each image's group; null where it is not known.
        pairs: positions of images that show the same, (pairs, 2).
    """
    codes, _ = pd.factorize(groups)
    order = np.flatnonzero(codes >= 0)
    order = order[np.argsort(codes[order], kind="stable")]
    same = codes[order[1:]] == codes[order[:-1]]
    links = np.concatenate([np.stack([order[:-1][same], order[1:][same]], axis=1), pairs])
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(images, images))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def assign(
    present: NDArray[np.bool_], cluster: NDArray[np.int64], shares: Mapping[str, float], seed: int
) -> NDArray[np.object_]:
    """Deals images out to splits, clusters whole, (images,).

    Args:
        present: of `presence`.
        cluster: number of each image's cluster.
        shares: of each split, above 0; they are taken in proportion.
        seed: of the order in which equal clusters are dealt.
    """
    kinds = _with_count_column(present)
    share = np.array(list(shares.values()), float)
    dealt = _assign_clusters(kinds, cluster, share[:, None] / share.sum() * kinds.sum(axis=0), seed)
    return np.asarray(np.array(list(shares), dtype=object)[dealt])


def _with_count_column(present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """With a last column that says that it is an image."""
    return np.concatenate([present, np.ones((len(present), 1), bool)], axis=1)


def _assign_clusters(
    kinds: NDArray[np.bool_], cluster: NDArray[np.int64], lacking: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """Number of the split of each image, (images,): of `lacking`, how many images of each kind each split wants."""
    _, cluster = np.unique(cluster, return_inverse=True)
    counts = np.zeros((cluster.max(initial=-1) + 1, kinds.shape[1]))  # of each kind in each cluster
    np.add.at(counts, cluster, kinds)
    totals = np.maximum(counts.sum(axis=0), 1)
    lacking = lacking.copy()
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    heaviest = (counts / totals).max(axis=1)[shuffled]
    order = shuffled[np.argsort(-heaviest, kind="stable")]
    of_cluster = np.full(len(counts), -1)
    for _ in range(MAX_PASSES):  # in the second and later ones clusters change places
        before = of_cluster.copy()
        for one in order:
            if of_cluster[one] >= 0:
                lacking[of_cluster[one]] += counts[one]
            # The split by which the sum of (lacking / total)^2 falls most. Rounded, since the last bits of a sum are
            # the processor's, and equal splits must be told apart in the same way on every machine.
            of_cluster[one] = np.argmax(np.round(lacking @ (counts[one] / totals**2), SCORE_DIGITS))
            lacking[of_cluster[one]] -= counts[one]
        if (of_cluster == before).all():
            break
    return np.asarray(of_cluster[cluster])


def complete(
    rows: pd.DataFrame, present: NDArray[np.bool_], cluster: NDArray[np.int64], shares: Sequence[float], seed: int
) -> NDArray[np.object_]:
    """The split of each image, where its authors leave one to make.

    Args:
        rows: with `split`: train, val, test, `TRAIN_VAL`, or null where there is none.
        present: of `presence`.
        cluster: of `clusters`.
        shares: of train, val and test.
        seed: of the split.
    """
    split: NDArray[np.object_] = np.array(rows["split"].where(rows["split"].notna(), None), dtype=object)
    given = pd.Series(split, dtype=object).groupby(cluster).transform("first")  # what is known of a cluster's images
    split = np.array(given.where(pd.isna(split), split), dtype=object)
    by_name = dict(zip(SPLITS, shares, strict=True))
    for which, names in ((pd.isna(split), SPLITS), (split == TRAIN_VAL, SPLITS[:2])):
        if which.any():
            split[which] = assign(present[which], cluster[which], {name: by_name[name] for name in names}, seed)
    return split


def repair(split: NDArray[np.object_], present: NDArray[np.bool_], cluster: NDArray[np.int64]) -> NDArray[np.object_]:
    """The split with each cluster whole: those that are stay, the others are dealt anew.

    They go where the counts of labels of the split as it was are lacking, so that classes keep their balance.

    Args:
        split: train, val or test of each image.
        present: of `presence`.
        cluster: of `clusters`.
    """
    places = pd.Categorical(split, categories=list(SPLITS)).codes.astype(np.int64)
    first = pd.Series(places).groupby(cluster)
    torn = (first.transform("min") != first.transform("max")).to_numpy()
    if not torn.any():
        return split.copy()
    kinds = _with_count_column(present)
    lacking = np.stack([kinds[torn & (places == place)].sum(axis=0) for place in range(len(SPLITS))]).astype(float)
    places[torn] = _assign_clusters(kinds[torn], cluster[torn], lacking, seed=0)
    return np.asarray(np.array(SPLITS, dtype=object)[places])


def cache_key(
    rows: pd.DataFrame, present: NDArray[np.bool_], cluster: NDArray[np.int64], shares: Sequence[float], seed: int
) -> str:
    """Names a made split: the same images, labels, groups, shares and seed have the same."""
    told = rows[["id", "split"]].assign(cluster=cluster).to_csv(index=False) + repr((list(shares), seed))
    return hashlib.sha256(told.encode() + np.packbits(present).tobytes()).hexdigest()[:12]


def content_digest(ids: pd.Series, split: NDArray[np.object_]) -> str:
    """Names a split by what it is."""
    told = pd.DataFrame({"id": ids.to_numpy(), "split": split}).to_csv(index=False)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def write_split_file(path: Path, ids: pd.Series, split: NDArray[np.object_]) -> None:
    """Writes a split down: a CSV of `id` and `split`."""
    with atomic_write(path) as temporary:
        pd.DataFrame({"id": ids.to_numpy(), "split": split}).to_csv(temporary, index=False)


def read_split_file(path: Path, ids: pd.Series) -> NDArray[np.object_]:
    """Reads a split that was written down, in the order of `ids`.

    Raises:
        UserError: it is no such table, or it does not give one of train, val and test for each image.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(
            f"{path}: cannot be read as a split ({error}); it is a CSV with the columns id, split"
        ) from error
    if not {"id", "split"} <= set(table.columns):
        raise UserError(f"{path}: has the columns {', '.join(table.columns)}; a split has id and split")
    wrong = table[~table["split"].isin(SPLITS)]
    if len(wrong):
        raise UserError(
            f"{path}: line {wrong.index[0] + 2} has split {wrong['split'].iloc[0]!r}; it is train, val or test"
        )
    twice = table[table["id"].duplicated()]
    if len(twice):
        raise UserError(f"{path}: names {twice['id'].iloc[0]} twice")
    found = table.set_index("id")["split"].reindex(ids.to_numpy())
    if found.isna().any():
        first = found.index[found.isna()][0]
        raise UserError(f"{path}: {int(found.isna().sum()):,} images have no split in it, such as {first}")
    return found.to_numpy(dtype=object)
