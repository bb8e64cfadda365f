"""ISIC 2019's files, a few images of them."""

import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.data import manifest
from fadeformer.data.download import lockfile
from fadeformer.data.sources import isic2019
from fadeformer.errors import UserError
from tests.data.conftest import build_default_manifest
from tests.data.test_decode import encode_image

LESIONS = 60


@pytest.fixture
def mirror(tmp_path):
    """A folder with the three files: two images of each lesion, named as the challenge names them."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    random = np.random.default_rng(0)
    names = [f"ISIC_{i:07}" + ("_downsampled" if i % 5 == 0 else "") for i in range(2 * LESIONS)]
    with zipfile.ZipFile(folder / isic2019.IMAGES, "w") as archive:
        archive.writestr("ISIC_2019_Training_Input/LICENSE.txt", "CC BY-NC 4.0")
        for name in names:
            pixels = np.asarray(Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30)))
            archive.writestr(f"ISIC_2019_Training_Input/{name}.jpg", encode_image(pixels, "JPEG", quality=95))
    columns = [*isic2019.DIAGNOSES, isic2019.UNKNOWN_DIAGNOSIS]
    truth = pd.DataFrame(np.eye(9)[[i // 2 % 8 for i in range(len(names))]], columns=columns)
    truth.insert(0, "image", names)
    truth.to_csv(folder / isic2019.GROUND_TRUTH, index=False)
    lesion = [f"{('HAM', 'BCN', 'MSK4')[i // 2 % 3]}_{i // 2:07}" for i in range(len(names))]
    lesion[7] = None
    pd.DataFrame({
        "image": names, "age_approx": 45.0, "anatom_site_general": "head/neck", "lesion_id": lesion, "sex": "female",
    }).to_csv(folder / isic2019.METADATA, index=False)  # fmt: skip
    return folder


@pytest.fixture
def fetch(fetched, mirror):
    return lambda **changes: fetched(**{"name": "isic2019", "mirror": str(mirror), "edition": "other", **changes})


def change(path, **columns):
    table = pd.read_csv(path, dtype=str)
    for name, values in columns.items():
        table[name] = values(table[name])
    table.to_csv(path, index=False)


def test_a_row_says_what_the_three_files_know(fetch):
    facts, folder = fetch()
    rows = isic2019.image_table(facts, folder)
    assert len(rows) == 2 * LESIONS
    first = rows.iloc[4].to_dict()
    assert first == {
        "path": isic2019.IMAGES, "member": "ISIC_2019_Training_Input/ISIC_0000004.jpg", "split": None,
        "id": "ISIC_0000004", "group": "MSK4_0000002", "label": 2, "age": 45.0, "sex": "female", "site": "head/neck",
        "source": "MSK4",
    }  # fmt: skip
    assert rows["group"].isna().sum() == 1
    assert rows["member"].iloc[5].endswith("ISIC_0000005_downsampled.jpg")
    assert facts.counts is None
    assert "sample" in facts.note
    assert fetch(edition="published")[0].counts == {"all": 25331}


def test_the_split_keeps_lesions_whole_and_is_written_down_and_used_again(fetch, tmp_path):
    facts, folder = fetch()
    found = build_default_manifest(facts, folder, tmp_path / "splits")
    rows = found.rows
    assert rows.groupby("group")["split"].nunique().max() == 1
    counts = rows["split"].value_counts()  # of 8 classes of 7 or 8 lesions, which cannot be parted evenly
    assert all(abs(counts[split] - wanted) <= 4 for split, wanted in (("train", 84), ("val", 12), ("test", 24)))
    kept = pd.read_csv(tmp_path / "splits" / found.split)
    assert dict(zip(kept["id"], kept["split"], strict=True)) == dict(zip(rows["id"], rows["split"], strict=True))
    kept["split"] = kept["split"].to_numpy()[::-1]  # a hand has changed it: it is data, and not made again
    kept.to_csv(tmp_path / "splits" / found.split, index=False)
    again = build_default_manifest(facts, folder, tmp_path / "splits").rows
    assert dict(zip(again["id"], again["split"], strict=True)) == dict(zip(kept["id"], kept["split"], strict=True))


def test_an_image_without_a_diagnosis_or_with_two_has_no_label(fetch, mirror):
    change(
        mirror / isic2019.GROUND_TRUTH,
        MEL=lambda c: c.where(c.index != 2, "1.0"),
        NV=lambda c: c.where(c.index != 16, "x"),
    )
    change(mirror / isic2019.GROUND_TRUTH, UNK=lambda c: c.where(c.index != 18, "1.0"))
    facts, folder = fetch()
    rows = isic2019.image_table(facts, folder)
    assert rows.index[rows["label"].isna()].tolist() == [2, 16, 18]


def drop_column(mirror):
    pd.read_csv(mirror / isic2019.METADATA).drop(columns="lesion_id").to_csv(mirror / isic2019.METADATA, index=False)


def drop_row(mirror):
    pd.read_csv(mirror / isic2019.METADATA)[:-1].to_csv(mirror / isic2019.METADATA, index=False)


def repeat_row(mirror):
    table = pd.read_csv(mirror / isic2019.GROUND_TRUTH)
    pd.concat([table, table[:1]]).to_csv(mirror / isic2019.GROUND_TRUTH, index=False)


def drop_both_rows(mirror):
    for name in (isic2019.GROUND_TRUTH, isic2019.METADATA):
        pd.read_csv(mirror / name)[:-1].to_csv(mirror / name, index=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_column, "has no column lesion_id; it is not the challenge's file"),
        (drop_row, "1 images are in only one of .*GroundTruth.csv, such as ISIC_0000119"),
        (repeat_row, "lists ISIC_0000000_downsampled twice"),
        (drop_both_rows, "1 images have no diagnosis in .*, such as .*ISIC_0000119.jpg"),
        (lambda mirror: (mirror / isic2019.GROUND_TRUTH).write_bytes(b""), "cannot be read as a table"),
    ],
)
def test_tables_that_do_not_fit_are_told(fetch, mirror, spoil, message):
    spoil(mirror)
    with pytest.raises(UserError, match=message):  # when it is fetched, or when it is read
        isic2019.image_table(*fetch())


def test_an_image_is_found_under_its_own_name_first(fetch, mirror):
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "a") as archive:
        archive.writestr("ISIC_2019_Training_Input/ISIC_0000001_downsampled.jpg", b"another")
    with pytest.raises(UserError, match=r"1 images have no diagnosis in .*, such as .*ISIC_0000001_downsampled\.jpg"):
        isic2019.image_table(*fetch())


def test_an_image_in_two_folders_is_told(fetch, mirror):
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "a") as archive:
        archive.writestr("again/ISIC_0000001.jpg", b"another")
    with pytest.raises(UserError, match=r"/ISIC_0000001\.jpg and again/ISIC_0000001\.jpg are both the image"):
        isic2019.image_table(*fetch())


def test_a_name_without_its_suffix_finds_the_file_that_has_it(fetch, mirror):
    for name in (isic2019.GROUND_TRUTH, isic2019.METADATA):
        change(mirror / name, image=lambda names: names.str.removesuffix("_downsampled"))
    rows = isic2019.image_table(*fetch())
    assert rows["id"].iloc[5] == "ISIC_0000005"
    assert rows["member"].iloc[5].endswith("ISIC_0000005_downsampled.jpg")


def test_what_was_verified_first_is_pinned_with_its_rows_and_a_damaged_file_never(fetch, mirror, tmp_path):
    lock = tmp_path / "dataset.lock"
    truth = (mirror / isic2019.GROUND_TRUTH).read_bytes()
    (mirror / isic2019.GROUND_TRUTH).write_bytes(b"\xff\xfe\x00image")
    with pytest.raises(UserError):
        fetch()
    assert not lock.exists()
    (mirror / isic2019.GROUND_TRUTH).write_bytes(truth)
    fetch()
    rows = {name: pin.rows for name, pin in lockfile.read_pins(lock).items()}
    images = 2 * LESIONS
    assert rows == {
        isic2019.IMAGES: images + 1,
        isic2019.GROUND_TRUTH: images,
        isic2019.METADATA: images,
    }  # and a license
    drop_row(mirror)
    with pytest.raises(UserError, match=f"Metadata.csv: sha256 is .*rows is {images - 1}, but {images} is pinned"):
        fetch()


def test_an_image_that_is_not_in_the_archive_is_named(fetch, mirror, tmp_path):
    change(mirror / isic2019.GROUND_TRUTH, image=lambda c: c.where(c != "ISIC_0000119", "ISIC_0009999"))
    change(mirror / isic2019.METADATA, image=lambda c: c.where(c != "ISIC_0000119", "ISIC_0009999"))
    with zipfile.ZipFile(mirror / isic2019.IMAGES) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if "0000119" not in name}
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "w") as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    facts, folder = fetch()
    rows = build_default_manifest(facts, folder, tmp_path / "splits").rows
    assert rows.set_index("id")["problem"].dropna().to_dict() == {"ISIC_0009999": "no such file in the archive"}


def test_the_real_sample(fetched, real_data, tmp_path):
    facts, folder = fetched(name="isic2019", mirror=str(real_data / "isic2019"), edition="other")
    found = build_default_manifest(facts, folder, tmp_path / "splits")
    rows = found.rows
    assert len(rows) == 10015
    assert rows["problem"].isna().all()
    counts = dict(zip(facts.classes, rows["label"].value_counts().sort_index(), strict=True))
    assert counts["melanocytic nevus"] == 6705
    assert counts["dermatofibroma"] == 115
    assert rows["sha256"].duplicated().sum() == 2  # two byte-identical pairs
    assert manifest.cross_split_duplicates(rows).empty  # which the split keeps together
    assert manifest.cross_split_near_duplicates(rows, found.near_duplicates).empty
    lesion = rows.set_index("id")["group"]
    other = {
        (a, b)
        for a, b in zip(found.near_duplicates["first"], found.near_duplicates["second"], strict=True)
        if lesion[a] != lesion[b]
    }
    # the same lesion under two numbers, seen by eye; the hash finds what the metadata do not tell
    assert other == {
        ("ISIC_0025226", "ISIC_0030074"), ("ISIC_0027636", "ISIC_0027994"), ("ISIC_0027027", "ISIC_0029036")
    }  # fmt: skip
