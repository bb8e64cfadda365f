"""Made-up patients of the phantom's slides, so that its reports have subgroups.

Each slide belongs to one patient. Age, sex and site are drawn from a separate random stream and are independent of
images and labels, so any performance difference between subgroups is due to chance.
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
    """Draw the patients, with sex and site balanced within each split as far as its number of slides allows.

    Args:
        slides: ids of the slides of each split, without duplicates.
        seed: random seed of the phantom.

    Returns:
        One row per slide: `slide`, `age`, `sex` and `site`.
    """
    parts = []
    for number, split in enumerate(SPLITS):
        rng, count = PortableRNG(seed, 4, number), len(slides[split])
        ages = [rng.integer(AGES) for _ in range(count)]
        sex, site = (np.argsort(rng.generator.random(count), kind="stable") % 2 for _ in range(2))
        parts.append(
            pd.DataFrame({
                "slide": slides[split], "age": ages, "sex": [SEXES[i] for i in sex], "site": [SITES[i] for i in site]
            })
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def image_table(card: DatasetCard, folder: Path) -> pd.DataFrame:
    """Return the rows of `npz.image_table` with age, sex and site of the slide's patient."""
    rows = npz.image_table(card, folder)
    subjects = pd.read_csv(folder / SUBJECTS_FILE, dtype={"slide": "string"}).set_index("slide").loc[rows["group"]]
    return rows.assign(**{name: subjects[name].to_numpy() for name in COLUMNS})
