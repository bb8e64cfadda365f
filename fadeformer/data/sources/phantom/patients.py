"""Who the phantom's slides are of: made-up patients of made-up clinics, so that its reports have subgroups to show.

Each slide is of one patient. Age, sex and site come from a generator of their own and know nothing of the images and
labels, so that a subgroup in which a model is worse is worse by chance alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.sources import npz
from fadeformer.data.sources.phantom.rng import PortableRNG

SUBJECTS_FILE = "subjects.csv"
COLUMNS = ("age", "sex", "site")
SEXES = ("F", "M")
SITES = ("made-up clinic A", "made-up clinic B")
AGES = (20, 89)  # years


def draw_patients(slides: Mapping[str, NDArray[np.int64]], seed: int) -> pd.DataFrame:
    """Draws the patients, as many of each sex and of each clinic in a split as its number of slides allows.

    Args:
        slides: of each split, the number of every slide once.
        seed: of the phantom.

    Returns:
        One row per slide: `slide`, `age`, `sex` and `site`.
    """
    parts = []
    for number, split in enumerate(SPLITS):
        chance, count = PortableRNG(seed, 4, number), len(slides[split])
        ages = [chance.integer(AGES) for _ in range(count)]
        sex, site = (np.argsort(chance.generator.random(count), kind="stable") % 2 for _ in range(2))
        parts.append(
            pd.DataFrame({
                "slide": slides[split], "age": ages, "sex": [SEXES[i] for i in sex], "site": [SITES[i] for i in site]
            })
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def image_table(facts: DatasetCard, folder: Path) -> pd.DataFrame:
    """One row per image, as `npz.table` gives it, with age, sex and site of the patient that its slide is of."""
    rows = npz.image_table(facts, folder)
    known = pd.read_csv(folder / SUBJECTS_FILE, dtype={"slide": "string"}).set_index("slide").loc[rows["group"]]
    return rows.assign(**{name: known[name].to_numpy() for name in COLUMNS})
