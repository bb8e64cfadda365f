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

from fadeformer.datasets.facts import SPLITS
from fadeformer.errors import UserError
from fadeformer.files import whole_file

PASSES = 10  # at most
TRAIN_VAL = "train_val"  # authors' part that is yet to be divided into train and val


def presence(labels: pd.DataFrame, classes: int) -> NDArray[np.bool_]:
    """Which label is present in which image, (images, labels); of findings a last column says that none is.

    Args:
        labels: the label columns of a manifest.
        classes: how many classes or findings.
    """
    values = labels.to_numpy(dtype=np.int64, na_value=-1)
    if values.shape[1] == 1:
        return np.asarray(values == np.arange(classes))
    found = values == 1
    return np.concatenate([found, ~found.any(axis=1, keepdims=True)], axis=1)


def clusters(images: int, groups: pd.Series, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
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


def deal(
    present: NDArray[np.bool_], cluster: NDArray[np.int64], shares: Mapping[str, float], seed: int
) -> NDArray[np.object_]:
    """Deals images out to splits, clusters whole, (images,).

    Args:
        present: of `presence`.
        cluster: number of each image's cluster.
        shares: of each split, above 0; they are taken in proportion.
        seed: of the order in which equal clusters are dealt.
    """
    _, cluster = np.unique(cluster, return_inverse=True)
    kinds = np.concatenate([present, np.ones((len(present), 1), bool)], axis=1)  # the last says that it is an image
    counts = np.zeros((cluster.max(initial=-1) + 1, kinds.shape[1]))  # of each kind in each cluster
    np.add.at(counts, cluster, kinds)
    totals = np.maximum(counts.sum(axis=0), 1)
    share = np.array(list(shares.values()), float)
    lacking = share[:, None] / share.sum() * counts.sum(axis=0)  # splits, kinds
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    heaviest = (counts / totals).max(axis=1)[shuffled]
    order = shuffled[np.argsort(-heaviest, kind="stable")]
    of_cluster = np.full(len(counts), -1)
    for _ in range(PASSES):  # in the second and later ones clusters change places
        before = of_cluster.copy()
        for one in order:
            if of_cluster[one] >= 0:
                lacking[of_cluster[one]] += counts[one]
            # the split by which the sum of (lacking / total)^2 falls most
            of_cluster[one] = np.argmax(lacking @ (counts[one] / totals**2))
            lacking[of_cluster[one]] -= counts[one]
        if (of_cluster == before).all():
            break
    names: NDArray[np.object_] = np.array(list(shares), dtype=object)
    return np.asarray(names[of_cluster[cluster]])


def made(
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
    by_name = dict(zip(SPLITS, shares, strict=True))
    for which, names in ((pd.isna(split), SPLITS), (split == TRAIN_VAL, SPLITS[:2])):
        if which.any():
            split[which] = deal(present[which], cluster[which], {name: by_name[name] for name in names}, seed)
    return split


def repaired(split: NDArray[np.object_], cluster: NDArray[np.int64]) -> NDArray[np.object_]:
    """The split with each cluster whole: all of it where most of its images are; where as many are, the later split.

    What is moved to test or val is lost to training, what is moved out of test no longer judges; the fewest images are
    moved, and so the balance of classes changes least.
    """
    places = pd.Categorical(split, categories=list(SPLITS)).codes
    counts = np.zeros((cluster.max(initial=-1) + 1, len(SPLITS)), np.int64)
    np.add.at(counts, (cluster, places), 1)
    most = len(SPLITS) - 1 - counts[:, ::-1].argmax(axis=1)
    return np.asarray(np.array(SPLITS, dtype=object)[most[cluster]])


def key(rows: pd.DataFrame, cluster: NDArray[np.int64], shares: Sequence[float], seed: int) -> str:
    """Names a made split: the same images, groups, shares and seed have the same."""
    told = rows[["id", "split"]].assign(cluster=cluster).to_csv(index=False) + repr((list(shares), seed))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def write(path: Path, ids: pd.Series, split: NDArray[np.object_]) -> None:
    """Writes a split down: a CSV of `id` and `split`."""
    with whole_file(path) as temporary:
        pd.DataFrame({"id": ids.to_numpy(), "split": split}).to_csv(temporary, index=False)


def read(path: Path, ids: pd.Series) -> NDArray[np.object_]:
    """Reads a split that was written down, in the order of `ids`.

    Raises:
        UserError: it is no such table, or it does not give one of train, val and test for each image.
    """
    try:
        table = pd.read_csv(path, dtype=str)
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
