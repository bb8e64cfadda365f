"""A user's own folder of images in every supported layout."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.data import manifest
from fadeformer.data.sources import folder as source
from fadeformer.data.sources import labels_csv, user_table
from fadeformer.errors import UserError
from tests.data.conftest import build_default_manifest
from tests.data.dicom.test_dicom_image import make_dicom, pydicom_file


def encode_png(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((24 + seed % 3, 24), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def scans(tmp_path):
    """Return a function that writes a folder with the named images."""

    def write(names, table=None) -> Path:
        folder = tmp_path / "scans"
        for seed, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(seed))
        if table is not None:
            (folder / "labels.csv").write_text(table)
        return folder

    return write


@pytest.fixture
def fetch(fetched):
    return lambda root, **changes: fetched(**{"name": "folder", "root": str(root), **changes})


IN_CLASSES = [f"{name}/{i}.png" for name in ("benign", "malignant") for i in range(30)]
IN_SPLITS = [
    f"{split}/{name}/{i}.png" for split in ("train", "valid", "test") for name in ("a", "b", "c") for i in range(4)
]


def test_split_and_class_folders(scans, fetch):
    card, folder = fetch(scans(IN_SPLITS))
    rows = user_table.image_table(card, folder)
    assert (card.task, card.classes, card.name) == ("multi-class", ("a", "b", "c"), "own-scans")
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (s, c): 4 for s in ("train", "val", "test") for c in range(3)
    }
    assert rows["id"].is_unique
    assert rows["group"].isna().all()


def test_class_folders_are_split(scans, fetch, tmp_path):
    card, folder = fetch(scans(IN_CLASSES))
    assert (card.task, card.classes) == ("binary-class", ("benign", "malignant"))
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (s, c): n for s, n in (("train", 21), ("val", 3), ("test", 6)) for c in range(2)
    }


def test_val_is_split_off_train_if_missing(scans, fetch, tmp_path):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("a", "b") for i in range(16)]
    card, folder = fetch(scans(names))
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert rows["split"].value_counts().to_dict() == {"test": 32, "train": 28, "val": 4}


def test_zip_with_parent_folder_equals_folder(scans, fetch, tmp_path):
    root = scans(IN_CLASSES)
    plain = fetch(root)[0]
    with zipfile.ZipFile(tmp_path / "scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, f"my scans/{path.relative_to(root)}")
        archive.writestr("__MACOSX/my scans/._0.png", b"rubbish")
    assert fetch(tmp_path / "scans.zip")[0] == plain


def test_table_defines_label_group_split_and_metadata(scans, fetch):
    names = [f"{i:02}.png" for i in range(12)]
    lines = [
        f"./{n},{'yes' if i % 2 else 'no'},p{i // 2},{('train', 'Validation', 'test')[i % 3]},{40 + i}"
        for i, n in enumerate(names)
    ]
    card, folder = fetch(scans(names, "\n".join(["path,label,group,split,age", *lines])))
    rows = user_table.image_table(card, folder)
    assert card.classes == ("no", "yes")
    assert rows["label"].tolist() == [0, 1] * 6
    assert rows["group"].tolist() == [f"p{i // 2}" for i in range(12)]
    assert rows["split"].tolist() == ["train", "val", "test"] * 4
    assert rows["age"].tolist() == list(range(40, 52))


def test_classes_select_finding_columns(scans, fetch):
    names = [f"{i}.png" for i in range(8)]
    lines = [f"{n},{i % 2},{int(i > 4)},{60 + i}" for i, n in enumerate(names)]
    root = scans(names, "\n".join(["path,oedema,mass,age", *lines]))
    card, folder = fetch(root, classes=["mass", "oedema"])
    rows = user_table.image_table(card, folder)
    assert (card.task, card.classes) == ("multi-label, binary-class", ("mass", "oedema"))
    assert rows["label_0"].tolist() == [0] * 5 + [1] * 3
    assert rows["label_1"].tolist() == [0, 1] * 4
    assert "age" in rows
    assert "mass" not in rows
    with pytest.raises(UserError, match=r"has no column label; to use 0/1 columns as findings, list them in dataset"):
        fetch(root)


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        ([*IN_SPLITS, "other/a/0.png"], None, "other/a/0.png is in none of the folders train, val and test"),
        (["train/a/b/0.png", "train/c/0.png"], None, "train/a/b/0.png is not in a class folder"),
        (["0.png", "1.png"], "path,label,split\n1.png,b,\n0.png,a,dev\n", "unknown split 'dev' of 0.png"),
        (["0.png"], "path|label\n0.png|a\n", r"has the columns path\|label; it needs path"),
        (["0.png"], "path,label,Label\n0.png,a,b\n", "has two columns label"),
        (["0.png"], "path,label\n0.png,a,lower left\n", "line 2 has 3 fields, but there are 2 columns; put text with"),
        (["0.png"], 'path,label\n"0.png,a\n', "labels.csv cannot be read as a table"),
        (
            ["0.png", "1.png"],
            "path,label\n0.png,a\n1.png,a\n",
            "all images have the label a; there must be at least two",
        ),
        (
            ["0.png", "1.png"],
            "path,label\n0.png,\n1.png, \n",
            "no image has a label; there must be at least two classes",
        ),
        (
            ["0.png", "1.png"],
            "path,label\n0.png,Benign\n1.png,benign\n",
            "the classes Benign and benign differ only in case, spaces or leading zeros",
        ),
        (["0.png", "1.png"], "path,label\n0.png,1\n1.png,01\n", "the classes 01 and 1 differ only in"),
        (["0.png", "1.png"], "path,label\n0.png,1\n1.png,NA\n", "the label NA may be a class or a missing label"),
        (["name/0.png", "other/1.png"], None, "the class name 'name' is reserved for a column of predictions"),
        (["train/0.png", "x.png"], "path,label\ntrain/0.png,a\nx.png,b\n", "x.png is in none of the folders train"),
    ],
)
def test_invalid_layout_raises_error(scans, fetch, names, table, message):
    with pytest.raises(UserError, match=message):
        fetch(scans(names, table))


@pytest.mark.parametrize("names", [["9", "01", "02", "10"], ["10.5", "9.75", "-1"]])
@pytest.mark.parametrize("with_table", [False, True])
def test_numeric_grades_are_ordered_by_value(scans, fetch, names, with_table):
    paths = [f"{name}/{i}.png" for name in names for i in range(3)]
    table = "\n".join(["path,label", *(f"{path},{path.partition('/')[0]}" for path in paths)]) if with_table else None
    card, _ = fetch(scans(paths, table), task="ordinal-regression")
    assert list(card.classes) == sorted(names, key=float)


def test_order_of_named_grades_is_asked(scans, fetch):
    root = scans([f"{name}/{i}.png" for name in ("low", "medium", "high") for i in range(3)])
    with pytest.raises(UserError, match=r"the order of the grades high, low, medium is not known; .* dataset.classes"):
        fetch(root, task="ordinal-regression")
    card, _ = fetch(root, task="ordinal-regression", classes=["low", "medium", "high"])
    assert card.classes == ("low", "medium", "high")


@pytest.mark.parametrize("with_table", [False, True])
def test_missing_value_words_are_class_names(scans, fetch, with_table):
    names = ["NA", "None", "nan", "null", "n/a"] if with_table else ["NA", "None", "nan", "null"]
    paths = [f"{number if with_table else name}/{i}.png" for number, name in enumerate(names) for i in range(3)]
    lines = [f"{path},{names[i // 3]}" for i, path in enumerate(paths)]
    card, folder = fetch(scans(paths, "\n".join(["path,label", *lines]) if with_table else None))
    assert card.classes == tuple(sorted(names))
    assert user_table.image_table(card, folder)["label"].notna().all()


def test_non_images_are_skipped_and_noted(scans, fetch):
    root = scans([*IN_CLASSES, "benign/readme.md", "LICENSE"])
    for name in ("benign/readme.md", "LICENSE"):
        (root / name).write_text("no image")
    card, folder = fetch(root)
    assert len(user_table.image_table(card, folder)) == len(IN_CLASSES)
    assert "2 files are not images and were skipped, such as LICENSE" in card.note


def test_images_are_recognized_by_content(scans, fetch, tmp_path):
    """A class whose files have no usual suffix counts for the layout, too."""
    names = [f"all/{label}/{i}{suffix}" for label, suffix in (("a", ".JPG_large"), ("b", "")) for i in range(12)]
    root = scans([*names, "all/a/x.png"])
    (root / "all/b/phone.HEIC").write_bytes(b"damaged")
    (root / "all/b/phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "all/b/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (root / "all/b/scan.dcm").write_bytes(pydicom_file("MR_truncated.dcm"))
    card, folder = fetch(root)
    assert card.classes == ("a", "b")
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert len(rows) == 28
    problems = rows.dropna(subset="problem").set_index("id")["problem"]
    assert sorted(problems.str.extract("(HEIC or|is not a JPEG|truncated)")[0]) == [
        "HEIC or",
        "is not a JPEG",
        "truncated",
    ]
    assert "DICOM files that cannot be read: 1" in card.note
    assert not any("scan" in name for name in rows["id"])  # the name of a DICOM file may identify the patient


def write_deep(root: Path, names: list[str], maxima: list[int]) -> None:
    """Write 16-bit grayscale PNGs with these largest values."""
    for seed, (name, maximum) in enumerate(zip(names, maxima, strict=True)):
        values = np.random.default_rng(seed).integers(0, maximum + 1, (24, 24)).astype(np.uint16)
        values[3, 4] = maximum
        Image.fromarray(values).save(root / name, "PNG")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_bits_in_use_define_the_pixel_range(scans, fetch, tmp_path, bits):
    """Also in a set that has images of 8 bits."""
    root = scans(IN_CLASSES)
    write_deep(root, IN_CLASSES[:40], [2**bits - 1 - n for n in range(40)])
    card, folder = fetch(root, pixel_range="auto")
    assert card.pixel_range == (0, 2**bits - 1, False)
    assert f"40 of 60 images have more than 8 bits, with values up to {2**bits - 1:,}." in card.note
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert rows["brightness"].min() > 60
    assert rows["problem"].isna().all()


def test_fewer_than_16_bits_are_asked_about(scans, fetch):
    root = scans(IN_CLASSES)
    write_deep(root, IN_CLASSES, [3950] * 60)
    message = r"values up to 3,950 only, of 65,535 .* set dataset.pixel_range to auto, which scales 0 to 4,095, or to"
    with pytest.raises(UserError, match=message):
        fetch(root, pixel_range="ask")
    write_deep(root, IN_CLASSES, [65535] * 60)
    assert fetch(root, pixel_range="ask")[0].pixel_range == (0, 65535, False)


def test_a_bright_outlier_stops_the_import(scans, fetch):
    root = scans(IN_CLASSES)
    write_deep(root, IN_CLASSES, [4000] * 59 + [65535])
    with pytest.raises(UserError, match=r"up to 65,535, but half of them only up to 4,000; set .* \[0, 4095\]"):
        fetch(root)
    assert fetch(root, pixel_range=[0, 4095])[0].pixel_range == (0, 4095, True)


def test_dicom_suffix_of_another_image_is_ignored(scans, fetch):
    card, folder = fetch(scans([*IN_CLASSES, "benign/x.dcm"]))
    assert "benign/x.dcm" in set(user_table.image_table(card, folder)["id"])


def test_files_outside_image_folder_are_ignored(scans, fetch):
    card, folder = fetch(scans([*(f"all/{name}" for name in IN_CLASSES), "README.md", "all/.cache/benign/0.png"]))
    assert card.classes == ("benign", "malignant")
    assert user_table.image_table(card, folder)["id"].tolist() == sorted(IN_CLASSES)


def test_headers_and_cells_are_normalized(scans, fetch):
    names = [f"in/{i}.png" for i in range(4)]
    table = (
        "\ufeff,Path, LABEL ,Patient ID,Split,id,index,note\r\n"
        "1,in\\0.png, a ,7,Train,5,9,x\r\n\r\n2,./in/1.png,b,7.0,TRAIN,6,9,x\r\n3,in/2.png,a,NA,test,7,9,x\r\n"
        "4,in/3.png,b, 8,nan,8,9,x\r\n"
    )
    card, folder = fetch(scans(names, table))
    rows = user_table.image_table(card, folder)
    assert card.classes == ("a", "b")
    assert rows["label"].tolist() == [0, 1, 0, 1]
    assert rows["group"].fillna("-").tolist() == ["7", "7", "-", "8"]
    assert rows["split"].tolist() == ["train_val", "train_val", "test", None]
    assert rows["own_index"].tolist() == [9] * 4
    assert "own_id" not in rows  # may identify a patient
    assert "The group is the column Patient ID. Columns removed because they may identify a patient: id." in card.note


def test_reserved_column_names_are_prefixed(scans, fetch, tmp_path):
    names = [f"{i:02}.png" for i in range(20)]
    extra = ("height", "mode", "sha256", "problem", "contrast", "index", "member", "label_left")
    lines = [f"{n},{'ab'[i % 2]}," + ",".join(["1.5"] * len(extra)) for i, n in enumerate(names)]
    card, folder = fetch(scans(names, "\n".join(["path,label," + ",".join(extra), *lines])))
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert (rows[[f"own_{name}" for name in extra]] == 1.5).all(axis=None)
    assert rows["problem"].isna().all()
    assert {*user_table.RESERVED_COLUMNS} >= {*rows.columns} - {f"own_{name}" for name in extra}


def test_split_folders_apply_without_split_column(scans, fetch):
    names = [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(4)]
    card, folder = fetch(scans(names, "\n".join(["path,label", *(f"{n},{n[-5]}" for n in names)])))
    rows = user_table.image_table(card, folder)
    assert (rows["split"] == rows["id"].str.split("/").str[0]).all()


def test_unparsed_labels_keep_their_text(scans, fetch):
    names = [f"{i}.png" for i in range(4)]
    root = scans(names, "path,label\n0.png,1\n1.png,2\n2.png,0\n3.png,maligant\n")
    card, folder = fetch(root, classes=["1", "2"])
    rows = user_table.image_table(card, folder)
    assert rows["label"].fillna(-1).tolist() == [0, 1, -1, -1]  # numeric class names are not indices
    assert rows[user_table.UNPARSED_LABEL].dropna().tolist() == ["label 0", "label maligant"]
    root = scans(names, "path,mass,oedema\n0.png,1,0\n1.png,0,1\n2.png,2,0\n3.png,1,maybe\n")
    rows = user_table.image_table(*fetch(root, classes=["mass", "oedema"]))
    assert rows[user_table.UNPARSED_LABEL].dropna().tolist() == ["mass 2, oedema 0", "mass 1, oedema maybe"]


def encode_dicom(patient: str | None, seed: int = 0, frames: int = 1, **elements: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24), dtype=np.uint8)
    multi_frame = {
        "NumberOfFrames": frames,
        "PixelData": b"".join((pixels ^ frame).tobytes() for frame in range(frames)),
    }
    return make_dicom(
        pixels, **({"PatientID": patient} if patient else {}), **(multi_frame if frames > 1 else {}), **elements
    )


@pytest.fixture
def dicom_folder(tmp_path):
    """Write DICOM files of six patients under identifying names; two have no suffix, as some scanners write them."""
    root = tmp_path / "scans"
    for number in range(12):
        names = (f"DOE_JOHN_{number // 2}_{number}.dcm", f"1.2.840.{number}", f"{number}.IMA")
        path = root / "ab"[number % 2] / names[number if number in (1, 2) else 0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_dicom(f"patient {number // 2}", number, PatientSex="F", PatientAge="054Y"))
    (root / "DICOMDIR").write_bytes(pydicom_file("DICOMDIR"))
    (root / "a" / "report").write_bytes(pydicom_file("reportsi.dcm"))
    return root


def test_dicom_keeps_group_and_hides_identity(dicom_folder, fetch, tmp_path):
    card, folder = fetch(dicom_folder)
    rows = user_table.image_table(card, folder)
    assert len(rows) == 12
    assert rows["group"].nunique() == 6
    assert rows["label"].value_counts().to_dict() == {0: 6, 1: 6}
    assert rows["id"].str.fullmatch(r"dicom/[0-9a-f]{16}\.png").all()
    assert (rows["sex"].unique().tolist(), rows["age"].unique().tolist()) == (["F"], [54])
    assert "2 files are not images and were skipped, such as DICOMDIR" in card.note
    for path in folder.iterdir():
        assert b"DOE" not in path.read_bytes()
    names_by_pseudonym = dict(source.iter_dicom_names(dicom_folder, tmp_path / "salt"))
    assert {f"{pseudonym}.png" for pseudonym in names_by_pseudonym} == set(rows["id"])
    assert "a/DOE_JOHN_0_0.dcm" in names_by_pseudonym.values()


def test_table_extends_dicom_metadata_without_identity(dicom_folder, fetch):
    names = sorted(path.relative_to(dicom_folder).as_posix() for path in dicom_folder.rglob("*") if path.is_file())
    names = [name for name in names if "report" not in name and "DICOMDIR" not in name]
    lines = [
        f"{name},{i % 2},{'patient 0' if i == 3 else ''},{'M' if i == 0 else ''},Doe^John"
        for i, name in enumerate(names)
    ]
    (dicom_folder / "labels.csv").write_text("\n".join(["path,label,group,sex,PatientName", *lines]))
    card, folder = fetch(dicom_folder)
    rows = user_table.image_table(card, folder)
    assert rows["group"].notna().all()  # missing groups are filled in from the DICOM files
    hashed_group = rows["group"].iloc[3]
    assert hashed_group in set(fetch(dicom_folder)[0] and user_table.image_table(card, folder)["group"])
    assert sorted(rows["sex"].unique()) == ["F", "M"]
    assert b"Doe" not in (folder / user_table.LABELS_FILE).read_bytes()
    assert "patient 0" not in (folder / user_table.LABELS_FILE).read_text()


def test_frames_of_anonymous_dicom_stay_in_one_split(tmp_path, fetch):
    for number in range(8):
        path = tmp_path / "scans" / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_dicom(None, number, frames=6))
    card, folder = fetch(tmp_path / "scans")
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert len(rows) == 48
    assert rows["group"].nunique() == 8
    assert rows.groupby("group")["split"].nunique().max() == 1


def test_damaged_images_are_no_duplicates(scans, fetch, tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    root = scans(names, "\n".join(["path,label,group", *(f"{n},{i % 2},p{i // 4}" for i, n in enumerate(names))]))
    for i in range(0, 40, 4):
        (root / names[i]).write_bytes(b"")
    imported = build_default_manifest(*fetch(root), tmp_path / "splits")
    assert len(set(manifest.leakage_clusters(imported.rows, imported.near_duplicates))) == 10
    assert set(imported.rows["split"]) == {"train", "val", "test"}


def test_split_depends_on_labels(scans, fetch, tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    split_files = []
    for rule in (lambda i: i % 2, lambda i: i // 20):
        root = scans(names, "\n".join(["path,label", *(f"{n},{rule(i)}" for i, n in enumerate(names))]))
        imported = build_default_manifest(*fetch(root), tmp_path / "splits")
        split_files.append(imported.split)
        assert imported.rows.groupby("split")["label"].mean().between(0.4, 0.6).all()
    assert split_files[0] != split_files[1]


@pytest.mark.parametrize(
    ("file_name", "name"),
    [("2024.01.05 export", "own-2024.01.05-export"), ("scans.tar.gz", "own-scans"), ("Scans.ZIP", "own-Scans")],
)
def test_dataset_name_drops_archive_suffix(scans, fetch, tmp_path, file_name, name):
    assert fetch(scans(IN_CLASSES).rename(tmp_path / file_name))[0].name == name


def test_ordinal_task_is_set_by_the_user(fetch, scans):
    names = [f"{grade}/{i}.png" for grade in (10, 9, 2) for i in range(3)]
    root = scans(names)
    card = fetch(root, task="ordinal-regression")[0]
    assert (card.task, card.classes) == ("ordinal-regression", ("2", "9", "10"))
    assert fetch(root)[0].task == "multi-class"
    with pytest.raises(
        UserError, match=r"dataset.task is multi-label, binary-class, but the labels in .* are multi-class"
    ):
        fetch(root, task="multi-label, binary-class")


def test_full_disk_raises_error_before_copying(fetch, scans, monkeypatch):
    root = scans(IN_CLASSES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(
        UserError, match=r"not enough disk space for the copy of the images: .*B are needed, but only 0\.00B"
    ):
        fetch(root)


def test_real_mednist_sample(fetch, real_data, tmp_path):
    card, folder = fetch(real_data / "mednist" / "mednist.zip")
    assert len(card.classes) == 6
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert len(rows) == 1800
    assert rows["problem"].isna().all()
    assert pd.crosstab(rows["label"], rows["split"]).loc[:, "train"].between(205, 215).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1.0", "2", None], ["1", "2", None]),
        (["007", "7", "1.0"], ["007", "7", "1.0"]),
        (["1e5", "2.0"], ["1e5", "2.0"]),
        (["1.5", "2.0"], ["1.5", "2.0"]),
    ],
)
def test_names_that_look_like_numbers_stay_text(values, expected):
    assert labels_csv._integers_as_text(pd.Series(values, dtype=object)).tolist() == expected
