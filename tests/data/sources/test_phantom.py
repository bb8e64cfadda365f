"""The drawn blood smears: the same bytes everywhere, no slide in two splits, hard but not wrong."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fadeformer.data.dataset_card import SPLITS
from fadeformer.data.sources.phantom import generate, patients
from tests.data.conftest import build_default_manifest


def digest(made: dict) -> str:
    found = hashlib.sha256()
    for key in sorted(made):
        found.update(made[key].tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (28, "349dea6cd22ccc0fc6290e1aacb931cc02229e136f9c59244840001f8cc75e8b"),
        (64, "e253645c1204c8fdfd38e5981d7a0072338d5b6ee3778b32d46b6d247d4e0247"),
    ],
)
def test_the_bytes_are_these_on_every_machine(size, expected):
    assert digest(generate.draw_dataset(200, size, 7)) == expected
    assert digest(generate.draw_dataset(200, size, 8)) != expected


@settings(max_examples=5)
@given(images=st.integers(200, 320), size=st.integers(16, 40), seed=st.integers(0, 2**40))
def test_every_split_has_every_class_and_its_own_slides(images, size, seed):
    made = generate.draw_dataset(images, size, seed)
    assert sum(len(made[f"{split}_labels"]) for split in SPLITS) == images
    seen: set[int] = set()
    hashes = []
    for split in SPLITS:
        pixels, labels, groups = (made[f"{split}_{what}"] for what in ("images", "labels", "groups"))
        assert pixels.shape == (len(labels), size, size, 3)
        assert pixels.dtype == np.uint8
        assert set(labels[:, 0]) == set(range(len(generate.CLASSES)))
        assert not seen & set(groups)
        seen |= set(groups)
        hashes += [image.tobytes() for image in pixels]
    assert len(set(hashes)) == images


def test_classes_are_as_imbalanced_as_their_shares():
    labels = generate.draw_dataset(1000, 16, 0)["train_labels"][:, 0]
    found = np.bincount(labels) / len(labels)
    np.testing.assert_allclose(found, [kind.share for kind in generate.CELL_TYPES.values()], atol=0.01)


@pytest.mark.parametrize("task", ["ordinal-regression", "multi-label, binary-class"])
def test_the_other_tasks_have_all_their_labels_in_every_split(task):
    made = generate.draw_dataset(400, 28, 3, task)
    names = generate.class_names(task)
    for split in SPLITS:
        labels = made[f"{split}_labels"]
        if task == "ordinal-regression":
            assert (labels.shape[1], set(labels.ravel())) == (1, set(range(len(names))))
        else:
            assert labels.shape[1] == len(names)
            assert set(labels.sum(axis=1)) == {1, 2, 3}
            assert (labels.sum(axis=0) > 0).all()
    again = generate.draw_dataset(400, 28, 3, task)
    assert digest(again) == digest(made)


SLIDES = {"train": np.arange(28), "val": np.arange(28, 32), "test": np.arange(32, 40)}


@given(seed=st.integers(0, 2**40))
def test_each_split_has_as_many_patients_of_each_sex_and_clinic(seed):
    subjects = patients.draw_patients(SLIDES, seed)
    assert subjects["slide"].tolist() == list(range(40))
    assert subjects["age"].between(20, 89).all()
    for slides in SLIDES.values():
        of = subjects[subjects["slide"].isin(slides)]
        for column in ("sex", "site"):
            assert of[column].value_counts().tolist() == [len(slides) // 2] * 2
    assert patients.draw_patients(SLIDES, seed).equals(subjects)


def test_patients_are_these_on_every_machine_and_others_with_another_seed():
    subjects = patients.draw_patients(SLIDES, 7)
    assert subjects.loc[subjects["slide"] >= 36, ["age", "sex", "site"]].values.tolist() == [
        [26, "M", "made-up clinic A"],
        [71, "F", "made-up clinic A"],
        [88, "F", "made-up clinic B"],
        [81, "M", "made-up clinic A"],
    ]
    assert not patients.draw_patients(SLIDES, 8)["age"].equals(subjects["age"])


def test_age_sex_and_site_of_a_slide_reach_the_manifest_and_leave_images_and_ids_alone(fetched, tmp_path):
    facts, folder = fetched(name="phantom", images=200, size=16, seed=3)
    with np.load(folder / "phantom.npz") as archive:
        assert digest(dict(archive)) == digest(generate.draw_dataset(200, 16, 3))
    rows = build_default_manifest(facts, folder, tmp_path / "splits").rows
    assert (
        rows["id"]
        .str.startswith(f"phantom-{hashlib.sha256((folder / 'phantom.npz').read_bytes()).hexdigest()[:8]}/")
        .all()
    )
    assert (rows.groupby("group")[["age", "sex", "site"]].nunique() == 1).all().all()
    subjects = patients.draw_patients(
        {split: np.unique(rows.loc[rows["split"] == split, "group"].astype(int)) for split in SPLITS}, 3
    )
    expected = subjects.set_index("slide").loc[rows["group"].astype(int)]
    for column in ("age", "sex", "site"):
        assert rows[column].tolist() == expected[column].tolist()
    assert "made up" in facts.note
