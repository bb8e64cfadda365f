"""ISIC 2019 with small made-up files, and a real sample."""

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
    """Write a mirror folder with the three files: two images per lesion, named as in the challenge."""
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


def edit_table(path, **columns):
    table = pd.read_csv(path, dtype=str)
    for name, values in columns.items():
        table[name] = values(table[name])
    table.to_csv(path, index=False)


def test_rows_combine_the_three_files(fetch):
    card, folder = fetch()
    rows = isic2019.image_table(card, folder)
    assert len(rows) == 2 * LESIONS
    first = rows.iloc[4].to_dict()
    assert first == {
        "path": isic2019.IMAGES, "member": "ISIC_2019_Training_Input/ISIC_0000004.jpg", "split": None,
        "id": "ISIC_0000004", "group": "MSK4_0000002", "label": 2, "age": 45.0, "sex": "female", "site": "head/neck",
        "source": "MSK4",
    }  # fmt: skip
    assert rows["group"].isna().sum() == 1
    assert rows["member"].iloc[5].endswith("ISIC_0000005_downsampled.jpg")
    assert card.counts is None
    assert "sample" in card.note
    assert fetch(edition="published")[0].counts == {"all": 25331}


def test_split_groups_lesions_and_is_reused(fetch, tmp_path):
    card, folder = fetch()
    manifest = build_default_manifest(card, folder, tmp_path / "splits")
    rows = manifest.rows
    assert rows.groupby("group")["split"].nunique().max() == 1
    counts = rows["split"].value_counts()  # 8 classes of 7 or 8 lesions, which cannot be divided exactly
    assert all(abs(counts[split] - expected) <= 4 for split, expected in (("train", 84), ("val", 12), ("test", 24)))
    split_file = pd.read_csv(tmp_path / "splits" / manifest.split)
    assert dict(zip(split_file["id"], split_file["split"], strict=True)) == dict(
        zip(rows["id"], rows["split"], strict=True)
    )
    split_file["split"] = split_file["split"].to_numpy()[
        ::-1
    ]  # the user edited it: an existing split is not recomputed
    split_file.to_csv(tmp_path / "splits" / manifest.split, index=False)
    new_rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert dict(zip(new_rows["id"], new_rows["split"], strict=True)) == dict(
        zip(split_file["id"], split_file["split"], strict=True)
    )


def test_invalid_diagnoses_have_no_label(fetch, mirror):
    edit_table(
        mirror / isic2019.GROUND_TRUTH,
        MEL=lambda c: c.where(c.index != 2, "1.0"),
        NV=lambda c: c.where(c.index != 16, "x"),
    )
    edit_table(mirror / isic2019.GROUND_TRUTH, UNK=lambda c: c.where(c.index != 18, "1.0"))
    card, folder = fetch()
    rows = isic2019.image_table(card, folder)
    assert rows.index[rows["label"].isna()].tolist() == [2, 16, 18]


def drop_column(mirror):
    pd.read_csv(mirror / isic2019.METADATA).drop(columns="lesion_id").to_csv(mirror / isic2019.METADATA, index=False)


def drop_row(mirror):
    pd.read_csv(mirror / isic2019.METADATA)[:-1].to_csv(mirror / isic2019.METADATA, index=False)


def repeat_row(mirror):
    table = pd.read_csv(mirror / isic2019.GROUND_TRUTH)
    pd.concat([table, table[:1]]).to_csv(mirror / isic2019.GROUND_TRUTH, index=False)


def drop_row_of_both(mirror):
    for name in (isic2019.GROUND_TRUTH, isic2019.METADATA):
        pd.read_csv(mirror / name)[:-1].to_csv(mirror / name, index=False)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (drop_column, "has no column lesion_id; it is not the challenge's file"),
        (drop_row, "1 images are in only one of .*GroundTruth.csv, such as ISIC_0000119"),
        (repeat_row, "lists ISIC_0000000_downsampled twice"),
        (drop_row_of_both, "1 images have no diagnosis in .*, such as .*ISIC_0000119.jpg"),
        (lambda mirror: (mirror / isic2019.GROUND_TRUTH).write_bytes(b""), "cannot be read as a table"),
    ],
)
def test_inconsistent_tables_raise_error(fetch, mirror, corrupt, message):
    corrupt(mirror)
    with pytest.raises(UserError, match=message):  # raised when fetching or when reading
        isic2019.image_table(*fetch())


def test_exact_member_name_takes_precedence(fetch, mirror):
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "a") as archive:
        archive.writestr("ISIC_2019_Training_Input/ISIC_0000001_downsampled.jpg", b"another")
    with pytest.raises(UserError, match=r"1 images have no diagnosis in .*, such as .*ISIC_0000001_downsampled\.jpg"):
        isic2019.image_table(*fetch())


def test_duplicate_image_in_archive_raises_error(fetch, mirror):
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "a") as archive:
        archive.writestr("again/ISIC_0000001.jpg", b"another")
    with pytest.raises(UserError, match=r"/ISIC_0000001\.jpg and again/ISIC_0000001\.jpg are both the image"):
        isic2019.image_table(*fetch())


def test_downsampled_member_matches_image_name(fetch, mirror):
    for name in (isic2019.GROUND_TRUTH, isic2019.METADATA):
        edit_table(mirror / name, image=lambda names: names.str.removesuffix("_downsampled"))
    rows = isic2019.image_table(*fetch())
    assert rows["id"].iloc[5] == "ISIC_0000005"
    assert rows["member"].iloc[5].endswith("ISIC_0000005_downsampled.jpg")


def test_valid_files_are_pinned_with_row_counts(fetch, mirror, tmp_path):
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
    }  # plus the license file
    drop_row(mirror)
    with pytest.raises(UserError, match=f"Metadata.csv: sha256 is .*rows is {images - 1}, but {images} is pinned"):
        fetch()


def test_image_missing_in_archive_is_reported(fetch, mirror, tmp_path):
    edit_table(mirror / isic2019.GROUND_TRUTH, image=lambda c: c.where(c != "ISIC_0000119", "ISIC_0009999"))
    edit_table(mirror / isic2019.METADATA, image=lambda c: c.where(c != "ISIC_0000119", "ISIC_0009999"))
    with zipfile.ZipFile(mirror / isic2019.IMAGES) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if "0000119" not in name}
    with zipfile.ZipFile(mirror / isic2019.IMAGES, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    card, folder = fetch()
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert rows.set_index("id")["problem"].dropna().to_dict() == {"ISIC_0009999": "no such file in the archive"}


def test_real_isic2019_sample(fetched, real_data, tmp_path):
    card, folder = fetched(name="isic2019", mirror=str(real_data / "isic2019"), edition="other")
    sample = build_default_manifest(card, folder, tmp_path / "splits")
    rows = sample.rows
    assert len(rows) == 10015
    assert rows["problem"].isna().all()
    counts = dict(zip(card.classes, rows["label"].value_counts().sort_index(), strict=True))
    assert counts["melanocytic nevus"] == 6705
    assert counts["dermatofibroma"] == 115
    assert rows["sha256"].duplicated().sum() == 2  # two byte-identical pairs
    assert manifest.cross_split_duplicates(rows).empty  # the split keeps them together
    assert manifest.cross_split_near_duplicates(rows, sample.near_duplicates).empty
    lesion = rows.set_index("id")["group"]
    different_lesions = {
        (a, b)
        for a, b in zip(sample.near_duplicates["first"], sample.near_duplicates["second"], strict=True)
        if lesion[a] != lesion[b]
    }
    # the same lesion with two ids, confirmed visually: the search finds duplicates that the metadata miss
    assert different_lesions == {
        ("ISIC_0025226", "ISIC_0030074"), ("ISIC_0025387", "ISIC_0029880"), ("ISIC_0027027", "ISIC_0029036"),
        ("ISIC_0027636", "ISIC_0027994"), ("ISIC_0032631", "ISIC_0033176"),
    }  # fmt: skip
