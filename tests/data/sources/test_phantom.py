"""Synthetic blood smears: bitwise reproducible, with disjoint slides and all classes in every split."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fadeformer.data.dataset_card import SPLITS
from fadeformer.data.sources.phantom import generate, patients
from tests.data.conftest import build_default_manifest


def digest(arrays: dict) -> str:
    hasher = hashlib.sha256()
    for key in sorted(arrays):
        hasher.update(arrays[key].tobytes())
    return hasher.hexdigest()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (28, "fe61d2b6d2591ee9c348768cfd319f8a927fd3aa714698a0eaf540d991dc0dd7"),
        (64, "caeb25544852bcac9ef02574819b4ba84949058f00e89f77e1b9eba8699d5233"),
    ],
)
def test_images_are_bitwise_reproducible(size, expected):
    assert digest(generate.draw_dataset(200, size, 7)) == expected
    assert digest(generate.draw_dataset(200, size, 8)) != expected


@settings(max_examples=5)
@given(images=st.integers(200, 320), size=st.integers(16, 40), seed=st.integers(0, 2**40))
def test_splits_have_all_classes_and_disjoint_slides(images, size, seed):
    arrays = generate.draw_dataset(images, size, seed)
    assert sum(len(arrays[f"{split}_labels"]) for split in SPLITS) == images
    previous_slides: set[int] = set()
    hashes = []
    for split in SPLITS:
        pixels, labels, groups = (arrays[f"{split}_{name}"] for name in ("images", "labels", "groups"))
        assert pixels.shape == (len(labels), size, size, 3)
        assert pixels.dtype == np.uint8
        assert set(labels[:, 0]) == set(range(len(generate.CLASSES)))
        assert not previous_slides & set(groups)
        previous_slides |= set(groups)
        hashes += [image.tobytes() for image in pixels]
    assert len(set(hashes)) == images


def test_class_frequencies_match_shares():
    labels = generate.draw_dataset(1000, 16, 0)["train_labels"][:, 0]
    frequencies = np.bincount(labels) / len(labels)
    np.testing.assert_allclose(frequencies, [cell_type.share for cell_type in generate.CELL_TYPES.values()], atol=0.01)


@pytest.mark.parametrize("task", ["ordinal-regression", "multi-label, binary-class"])
def test_other_tasks_have_all_labels_in_every_split(task):
    arrays = generate.draw_dataset(400, 28, 3, task)
    names = generate.class_names(task)
    for split in SPLITS:
        labels = arrays[f"{split}_labels"]
        if task == "ordinal-regression":
            assert (labels.shape[1], set(labels.ravel())) == (1, set(range(len(names))))
        else:
            assert labels.shape[1] == len(names)
            assert set(labels.sum(axis=1)) == {1, 2, 3}
            assert (labels.sum(axis=0) > 0).all()
    repeated = generate.draw_dataset(400, 28, 3, task)
    assert digest(repeated) == digest(arrays)


SLIDES = {"train": np.arange(28), "val": np.arange(28, 32), "test": np.arange(32, 40)}


@given(seed=st.integers(0, 2**40))
def test_sex_and_site_are_balanced_in_splits(seed):
    subjects = patients.draw_patients(SLIDES, seed)
    assert subjects["slide"].tolist() == list(range(40))
    assert subjects["age"].between(20, 89).all()
    for slides in SLIDES.values():
        split_subjects = subjects[subjects["slide"].isin(slides)]
        for column in ("sex", "site"):
            assert split_subjects[column].value_counts().tolist() == [len(slides) // 2] * 2
    assert patients.draw_patients(SLIDES, seed).equals(subjects)


def test_patients_are_reproducible_and_depend_on_seed():
    subjects = patients.draw_patients(SLIDES, 7)
    assert subjects.loc[subjects["slide"] >= 36, ["age", "sex", "site"]].values.tolist() == [
        [26, "M", "made-up clinic A"],
        [71, "F", "made-up clinic A"],
        [88, "F", "made-up clinic B"],
        [81, "M", "made-up clinic A"],
    ]
    assert not patients.draw_patients(SLIDES, 8)["age"].equals(subjects["age"])


def test_patient_metadata_is_in_the_manifest(fetched, tmp_path):
    card, folder = fetched(name="phantom", images=200, size=16, seed=3)
    with np.load(folder / "phantom.npz") as archive:
        assert digest(dict(archive)) == digest(generate.draw_dataset(200, 16, 3))
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
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
    assert "made up" in card.note
