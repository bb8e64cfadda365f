"""Splits that are made, repaired, written down and read."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.data import splits
from fadeformer.errors import UserError

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
NO_PAIRS = np.empty((0, 2), np.int64)


def patients(count: int, seed: int) -> np.ndarray:
    """A cluster number for each image, one to six images each."""
    random = np.random.default_rng(seed)
    return np.repeat(np.arange(count), random.integers(1, 7, count))


@given(st.integers(0, 1000), st.integers(2, 6), st.booleans())
def test_a_split_keeps_clusters_whole_and_labels_in_balance(seed, classes, many):
    random = np.random.default_rng(seed)
    cluster = patients(300, seed)
    if many:
        labels = pd.DataFrame((random.random((len(cluster), classes)) < 0.3).astype(int))
    else:
        labels = pd.DataFrame({"label": random.integers(0, classes, len(cluster))})
    present = splits.label_indicators(labels, classes, many)
    split = splits.assign(present, cluster, SHARES, seed)
    assert pd.Series(split).groupby(cluster).nunique().max() == 1
    for label in present.T:
        for name, share in SHARES.items():
            wanted = share * label.sum()
            assert abs((split[label] == name).sum() - wanted) <= max(6, 0.1 * wanted)


def test_the_same_seed_makes_the_same_split_and_another_another():
    cluster = patients(200, 0)
    present = splits.label_indicators(pd.DataFrame({"label": cluster % 3}), 3, False)
    first, again, other = (splits.assign(present, cluster, SHARES, seed) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_rare_labels_reach_every_split():
    label = np.array([0] * 950 + [1] * 10)
    split = splits.assign(splits.label_indicators(pd.DataFrame({"label": label}), 2, False), np.arange(960), SHARES, 0)
    assert {name: int((split[label == 1] == name).sum()) for name in SHARES} == {"train": 7, "val": 1, "test": 2}


def test_an_image_without_a_label_has_a_split_too():
    labels = pd.DataFrame({"label": pd.array([0, 1, None] * 30, dtype="Int64")})
    split = splits.assign(splits.label_indicators(labels, 2, False), np.arange(90), SHARES, 0)
    assert set(split) == set(SHARES)
    assert abs((split == "train").sum() - 63) <= 3


def test_only_what_is_not_split_yet_is_dealt():
    rows = pd.DataFrame({"split": ["test"] * 50 + [splits.TRAIN_VAL] * 80})
    present = splits.label_indicators(pd.DataFrame({"label": np.arange(130) % 2}), 2, False)
    split = splits.complete(rows, present, np.arange(130), [0.6, 0.2, 0.2], 0)
    assert (split[:50] == "test").all()
    assert {name: int((split[50:] == name).sum()) for name in ("train", "val")} == {"train": 60, "val": 20}
    assert rows["split"].iloc[-1] == splits.TRAIN_VAL  # the table itself is left alone


def test_one_finding_is_present_or_not():
    labels = pd.DataFrame({"label_0": [1, 0, 1]})
    assert splits.label_indicators(labels, 1, True).tolist() == [[True, False], [False, True], [True, False]]


def test_images_without_a_split_go_where_the_rest_of_their_group_is():
    rows = pd.DataFrame({"split": ["test", None, None, "train", None] + [None] * 95})
    cluster = np.array([0, 0, 0, 1, 1, *range(2, 97)])
    split = splits.complete(rows, np.ones((100, 1), bool), cluster, [0.7, 0.1, 0.2], 0)
    assert split[:5].tolist() == ["test"] * 3 + ["train"] * 2
    assert set(split[5:]) == {"train", "val", "test"}


def test_clusters_join_groups_through_copies():
    groups = pd.Series(["a", None, "b", "a", None, "c"], dtype="string")
    cluster = splits.connected_clusters(6, groups, np.array([[1, 2], [2, 3]]))
    assert len(set(cluster[[0, 1, 2, 3]])) == 1
    assert len(set(cluster)) == 3
    assert len(set(splits.connected_clusters(6, pd.Series([None] * 6, dtype="string"), NO_PAIRS))) == 6


def test_a_repaired_split_keeps_what_is_whole_and_the_balance_of_classes():
    split = np.array(["train", "val", "test"] * 20 + ["train"] * 70 + ["val"] * 10 + ["test"] * 20, dtype=object)
    cluster = np.concatenate([np.arange(60) // 3, np.arange(100, 200)])
    label = np.concatenate([np.arange(60) // 3 % 2, np.arange(100) % 2])
    present = splits.label_indicators(pd.DataFrame({"label": label}), 2, False)
    after = splits.repair(split, present, cluster)
    assert (after[60:] == split[60:]).all()
    assert pd.Series(after).groupby(cluster).nunique().max() == 1
    before = pd.crosstab(split, label)
    assert (pd.crosstab(after, label) - before).abs().max(axis=None) <= 3
    whole = np.arange(160)
    assert (splits.repair(split, present, whole) == split).all()


def test_a_repaired_split_does_not_empty_a_small_part():
    split = np.array(["train", "train", "val"] * 6 + ["test"] * 6, dtype=object)
    cluster = np.concatenate([np.arange(18) // 3, np.arange(6, 12)])
    after = splits.repair(split, np.ones((24, 1), bool), cluster)
    assert pd.Series(after).value_counts().to_dict() == {"train": 12, "val": 6, "test": 6}


def test_a_split_that_was_written_down_is_read_in_any_order(tmp_path):
    ids = pd.Series(["a", "b", "c"])
    splits.write_split_file(tmp_path / "split.csv", ids, np.array(["train", "val", "test"], dtype=object))
    assert splits.read_split_file(tmp_path / "split.csv", pd.Series(["c", "a"])).tolist() == ["test", "train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,split\na,train\n", "1 images have no split in it, such as b"),
        ("id,split\na,train\nb,dev\n", "line 3 has split 'dev'; it is train, val or test"),
        ("id,split\na,train\nb,\n", "line 3 has split ''"),
        ("id,split\na,train\nb,val\na,test\n", "names a twice"),
        ("name,part\na,train\n", "has the columns name, part; a split has id and split"),
        ("", "cannot be read as a split"),
        ('id,split\n"a,train\n', "cannot be read as a split"),
    ],
)
def test_a_file_that_is_no_split_is_told(tmp_path, text, message):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        splits.read_split_file(tmp_path / "split.csv", pd.Series(["a", "b"]))


def test_a_made_split_is_named_after_all_that_decides_it():
    rows, present = pd.DataFrame({"id": ["a", "b"], "split": [None, None]}), np.eye(2, dtype=bool)
    names = {
        splits.cache_key(rows, present, np.array([0, 1]), [0.7, 0.1, 0.2], 0),
        splits.cache_key(rows, present, np.array([0, 0]), [0.7, 0.1, 0.2], 0),
        splits.cache_key(rows, present, np.array([0, 1]), [0.6, 0.2, 0.2], 0),
        splits.cache_key(rows, present, np.array([0, 1]), [0.7, 0.1, 0.2], 1),
        splits.cache_key(rows.assign(id=["a", "c"]), present, np.array([0, 1]), [0.7, 0.1, 0.2], 0),
        splits.cache_key(rows, present[::-1], np.array([0, 1]), [0.7, 0.1, 0.2], 0),
    }
    assert len(names) == 6
