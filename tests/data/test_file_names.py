"""Patients in file names: patterns that are found, and names that are no cause for alarm."""

import random
import uuid

import pandas as pd
import pytest

from fadeformer.data import file_names
from fadeformer.errors import UserError

SPLITS = ("train", "val", "test")


def search(names, labels=None, splits=None):
    """Search names with labels and splits that do not depend on them unless given."""
    number = range(len(names))
    labels = [str(i // 7 % 2) for i in number] if labels is None else labels
    splits = [SPLITS[i % 3] for i in number] if splits is None else splits
    return file_names.find_pattern(pd.Series(names), pd.Series(labels), pd.Series(splits))


def assert_finds(names, patient_of, **columns):
    """The pattern must give exactly the patients of the names."""
    result = search(names, **columns)
    assert result is not None
    groups = file_names.groups_from_names(pd.Series(names), result.pattern)
    truth = pd.Series([patient_of(name) for name in names])
    assert groups.groupby(truth).nunique().eq(1).all()
    assert truth.groupby(groups).nunique().eq(1).all()
    assert result.stems == truth.nunique()
    return result


RANDOM = random.Random(0)  # noqa: S311 - not for cryptography
PATIENTS = {
    "kermany": (
        [f"{c}/person{p}_{c}_{RANDOM.randrange(999)}.jpeg" for p in range(1, 60) for c in ("virus", "bacteria") * 3],
        lambda name: name.split("/")[-1].split("_")[0],
    ),
    "two kinds of names": (
        [f"person{p}_virus_{i}.png" for p in range(20) for i in range(3)]
        + [f"IM-{p:04}-000{i}.jpeg" for p in range(20) for i in range(3)],
        lambda name: name.rpartition("_virus")[0] or name[:7],
    ),
    "augmented": (
        [f"aug_{p} no_0_{RANDOM.randrange(9999)}.jpg" for p in range(30) for _ in range(4)]
        + [f"{p} no.jpg" for p in range(30)],
        lambda name: name.removeprefix("aug_").split(" ")[0],
    ),
    "numbered copies": (
        [f"aug_{copy}_img{p}_{RANDOM.randrange(9999)}.png" for p in range(30) for copy in range(8)],
        lambda name: name.split("_")[2],
    ),
    "copies after the original": (
        [f"aug_{p}_{copy}_{RANDOM.randrange(9999)}.png" for p in range(30) for copy in range(12)],
        lambda name: name.split("_")[1],
    ),
    "letter at the end": ([f"scan{p}_{i}.png" for p in range(40) for i in "abc"], lambda name: name.split("_")[0]),
    "few patients": (
        [f"patient{p}_slice_{i:03}.png" for p in range(5) for i in range(40)], lambda name: name.split("_")[0]
    ),
    "patient at the end": (
        [f"slice_{i:03}_patient_{p:02}.png" for i in range(30) for p in range(11)], lambda name: name[-6:-4]
    ),
    "after the class": (
        [f"{c}-{1000 + p}-{i}.jpeg" for c in ("CNV", "DME") for p in range(30) for i in range(4)],
        lambda name: name.rpartition("-")[0],
    ),
    "chestxray14": ([f"{p:08}_{i:03}.png" for p in range(50) for i in range(3)], lambda name: name[:8]),
    "hospital first": (
        [f"site{h}_p{p}_{i}.png" for h in range(3) for p in range(15) for i in range(4)],
        lambda name: name.rpartition("_")[0],
    ),
    "names of people": (
        [f"{a}{b}_{i}.png" for a in ("Do", "Ro", "Mi", "Sa") for b in "aeioulnrst" for i in range(3)],
        lambda name: name.split("_")[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PATIENTS)
def test_patients_are_found_exactly(kind):
    names, patient_of = PATIENTS[kind]
    result = assert_finds(names, patient_of)
    assert len(result.examples) == file_names.MAX_EXAMPLES


HARMLESS = {
    "counter": [f"{i:04}.png" for i in range(300)],
    "camera": [f"IMG_{i:04}.png" for i in range(300)],
    "camera with year": [f"IMG_{2019 + i % 4}_{i:04}.png" for i in range(300)],
    "camera with date": [f"IMG_2021{1 + i % 12:02}{1 + i % 28:02}_{i:06}.jpg" for i in range(300)],
    "common prefix": [f"a_{i}.png" for i in range(300)],
    "counter of each folder": [f"{s}/{c}/scan_{i}.png" for s in SPLITS for c in "ab" for i in range(50)],
    "uuid": [f"{uuid.UUID(int=RANDOM.getrandbits(128))}.png" for _ in range(300)],
    "hash": [f"{RANDOM.getrandbits(128):032x}.png" for _ in range(300)],
    "suffix of all": [f"ISIC_{i:07}_downsampled.jpg" for i in range(300)],
    "three parts": [f"{p}_{i}.png" for p in ("nevus", "keratosis", "lentigo", "angioma") for i in range(80)],
    "one image": ["person1_virus_1.png"],
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_names_raise_no_alarm(kind):
    assert search(HARMLESS[kind]) is None


def test_class_in_names_is_no_patient():
    names = [f"grade{c}_{i:03}.png" for c in range(5) for i in range(30)]
    assert search(names, labels=[name[5] for name in names]) is None


def test_patients_within_splits_raise_no_alarm():
    names = [f"person{p}_{i}.png" for p in range(30) for i in range(3)]
    assert search(names, splits=[SPLITS[i // 3 % 3] for i in range(90)]) is None


def test_group_from_path_or_file_name():
    names = pd.Series(["p1/a_1.png", "p2/a_2.png", "x.png"])
    assert file_names.groups_from_names(names, r"^([^/]+)/").tolist() == ["p1", "p2", None]
    assert file_names.groups_from_names(names, r"(\d+)").tolist() == ["1", "2", None]
    with pytest.raises(
        UserError, match=r"matches none of 3 file names, such as a_1.png; correct it, or set it to null"
    ):
        file_names.groups_from_names(names, "(q)")
