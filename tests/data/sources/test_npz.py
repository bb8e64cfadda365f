"""A user's own archive: read as a stream, never unpickled, and told what is wrong with it."""

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


def test_the_card_says_what_the_archive_holds(archive, out):
    facts = npz.import_archive(archive(channels=1, classes=2), ["normal", "pneumonia"], None, out)
    assert (facts.task, facts.classes, facts.size, facts.channels) == ("binary-class", ("normal", "pneumonia"), 16, 1)
    assert (out / "scans.npz").is_file()
    assert npz.import_archive(archive(classes=4), None, None, out).classes == (
        "class 0",
        "class 1",
        "class 2",
        "class 3",
    )
    with pytest.raises(UserError, match=r"dataset\.classes names 2 classes, but the labels of .* have 3"):
        npz.import_archive(archive(), ["a", "b"], None, out)


def test_several_label_columns_are_findings(archive, out):
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
        ({"train_groups": np.arange(10)}, r"train_groups is int64 \(10,\); expected one name or integer for each of 60"),
        ({"train_groups": np.zeros((60, 1), int)}, "expected one name or integer"),
        ({"train_groups": np.arange(60) + 0.5}, "train_groups has non-integer numbers; a group is a name or an integer"),
        ({"val_groups": np.array([b"\xff\xfe"] * 20)}, "val_groups has names that are not UTF-8"),
        ({"val_labels": np.full((20, 1), 2**32 - 1, np.uint32)}, "has the label 4,294,967,295; a label is the number"),
        ({f"{split}_labels": np.zeros((count, 0), int) for split, count in COUNTS.items()}, "so it is empty"),
        ({"val_images": np.zeros((20, 0, 0), np.uint8)}, r"val_images has the shape \(20, 0, 0\), so it is empty"),
    ],
)
def test_arrays_that_do_not_fit_are_told(archive, out, arrays, message):
    with pytest.raises(UserError, match=message):
        npz.import_archive(archive(**arrays), None, None, out)


def test_a_patient_is_the_same_however_the_number_is_stored(archive):
    whole, fractions = np.arange(60), np.arange(60, dtype=float)
    fractions[3] = np.nan
    names = np.array([str(i) if i != 3 else "" for i in range(60)])
    expected = [str(i) if i != 3 else None for i in range(60)]
    for groups in (fractions, names, names.astype("S")):
        found = npz.read_groups(archive(train_groups=groups), "train", 60)
        assert [None if pd.isna(group) else group for group in found] == expected
    assert npz.read_groups(archive(train_groups=whole), "train", 60).tolist() == [str(i) for i in range(60)]
    assert npz.read_groups(archive(), "train", 60).isna().all()


@pytest.mark.parametrize("share", [0.1, 0.999])
def test_a_truncated_archive_is_told(archive, out, share):
    path = archive()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="truncated or damaged"):
        npz.import_archive(path, None, None, out)


def test_an_archive_of_another_name_is_read_like_any(archive, out):
    facts = npz.import_archive(archive().rename(out.parent / "Scans.NPZ"), None, None, out)
    assert facts.file == "Scans.npz"
    assert len(npz.image_table(facts, out)) == sum(COUNTS.values())


def test_an_encrypted_archive_is_told(archive, out):
    path = archive()
    data = bytearray(path.read_bytes())
    for at in (data.index(b"PK\x01\x02") + 8, data.index(b"PK\x03\x04") + 6):
        data[at] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"truncated or damaged at train_images .*encrypted"):
        npz.import_archive(path, None, None, out)


def test_a_missing_file_is_told(tmp_path, out):
    with pytest.raises(UserError, match=r"no such file; dataset\.root must name"):
        npz.import_archive(tmp_path / "none.npz", None, None, out)


@given(
    array=arrays.arrays(
        st.sampled_from([np.uint8, np.int64]), arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
    ),
    at_once=st.integers(1, 100),
)
def test_streaming_gives_what_numpy_gives(tmp_path_factory, array, at_once):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, images=array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npz, "CHUNK_BYTES", at_once)
        np.testing.assert_array_equal(npz.read_array(path, "images"), array)
