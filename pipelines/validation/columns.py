"""Columns of a manifest that say of a row what lies in others, since an expectation sees single rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.spatial.distance import jensenshannon

from fadeformer.data import manifest
from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import Manifest
from fadeformer.data.splits import label_indicators


def add_derived_columns(found: Manifest, facts: DatasetCard) -> pd.DataFrame:
    """A manifest with columns that are about more than one row.

    `leaked` marks one copy of each image that stands in several splits (the last, train before val before test), so
    that marks count images. `splits_of_group` counts the splits a group stands in; null where no group is known.
    """
    rows = found.rows
    crossing = manifest.cross_split_duplicates(rows)
    place = crossing["split"].map({split: i for i, split in enumerate(SPLITS)})
    last = crossing.assign(place=place).sort_values("place", kind="stable").drop_duplicates("sha256", keep="last")
    used_in = rows["split"].where(manifest.is_usable(rows, facts))
    near = manifest.cross_split_near_duplicates(rows, found.near_duplicates)
    columns = facts.task_spec.label_columns(len(facts.classes))
    label = rows[columns].astype("string").fillna("").agg(",".join, axis=1)
    other = manifest.conflicting_near_duplicates(rows, found.near_duplicates, facts)
    names = rows["path"] + "/" + rows["member"]
    colliding = {name for same in reader.find_name_collisions(names) for name in same}
    return rows.assign(
        leaked=rows.index.isin(last.index),
        near_leaked=rows["id"].isin({*near["first"], *near["second"]}),
        splits_of_group=rows.groupby("group")["split"].transform("nunique"),
        near_other_label=rows["id"].isin({*other["first"], *other["second"]}),
        used_in=used_in,
        labels_of_image=label.groupby(rows["sha256"]).transform("nunique"),
        images_of_class=rows.groupby([used_in, columns[0]])["id"].transform("size"),
        images_in_split=rows.groupby("split")["id"].transform("size"),
        images_in_train_val=int(rows["split"].isin(SPLITS[:2]).sum()),
        images_in_all=len(rows),
        collides=names.isin(colliding),
        label_shift=used_in.map(label_shift(rows[used_in.notna()], facts)).astype(float),
    )


def label_shift(rows: pd.DataFrame, facts: DatasetCard) -> dict[str, float]:
    """Jensen-Shannon divergence of each split's labels from those of train, bits (0 to 1)."""
    count = len(facts.classes)
    present = label_indicators(rows[facts.task_spec.label_columns(count)], count, facts.task_spec.multi_label)
    totals = {split: present[(rows["split"] == split).to_numpy()].sum(axis=0) for split in SPLITS}
    if not all(total.any() for total in totals.values()):
        return {}
    return {
        split: float(np.nan_to_num(jensenshannon(totals["train"], total, 2)) ** 2) for split, total in totals.items()
    }
