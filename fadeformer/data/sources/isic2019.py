"""ISIC 2019 (https://challenge.isic-archive.com/landing/2019): dermoscopy, eight diagnoses, CC BY-NC 4.0.

The challenge's training part; its authors give no split. A lesion was photographed several times, so it is the group.
The images come from HAM10000 (Tschandl et al. 2018), BCN_20000 (Combalia et al. 2019) and MSK (Codella et al. 2017);
where a lesion's id is known, its prefix tells which.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pandas as pd

from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import DatasetCard
from fadeformer.errors import UserError

BASE_URL = "https://isic-challenge-data.s3.amazonaws.com/2019"
IMAGES = "ISIC_2019_Training_Input.zip"
GROUND_TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"
FILES = (IMAGES, GROUND_TRUTH, METADATA)  # no checksum of them is published
DIAGNOSES = {
    "MEL": "melanoma", "NV": "melanocytic nevus", "BCC": "basal cell carcinoma", "AK": "actinic keratosis",
    "BKL": "benign keratosis", "DF": "dermatofibroma", "VASC": "vascular lesion", "SCC": "squamous cell carcinoma",
}  # fmt: skip
UNKNOWN_DIAGNOSIS = "UNK"  # a column of the file that no training image has
IMAGE_COUNT = 25_331


def build_card(files: dict[str, str], sha256: str, is_published: bool) -> DatasetCard:
    """The card of the data set.

    Args:
        files: SHA-256 of each of `FILES`.
        sha256: of all of them.
        is_published: whether these are the published files, and no sample of them.
    """
    return DatasetCard(
        name="isic2019",
        file=IMAGES,
        sha256=sha256,
        task="multi-class",
        classes=tuple(DIAGNOSES.values()),
        size=None,
        channels=3,
        counts={"all": IMAGE_COUNT} if is_published else None,
        licence="CC BY-NC 4.0; attribution to HAM10000, BCN_20000 and MSK",
        note="The training part of the challenge, split by lesion: scores are not those of the challenge's test server."
        + ("" if is_published else " A sample or another edition of it."),
        layout="isic2019",
        files=files,
    )


def image_table(facts: DatasetCard, folder: Path) -> pd.DataFrame:
    """One row per image: path, member, id, group (lesion), split (none), label, age, sex, site and source.

    Raises:
        UserError: a table is damaged, or tables and images do not speak of the same images.
    """
    truth = _read_csv(folder / GROUND_TRUTH, [*DIAGNOSES, UNKNOWN_DIAGNOSIS])
    metadata = _read_csv(folder / METADATA, ["age_approx", "anatom_site_general", "lesion_id", "sex"])
    if set(truth.index) != set(metadata.index):
        alone = sorted(set(truth.index) ^ set(metadata.index))
        raise UserError(
            f"{folder / METADATA}: {len(alone):,} images stand in {GROUND_TRUTH} or there, not in both, such as {alone[0]}"
        )
    metadata = metadata.loc[truth.index]
    marks = truth.apply(pd.to_numeric, errors="coerce")
    certain = (marks.isin([0, 1]).all(axis=1)) & (marks.sum(axis=1) == 1) & (marks[UNKNOWN_DIAGNOSIS] == 0)
    label = pd.Series(marks[list(DIAGNOSES)].fillna(0).to_numpy().argmax(axis=1), truth.index, dtype="Int64")
    lesion = metadata["lesion_id"].astype("string")
    return pd.DataFrame({
        "path": facts.file,
        "member": _match_members(folder / facts.file, truth.index),
        "split": None,
        "id": truth.index,
        "group": lesion.to_numpy(),
        "label": label.where(certain).to_numpy(),
        "age": pd.to_numeric(metadata["age_approx"], errors="coerce").to_numpy(),
        "sex": metadata["sex"].to_numpy(),
        "site": metadata["anatom_site_general"].to_numpy(),
        "source": lesion.str.extract(r"^(\w+)_", expand=False).to_numpy(),
    })  # fmt: skip


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path, dtype=str, index_col=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); fetch it again") from error
    missing = [name for name in ("image", *columns) if name not in rows]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it is not the challenge's file")
    empty = rows["image"].isna()
    if empty.any():
        raise UserError(f"{path}: line {int(empty.argmax()) + 2} names no image; fetch it again")
    twice = rows["image"].duplicated()
    if twice.any():
        raise UserError(f"{path}: names {rows.loc[twice, 'image'].iloc[0]} twice; fetch it again")
    return rows.set_index("image")


def _match_members(archive: Path, names: pd.Index) -> list[str]:
    """The archive's file of each image; one that has none gets the name it should have, and is found unreadable."""
    held: dict[str, str] = {}
    for member in reader.list_members(archive):
        stem = PurePosixPath(member.name).stem
        if not member.name.lower().endswith((".jpg", ".jpeg")):
            continue
        if (other := held.setdefault(stem, member.name)) != member.name:
            raise UserError(f"{archive}: {other} and {member.name} are both the image {stem}; fetch it again")
    # some files are called NAME_downsampled
    chosen = [held.get(str(name)) or held.get(f"{name}_downsampled") or f"{name}.jpg" for name in names]
    strange = sorted(set(held.values()) - set(chosen))
    if strange:
        raise UserError(f"{archive}: {len(strange):,} images have no diagnosis in {GROUND_TRUTH}, such as {strange[0]}")
    return chosen
