"""A user's own folder of images, in each of its layouts."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.datasets import packed
from fadeformer.errors import UserError
from tests.datasets.conftest import built


def picture(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    held = io.BytesIO()
    small.resize((24 + seed % 3, 24), Image.Resampling.BICUBIC).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def scans(tmp_path):
    """Writes a folder of images by their names."""

    def write(names, table=None) -> Path:
        folder = tmp_path / "scans"
        for seed, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(seed))
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


def test_folders_of_splits_and_classes(scans, fetch):
    facts, folder = fetch(scans(IN_SPLITS))
    rows = packed.table(facts, folder)
    assert (facts.task, facts.classes, facts.name) == ("multi-class", ("a", "b", "c"), "own-scans")
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (s, c): 4 for s in ("train", "val", "test") for c in range(3)
    }
    assert rows["id"].is_unique
    assert rows["group"].isna().all()


def test_folders_of_classes_get_a_split(scans, fetch, tmp_path):
    facts, folder = fetch(scans(IN_CLASSES))
    assert (facts.task, facts.classes) == ("binary-class", ("benign", "malignant"))
    rows = built(facts, folder, tmp_path / "splits").rows
    assert rows.groupby(["split", "label"]).size().to_dict() == {
        (s, c): n for s, n in (("train", 21), ("val", 3), ("test", 6)) for c in range(2)
    }


def test_train_and_test_alone_give_up_some_of_train_for_val(scans, fetch, tmp_path):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("a", "b") for i in range(16)]
    facts, folder = fetch(scans(names))
    rows = built(facts, folder, tmp_path / "splits").rows
    assert rows["split"].value_counts().to_dict() == {"test": 32, "train": 28, "val": 4}


def test_a_zip_and_a_folder_round_it_are_the_same_as_the_folder(scans, fetch, tmp_path):
    root = scans(IN_CLASSES)
    plain = fetch(root)[0]
    with zipfile.ZipFile(tmp_path / "scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, f"my scans/{path.relative_to(root)}")
        archive.writestr("__MACOSX/my scans/._0.png", b"rubbish")
    assert fetch(tmp_path / "scans.zip")[0] == plain


def test_a_table_says_label_group_split_and_whatever_else(scans, fetch):
    names = [f"{i:02}.png" for i in range(12)]
    lines = [
        f"./{n},{'yes' if i % 2 else 'no'},p{i // 2},{('train', 'Validation', 'test')[i % 3]},{40 + i}"
        for i, n in enumerate(names)
    ]
    facts, folder = fetch(scans(names, "\n".join(["path,label,group,split,age", *lines])))
    rows = packed.table(facts, folder)
    assert facts.classes == ("no", "yes")
    assert rows["label"].tolist() == [0, 1] * 6
    assert rows["group"].tolist() == [f"p{i // 2}" for i in range(12)]
    assert rows["split"].tolist() == ["train", "val", "test"] * 4
    assert rows["age"].tolist() == list(range(40, 52))


def test_columns_of_findings_are_told_by_the_classes(scans, fetch):
    names = [f"{i}.png" for i in range(8)]
    lines = [f"{n},{i % 2},{int(i > 4)},{60 + i}" for i, n in enumerate(names)]
    root = scans(names, "\n".join(["path,oedema,mass,age", *lines]))
    facts, folder = fetch(root, classes=["mass", "oedema"])
    rows = packed.table(facts, folder)
    assert (facts.task, facts.classes) == ("multi-label, binary-class", ("mass", "oedema"))
    assert rows["label_0"].tolist() == [0] * 5 + [1] * 3
    assert rows["label_1"].tolist() == [0, 1] * 4
    assert "age" in rows
    assert "mass" not in rows
    with pytest.raises(UserError, match=r"has no column label; its columns of 0 and 1 are findings if dataset.classes"):
        fetch(root)


def test_labels_that_are_no_class_have_no_label(scans, fetch):
    names = [f"{i}.png" for i in range(6)]
    root = scans(names, "path,label\n0.png,a\n1.png,b\n2.png,c\n3.png,\n4.png,1\n5.png,9\n")
    facts, folder = fetch(root, classes=["a", "b"])
    label = packed.table(facts, folder)["label"]
    assert label.dropna().to_dict() == {0: 0, 1: 1, 4: 1}


def test_numbers_as_labels_are_in_the_order_of_numbers(scans, fetch):
    names = [f"{i}.png" for i in range(12)]
    root = scans(names, "\n".join(["path,label", *(f"{n},{i}" for i, n in enumerate(names))]))
    assert fetch(root)[0].classes == tuple(str(i) for i in range(12))


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        ([], None, "no such file or folder; dataset.root must name your images"),
        (["a/notes.txt"], None, "holds no image"),
        (["0.png", "1.png"], None, "0.png lies in no class; put images in CLASS/"),
        ([*IN_SPLITS, "other/a/0.png"], None, "other/a/0.png lies in none of the folders train, val and test"),
        (["train/a/b/0.png", "train/c/0.png"], None, "train/a/b/0.png lies in no class"),
        (["0.png"], "file,label\n0.png,a\n", "has the columns file, label; it needs path"),
        (["0.png"], "path,label\n0.png,a\n1.png,b\n", "names 1 files that are not there, such as 1.png"),
        (["0.png", "1.png"], "path,label\n0.png,a\n", "1 images are not in labels.csv, such as 1.png"),
        (["0.png"], "path,label\n0.png,a\n./0.png,b\n", "names 0.png twice"),
        (["0.png"], "path,label\n,a\n", "line 2: no path"),
        (["0.png"], "path,label,split\n0.png,a,dev\n", "gives 0.png the split 'dev'"),
        (["0.png"], "", "labels.csv cannot be read as a table"),
    ],
)
def test_a_layout_that_cannot_be_read_is_told(scans, fetch, names, table, message):
    with pytest.raises(UserError, match=message):
        fetch(scans(names, table))


def test_what_is_no_image_is_left_out_and_told(scans, fetch):
    facts, folder = fetch(scans([*IN_CLASSES, "benign/readme.md", "LICENSE"]))
    assert len(packed.table(facts, folder)) == len(IN_CLASSES)
    assert "2 files are no images and are left out, such as benign/readme.md" in facts.note


def test_a_class_that_is_not_named_is_told(scans, fetch):
    with pytest.raises(UserError, match=r"there is a folder malignant, but dataset.classes names benign, other"):
        fetch(scans(IN_CLASSES), classes=["benign", "other"])


def test_damaged_images_come_as_far_as_the_gate(scans, fetch, tmp_path):
    root = scans(IN_CLASSES)
    (root / "benign/3.png").write_bytes(picture(3)[:-40])
    (root / "benign/4.png").write_bytes(b"")
    facts, folder = fetch(root)
    problems = built(facts, folder, tmp_path / "splits").rows.set_index("id")["problem"].dropna()
    assert set(problems.index) == {"benign/3.png", "benign/4.png"}


def test_grades_in_an_order_are_told_by_the_user(fetch, scans):
    names = [f"{grade}/{i}.png" for grade in (10, 9, 2) for i in range(3)]
    root = scans(names)
    facts = fetch(root, task="ordinal-regression")[0]
    assert (facts.task, facts.classes) == ("ordinal-regression", ("2", "9", "10"))
    assert fetch(root)[0].task == "multi-class"
    with pytest.raises(
        UserError, match=r"dataset.task is multi-label, binary-class, but the labels of .* are multi-class"
    ):
        fetch(root, task="multi-label, binary-class")


def test_a_disk_without_room_is_told_before_anything_is_copied(fetch, scans, monkeypatch):
    root = scans(IN_CLASSES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"too little room for the copy of the images: it needs .*B more, and 0\.00B"):
        fetch(root)


@pytest.mark.real_data
def test_mednist(fetch, real_data, tmp_path):
    facts, folder = fetch(real_data / "mednist" / "mednist.zip")
    assert len(facts.classes) == 6
    rows = built(facts, folder, tmp_path / "splits").rows
    assert len(rows) == 1800
    assert rows["problem"].isna().all()
    assert pd.crosstab(rows["label"], rows["split"]).loc[:, "train"].between(205, 215).all()
