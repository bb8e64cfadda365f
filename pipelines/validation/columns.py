"""Derived columns of a manifest, which compare a row with others: an expectation sees one row at a time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

from fadeformer.data import manifest
from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import Manifest
from fadeformer.data.splits import label_indicators


def add_derived_columns(data: Manifest, card: DatasetCard) -> pd.DataFrame:
    """Return the rows of a manifest with the columns that the expectation suite needs.

    `leaked` marks one copy of each image that is in several splits (the last one, in the order train, val, test), so
    that the sum counts images. `splits_of_group` is the number of splits that contain the group; null if unknown.
    """
    rows = data.rows
    crossing = manifest.cross_split_duplicates(rows)
    order = crossing["split"].map({split: i for i, split in enumerate(SPLITS)})
    last = crossing.assign(order=order).sort_values("order", kind="stable").drop_duplicates("sha256", keep="last")
    used_in = rows["split"].where(manifest.is_usable(rows, card))
    near = manifest.cross_split_near_duplicates(rows, data.near_duplicates)
    columns = card.task_spec.label_columns(len(card.classes))
    labels = rows[columns].astype("string").fillna("").agg(",".join, axis=1)
    conflicting = manifest.conflicting_near_duplicates(rows, data.near_duplicates, card)
    names = rows["path"] + "/" + rows["member"]
    colliding = {name for names_in_conflict in reader.find_name_collisions(names) for name in names_in_conflict}
    return rows.assign(
        leaked=rows.index.isin(last.index),
        near_leaked=rows["id"].isin({*near["first"], *near["second"]}),
        stem_in_two_splits=rows.index.isin(_crossing_stems(data)),
        splits_of_group=rows.groupby("group")["split"].transform("nunique"),
        near_other_label=rows["id"].isin({*conflicting["first"], *conflicting["second"]}),
        used_in=used_in,
        labels_of_image=labels.groupby(rows["sha256"]).transform("nunique"),
        images_of_class=rows.groupby([used_in, columns[0]])["id"].transform("size"),
        images_in_split=rows.groupby("split")["id"].transform("size"),
        images_in_train_val=int(rows["split"].isin(SPLITS[:2]).sum()),
        images_in_all=len(rows),
        collides=names.isin(colliding),
        label_shift=used_in.map(label_shift(rows[used_in.notna()], card)).astype(float),
    )


def _crossing_stems(data: Manifest) -> pd.Index:
    """Return the rows whose file name has the stem of an image in another split."""
    if data.name_pattern is None:
        return pd.Index([])
    return data.name_pattern.is_in_two_splits[lambda mask: mask].index


def label_shift(rows: pd.DataFrame, card: DatasetCard) -> dict[str, float]:
    """Return the Jensen-Shannon divergence of each split's label distribution from that of train, bits (0 to 1)."""
    count = len(card.classes)
    present = label_indicators(rows[card.task_spec.label_columns(count)], count, card.task_spec.multi_label)
    totals = {split: present[(rows["split"] == split).to_numpy()].sum(axis=0) for split in SPLITS}
    if not all(total.any() for total in totals.values()):
        return {}
    return {
        split: float(np.nan_to_num(jensenshannon(totals["train"], total, 2)) ** 2) for split, total in totals.items()
    }
