"""ISIC 2019 (https://challenge.isic-archive.com/landing/2019): dermoscopy, eight diagnoses, CC BY-NC 4.0.

The challenge's training set; its authors publish no split. Some lesions were photographed several times, so splits are
grouped by lesion. The images come from HAM10000 (Tschandl et al. 2018), BCN_20000 (Combalia et al. 2019) and MSK
(Codella et al. 2017); the prefix of the lesion id, where there is one, identifies the source.
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
FILES = (IMAGES, GROUND_TRUTH, METADATA)  # no checksums are published
DIAGNOSES = {
    "MEL": "melanoma", "NV": "melanocytic nevus", "BCC": "basal cell carcinoma", "AK": "actinic keratosis",
    "BKL": "benign keratosis", "DF": "dermatofibroma", "VASC": "vascular lesion", "SCC": "squamous cell carcinoma",
}  # fmt: skip
UNKNOWN_DIAGNOSIS = "UNK"  # a column of the ground truth that is 0 for every training image
IMAGE_COUNT = 25_331


def build_card(files: dict[str, str], sha256: str, is_published: bool) -> DatasetCard:
    """Build the dataset card.

    Args:
        files: SHA-256 of each of `FILES`, by name.
        sha256: combined digest of the files.
        is_published: whether these are the complete published files rather than a sample or another edition.
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
        license="CC BY-NC 4.0; attribution to HAM10000, BCN_20000 and MSK",
        note="The challenge's training set, split by lesion: scores are not comparable with the challenge server's."
        + ("" if is_published else " A sample or another edition of it."),
        layout="isic2019",
        files=files,
    )


def image_table(card: DatasetCard, folder: Path) -> pd.DataFrame:
    """Return one row per image: path, member, id, group (lesion), split (none), label, age, sex, site and source.

    Raises:
        UserError: a table is damaged, or the tables and the archive do not have the same images.
    """
    truth = _read_csv(folder / GROUND_TRUTH, [*DIAGNOSES, UNKNOWN_DIAGNOSIS])
    metadata = _read_csv(folder / METADATA, ["age_approx", "anatom_site_general", "lesion_id", "sex"])
    if set(truth.index) != set(metadata.index):
        unpaired = sorted(set(truth.index) ^ set(metadata.index))
        raise UserError(
            f"{folder / METADATA}: {len(unpaired):,} images are in only one of {METADATA} and {GROUND_TRUTH}, such as"
            f" {unpaired[0]}"
        )
    metadata = metadata.loc[truth.index]
    one_hot = truth.apply(pd.to_numeric, errors="coerce")
    is_valid = (one_hot.isin([0, 1]).all(axis=1)) & (one_hot.sum(axis=1) == 1) & (one_hot[UNKNOWN_DIAGNOSIS] == 0)
    label = pd.Series(one_hot[list(DIAGNOSES)].fillna(0).to_numpy().argmax(axis=1), truth.index, dtype="Int64")
    lesion = metadata["lesion_id"].astype("string")
    return pd.DataFrame({
        "path": card.file,
        "member": _match_members(folder / card.file, truth.index),
        "split": None,
        "id": truth.index,
        "group": lesion.to_numpy(),
        "label": label.where(is_valid).to_numpy(),
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
    is_missing = rows["image"].isna()
    if is_missing.any():
        raise UserError(f"{path}: line {int(is_missing.argmax()) + 2} has no image name; fetch it again")
    is_duplicate = rows["image"].duplicated()
    if is_duplicate.any():
        raise UserError(f"{path}: lists {rows.loc[is_duplicate, 'image'].iloc[0]} twice; fetch it again")
    return rows.set_index("image")


def _match_members(archive: Path, names: pd.Index) -> list[str]:
    """Return the archive member of each image; a missing one gets its expected name, and reading it fails later."""
    members: dict[str, str] = {}
    for member in reader.list_members(archive):
        stem = PurePosixPath(member.name).stem
        if not member.name.lower().endswith((".jpg", ".jpeg")):
            continue
        if (previous := members.setdefault(stem, member.name)) != member.name:
            raise UserError(f"{archive}: {previous} and {member.name} are both the image {stem}; fetch it again")
    # some members are called NAME_downsampled
    matched = [members.get(str(name)) or members.get(f"{name}_downsampled") or f"{name}.jpg" for name in names]
    unmatched = sorted(set(members.values()) - set(matched))
    if unmatched:
        raise UserError(
            f"{archive}: {len(unmatched):,} images have no diagnosis in {GROUND_TRUTH}, such as {unmatched[0]}"
        )
    return matched
