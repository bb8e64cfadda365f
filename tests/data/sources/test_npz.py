"""A user's own npz archive: streamed, never unpickled, and validated with clear errors."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fadeformer.data.sources import npz
from fadeformer.errors import UserError
from tests.data.conftest import COUNTS


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_card_describes_archive(archive, out):
    card = npz.import_archive(archive(channels=1, classes=2), ["normal", "pneumonia"], None, out)
    assert (card.task, card.classes, card.size, card.channels) == ("binary-class", ("normal", "pneumonia"), 16, 1)
    assert (out / "scans.npz").is_file()
    assert npz.import_archive(archive(classes=4), None, None, out).classes == (
        "class 0",
        "class 1",
        "class 2",
        "class 3",
    )
    with pytest.raises(UserError, match=r"dataset\.classes names 2 classes, but the labels of .* have 3"):
        npz.import_archive(archive(), ["a", "b"], None, out)


def test_several_label_columns_are_multi_label(archive, out):
    findings = np.eye(3, dtype=int)
    labels = {f"{split}_labels": findings[np.arange(count) % 3] for split, count in COUNTS.items()}
    with pytest.raises(
        UserError, match=r"every image has exactly one of 3 labels, as one-hot classes have; save their"
    ):
        npz.import_archive(archive(**labels), None, None, out)
    assert (
        npz.import_archive(archive(**labels), None, "multi-label, binary-class", out).task
        == "multi-label, binary-class"
    )
    findings[0] = 1
    labels = {f"{split}_labels": findings[np.arange(count) % 3] for split, count in COUNTS.items()}
    assert npz.import_archive(archive(**labels), None, None, out).task == "multi-label, binary-class"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"val_images": np.zeros((20, 16, 16, 4), np.uint8)}, r"expected uint8 of shape \(N, S, S\)"),
        ({"test_labels": np.zeros((30, 1))}, "test_labels is float64"),
        ({"train_labels": np.zeros((60, 3), int)}, "different numbers of columns"),
        (
            {"train_groups": np.arange(10)},
            r"train_groups is int64 \(10,\); expected one name or integer for each of 60",
        ),
        ({"train_groups": np.zeros((60, 1), int)}, "expected one name or integer"),
        (
            {"train_groups": np.arange(60) + 0.5},
            "train_groups has non-integer numbers; a group is a name or an integer",
        ),
        ({"val_groups": np.array([b"\xff\xfe"] * 20)}, "val_groups has names that are not UTF-8"),
        ({"val_labels": np.full((20, 1), 2**32 - 1, np.uint32)}, "has the label 4,294,967,295; a label is the number"),
        ({f"{split}_labels": np.zeros((count, 0), int) for split, count in COUNTS.items()}, "so it is empty"),
        ({"val_images": np.zeros((20, 0, 0), np.uint8)}, r"val_images has the shape \(20, 0, 0\), so it is empty"),
    ],
)
def test_invalid_arrays_raise_error(archive, out, arrays, message):
    with pytest.raises(UserError, match=message):
        npz.import_archive(archive(**arrays), None, None, out)


def test_group_ids_do_not_depend_on_dtype(archive):
    integers, floats = np.arange(60), np.arange(60, dtype=float)
    floats[3] = np.nan
    names = np.array([str(i) if i != 3 else "" for i in range(60)])
    expected = [str(i) if i != 3 else None for i in range(60)]
    for groups in (floats, names, names.astype("S")):
        ids = npz.read_groups(archive(train_groups=groups), "train", 60)
        assert [None if pd.isna(group) else group for group in ids] == expected
    assert npz.read_groups(archive(train_groups=integers), "train", 60).tolist() == [str(i) for i in range(60)]
    assert npz.read_groups(archive(), "train", 60).isna().all()


@pytest.mark.parametrize("share", [0.1, 0.999])
def test_truncated_archive_raises_error(archive, out, share):
    path = archive()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="truncated or damaged"):
        npz.import_archive(path, None, None, out)


def test_uppercase_suffix_is_accepted(archive, out):
    card = npz.import_archive(archive().rename(out.parent / "Scans.NPZ"), None, None, out)
    assert card.file == "Scans.npz"
    assert len(npz.image_table(card, out)) == sum(COUNTS.values())


def test_encrypted_archive_raises_error(archive, out):
    path = archive()
    data = bytearray(path.read_bytes())
    for at in (data.index(b"PK\x01\x02") + 8, data.index(b"PK\x03\x04") + 6):
        data[at] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"truncated or damaged at train_images .*encrypted"):
        npz.import_archive(path, None, None, out)


def test_missing_archive_raises_error(tmp_path, out):
    with pytest.raises(UserError, match=r"no such file; dataset\.root must name"):
        npz.import_archive(tmp_path / "none.npz", None, None, out)


@given(
    array=arrays.arrays(
        st.sampled_from([np.uint8, np.int64]), arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
    ),
    chunk_bytes=st.integers(1, 100),
)
def test_streamed_array_equals_numpy(tmp_path_factory, array, chunk_bytes):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, images=array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npz, "CHUNK_BYTES", chunk_bytes)
        np.testing.assert_array_equal(npz.read_array(path, "images"), array)
