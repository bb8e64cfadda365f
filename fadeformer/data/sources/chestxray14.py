"""NIH ChestX-ray14 (Wang et al. 2017, arXiv:1705.02315): frontal chest radiographs labeled with fourteen findings.

The labels were extracted from radiology reports. Groups are patients. The authors' lists separate train_val from test;
val is split off train_val by patient. That is not the split of ChestMNIST, which follows CheXNet's 70 / 10 / 20, so
scores on the two are not comparable. URLs are from NIH's batch_download_zips.py, checksums from NIH's checksum file.
Hand-drawn bounding boxes exist for 880 test images (`fadeformer.data.sources.lesion_boxes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from fadeformer.data.archives import reader
from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.splits import TRAIN_VAL
from fadeformer.errors import UserError

ENTRY_TABLE = "Data_Entry_2017_v2020.csv"
TRAIN_VAL_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"
TABLE_FILES = (ENTRY_TABLE, TRAIN_VAL_LIST, TEST_LIST)  # no checksums are published
BOX_LIST = "BBox_List_2017.csv"  # no checksum either: copies differ in line endings and number of digits
TABLES_URL = "https://huggingface.co/datasets/alkzar90/NIH-Chest-X-ray-dataset/resolve/main/data"
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NO_FINDING = "No Finding"
COUNTS = {"all": 112_120, "train_val": 86_524, "test": 25_596}
MAX_AGE = 120  # years; a few ages in the file are several hundred
ARCHIVES_URL = "https://nihcc.box.com/shared/static"
ARCHIVES = {  # number: link and MD5 of images_NUMBER.tar.gz
    1: ("vfk49d74nhbxq3nqjg0900w5nvkorp5c", "fe8ed0a6961412fddcbb3603c11b3698"),
    2: ("i28rlmbvmfjbl8p2n3ril0pptcmcu9d1", "ab07a2d7cbe6f65ddd97b4ed7bde10bf"),
    3: ("f1t00wrtdk94satdfb9olcolqx20z2jp", "2301d03bde4c246388bad3876965d574"),
    4: ("0aowwzs5lhjrceb3qp67ahp0rd1l1etg", "9f1b7f5aae01b13f4bc8e2c44a4b8ef6"),
    5: ("v5e3goj22zr6h8tzualxfsqlqaygfbsn", "1861f3cd0ef7734df8104f2b0309023b"),
    6: ("asi7ikud9jwnkrnkj99jnpfkjdes7l6l", "456b53a8b351afd92a35bc41444c58c8"),
    7: ("jn1b4mw4n6lnh74ovmcjb8y48h8xj07n", "1075121ea20a137b87f290d6a4a5965e"),
    8: ("tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j", "b61f34cec3aa69f295fbb593cbd9d443"),
    9: ("upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj", "442a3caa61ae9b64e61c561294d1e183"),
    10: ("l6nilvfa9cg3s28tqv1qc1olm3gnz54p", "09ec81c4c31e32858ad8cf965c494b74"),
    11: ("hhq8fkdgvcari67vfhs7ppg2w6ni4jze", "499aefc67207a5a97692424cf5dbeed5"),
    12: ("ioqwiy20ihqwyr8pf4c24eazhh281pbu", "dc9fda1757c2de0032b63347a7d2895c"),
}


def archive_name(number: int) -> str:
    """Return the file name of one of the twelve image archives."""
    return f"images_{number:03}.tar.gz"


def build_card(files: dict[str, str], sha256: str, numbers: Sequence[int], is_published: bool) -> DatasetCard:
    """Build the dataset card.

    Args:
        files: SHA-256 of each file by name, archives first; `BOX_LIST` is optional, the card notes if it is missing.
        sha256: combined digest of the files.
        numbers: numbers of the archives.
        is_published: whether these are the published files rather than a sample or another edition.
    """
    is_complete = is_published and set(numbers) == set(ARCHIVES)
    note = f" A subset: archives {', '.join(map(str, numbers))} of 12." if set(numbers) != set(ARCHIVES) else ""
    if not is_published:
        note = " A sample or another edition of it."
    if BOX_LIST not in files:
        note += f" Without lesion boxes: the server or mirror has no {BOX_LIST}."
    return DatasetCard(
        name="chestxray14",
        file=archive_name(numbers[0]),
        sha256=sha256,
        task="multi-label, binary-class",
        classes=FINDINGS,
        size=None,
        channels=None,
        counts=COUNTS if is_complete else None,
        license="NIH: free to use, with a citation and a link to the download site",
        note=f"Labels were extracted from reports by a program. Not the split of ChestMNIST.{note}",
        layout="chestxray14",
        files=files,
    )


def image_table(card: DatasetCard, folder: Path) -> pd.DataFrame:
    """Return one row per archived image: path, member, id, group (patient), split, labels, age, sex and view.

    Raises:
        UserError: a table is damaged, an archived image is missing in a table, or the patient id in a file name differs
            from the table's.
    """
    entries = _read_entries(folder / ENTRY_TABLE)
    splits: dict[str, str] = {}
    for name, split in ((TRAIN_VAL_LIST, TRAIN_VAL), (TEST_LIST, "test")):
        for image in _read_lines(folder / name):
            if splits.setdefault(image, split) != split:
                raise UserError(f"{folder / name}: {image} is in both lists; fetch them again")
    members = [
        (path, member.name, PurePosixPath(member.name).name)
        for path in card.files
        if path.endswith(".tar.gz")
        for member in reader.list_members(folder / path)
    ]
    rows = pd.DataFrame(members, columns=["path", "member", "id"])
    for source, listed in ((ENTRY_TABLE, entries.index), (f"{TRAIN_VAL_LIST} or {TEST_LIST}", splits)):
        unlisted = rows.loc[~rows["id"].isin(listed), "id"]
        if len(unlisted):
            raise UserError(
                f"{folder}: {len(unlisted):,} images of the archives are not in {source}, such as {unlisted.iloc[0]}"
            )
    duplicates = rows.loc[rows["id"].duplicated(), "id"]
    if len(duplicates):
        raise UserError(f"{folder}: {duplicates.iloc[0]} is in the archives twice; fetch them again")
    metadata = entries.loc[rows["id"]]
    findings = metadata["Finding Labels"].str.split("|")
    rows["split"] = rows["id"].map(splits)
    rows["group"] = pd.to_numeric(metadata["Patient ID"]).astype("int64").astype("string").to_numpy()
    for label, finding in enumerate(FINDINGS):
        rows[f"label_{label}"] = pd.array([finding in names for names in findings], dtype="Int64")
    # the 2017 edition writes 058Y
    age = pd.to_numeric(metadata["Patient Age"].str.extract(r"^0*(\d+)", expand=False), errors="coerce").to_numpy()
    rows["age"] = pd.Series(age).where(age <= MAX_AGE)
    rows["sex"] = metadata["sex"].to_numpy()
    rows["view"] = metadata["View Position"].to_numpy()
    return rows


def _read_entries(path: Path) -> pd.DataFrame:
    """Read NIH's metadata table, indexed by image; the commas in its bracketed headers separate columns."""
    try:
        # index_col: some editions end every row with a comma, which pandas would read as an index column
        rows = pd.read_csv(path, dtype=str, index_col=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); fetch it again") from error
    rows = rows.rename(columns={"Patient Gender": "sex", "Patient Sex": "sex"})
    needed = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "sex", "View Position")
    missing = [name for name in needed if name not in rows]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it is not NIH's file")
    empty = rows[rows[["Image Index", "Finding Labels", "Patient ID"]].isna().any(axis=1)]
    if len(empty):
        raise UserError(f"{path}: line {empty.index[0] + 2} has no image, finding or patient; fetch it again")
    labels = set(rows["Finding Labels"].str.split("|").explode())
    unknown = sorted(labels - {*FINDINGS, NO_FINDING})
    if unknown:
        raise UserError(f"{path}: unknown finding {unknown[0]!r}; the table must have NIH's fourteen findings")
    patient = pd.to_numeric(rows["Patient ID"], errors="coerce")
    patient_in_name = pd.to_numeric(
        rows["Image Index"].str.extract(r"^(\d{8})_\d{3}\.png$", expand=False), errors="coerce"
    )
    mismatched = rows[~(patient == patient_in_name)]
    if len(mismatched):
        raise UserError(
            f"{path}: line {mismatched.index[0] + 2}: the patient id differs from that in the file name"
            f" {mismatched['Image Index'].iloc[0]}; fetch it again"
        )
    if rows["Image Index"].duplicated().any():
        raise UserError(f"{path}: lists {rows.loc[rows['Image Index'].duplicated(), 'Image Index'].iloc[0]} twice")
    return rows.set_index("Image Index")


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of images ({error}); fetch it again") from error
