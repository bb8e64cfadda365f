"""Group-stratified splits: assignment, repair, and split files."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.data import splits
from fadeformer.errors import UserError

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
NO_PAIRS = np.empty((0, 2), np.int64)


def patients(count: int, seed: int) -> np.ndarray:
    """Cluster number of each image, with one to six images per cluster."""
    random = np.random.default_rng(seed)
    return np.repeat(np.arange(count), random.integers(1, 7, count))


@given(st.integers(0, 1000), st.integers(2, 6), st.booleans())
def test_splits_keep_clusters_together_and_labels_balanced(seed, classes, multi_label):
    random = np.random.default_rng(seed)
    cluster = patients(300, seed)
    if multi_label:
        labels = pd.DataFrame((random.random((len(cluster), classes)) < 0.3).astype(int))
    else:
        labels = pd.DataFrame({"label": random.integers(0, classes, len(cluster))})
    present = splits.label_indicators(labels, classes, multi_label)
    split = splits.assign(present, cluster, FRACTIONS, seed)
    assert pd.Series(split).groupby(cluster).nunique().max() == 1
    for label in present.T:
        for name, fraction in FRACTIONS.items():
            expected = fraction * label.sum()
            assert abs((split[label] == name).sum() - expected) <= max(6, 0.1 * expected)


def test_split_depends_on_the_seed():
    cluster = patients(200, 0)
    present = splits.label_indicators(pd.DataFrame({"label": cluster % 3}), 3, False)
    first, again, other = (splits.assign(present, cluster, FRACTIONS, seed) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_rare_labels_reach_every_split():
    label = np.array([0] * 950 + [1] * 10)
    split = splits.assign(
        splits.label_indicators(pd.DataFrame({"label": label}), 2, False), np.arange(960), FRACTIONS, 0
    )
    assert {name: int((split[label == 1] == name).sum()) for name in FRACTIONS} == {"train": 7, "val": 1, "test": 2}


@pytest.mark.parametrize("rare", [3, 4, 5])
def test_class_of_three_patients_reaches_every_split(rare):
    for seed in range(50):
        cluster = patients(100, seed)
        labels = pd.DataFrame({"label": np.where(cluster < rare, 1, cluster % 2 * 2)})
        present = splits.label_indicators(labels, 3, False)
        split = splits.assign(present, cluster, FRACTIONS, seed)
        assert set(split[present[:, 1]]) == set(FRACTIONS)
        assert pd.Series(split).groupby(cluster).nunique().max() == 1
        assert abs((split == "train").mean() - 0.7) < 0.05


def test_smallest_patients_of_rare_class_leave_train():
    sizes = [20, 1, 2]
    cluster = np.concatenate([np.repeat([0, 1, 2], sizes), np.arange(3, 203)])
    present = splits.label_indicators(pd.DataFrame({"label": (cluster < 3).astype(int)}), 2, False)
    split = splits.assign(present, cluster, FRACTIONS, 0)
    assert [split[cluster == c][0] for c in range(3)] == ["train", "val", "test"]


def test_two_rare_findings_both_reach_every_split():
    for seed in range(20):
        random = np.random.default_rng(seed)
        findings = np.zeros((200, 3), dtype=int)
        findings[:, 0] = random.random(200) < 0.3
        findings[:4, 1], findings[2:6, 2] = 1, 1  # two patients have both
        present = splits.label_indicators(pd.DataFrame(findings), 3, True)
        split = splits.assign(present, np.arange(200), FRACTIONS, seed)
        assert all(set(split[present[:, c]]) == set(FRACTIONS) for c in range(4))


def test_class_of_two_patients_is_assigned():
    label = np.array([0] * 98 + [1] * 2)
    present = splits.label_indicators(pd.DataFrame({"label": label}), 2, False)
    assert len(set(splits.assign(present, np.arange(100), FRACTIONS, 0)[label == 1])) <= 2


def test_unlabeled_images_are_assigned():
    labels = pd.DataFrame({"label": pd.array([0, 1, None] * 30, dtype="Int64")})
    split = splits.assign(splits.label_indicators(labels, 2, False), np.arange(90), FRACTIONS, 0)
    assert set(split) == set(FRACTIONS)
    assert abs((split == "train").sum() - 63) <= 3


def test_complete_keeps_given_splits():
    rows = pd.DataFrame({"split": ["test"] * 50 + [splits.TRAIN_VAL] * 80})
    present = splits.label_indicators(pd.DataFrame({"label": np.arange(130) % 2}), 2, False)
    split = splits.complete(rows, present, np.arange(130), [0.6, 0.2, 0.2], 0)
    assert (split[:50] == "test").all()
    assert {name: int((split[50:] == name).sum()) for name in ("train", "val")} == {"train": 60, "val": 20}
    assert rows["split"].iloc[-1] == splits.TRAIN_VAL  # the input table is unchanged


def test_single_finding_has_a_no_finding_column():
    labels = pd.DataFrame({"label_0": [1, 0, 1]})
    assert splits.label_indicators(labels, 1, True).tolist() == [[True, False], [False, True], [True, False]]


def test_images_without_split_follow_their_cluster():
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


def test_repair_moves_only_spread_clusters():
    split = np.array(["train", "val", "test"] * 20 + ["train"] * 70 + ["val"] * 10 + ["test"] * 20, dtype=object)
    cluster = np.concatenate([np.arange(60) // 3, np.arange(100, 200)])
    label = np.concatenate([np.arange(60) // 3 % 2, np.arange(100) % 2])
    present = splits.label_indicators(pd.DataFrame({"label": label}), 2, False)
    repaired = splits.repair(split, present, cluster)
    assert (repaired[60:] == split[60:]).all()
    assert pd.Series(repaired).groupby(cluster).nunique().max() == 1
    before = pd.crosstab(split, label)
    assert (pd.crosstab(repaired, label) - before).abs().max(axis=None) <= 3
    singletons = np.arange(160)
    assert (splits.repair(split, present, singletons) == split).all()


def test_repair_keeps_small_splits_populated():
    split = np.array(["train", "train", "val"] * 6 + ["test"] * 6, dtype=object)
    cluster = np.concatenate([np.arange(18) // 3, np.arange(6, 12)])
    repaired = splits.repair(split, np.ones((24, 1), bool), cluster)
    assert pd.Series(repaired).value_counts().to_dict() == {"train": 12, "val": 6, "test": 6}


def test_split_file_is_read_in_id_order(tmp_path):
    ids = pd.Series(["a", "b", "c"])
    splits.write_split_file(tmp_path / "split.csv", ids, np.array(["train", "val", "test"], dtype=object))
    assert splits.read_split_file(tmp_path / "split.csv", pd.Series(["c", "a"])).tolist() == ["test", "train"]


def test_split_file_with_semicolons_is_read(tmp_path):
    (tmp_path / "split.csv").write_text("sep=;\nid;split\na;train\nb;test\n")
    assert splits.read_split_file(tmp_path / "split.csv", pd.Series(["b", "a"])).tolist() == ["test", "train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,split\na,train\n", "1 images have no split in it, such as b"),
        ("id,split\na,train\nb,dev\n", "line 3 has split 'dev'; expected: train, val or test"),
        ("id,split\na,train\nb,\n", "line 3 has split ''"),
        ("id,split\na,train\nb,val\na,test\n", "duplicate id a"),
        ("name,part\na,train\n", "has the columns name, part; expected: id and split"),
        ("", "expected: id and split"),
        ('id,split\n"a,train\n', "cannot be read as a table"),
    ],
)
def test_invalid_split_file_raises_user_error(tmp_path, text, message):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        splits.read_split_file(tmp_path / "split.csv", pd.Series(["a", "b"]))


def test_cache_key_depends_on_all_inputs():
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
