"""The manifest and the expectations it must pass."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from fadeformer import params
from fadeformer.datasets import facts as cards
from fadeformer.datasets import manifest, npz
from fadeformer.errors import UserError
from fadeformer.files import read_json
from pipelines import expectations, overrides, page, paths, validate
from tests.datasets.conftest import COUNTS


@pytest.fixture
def raw(archive, small, monkeypatch):
    """Makes data/raw of an archive in an empty folder and goes there; arguments are those of `archive`."""

    def make(**arrays):
        monkeypatch.chdir(small.parent)
        paths.RAW.mkdir(parents=True, exist_ok=True)
        facts = npz.fetch(archive(**arrays), None, paths.RAW)
        cards.write(facts, paths.RAW)
        return facts

    return make


def arrays_of(archive) -> dict:
    with np.load(archive()) as held:
        return dict(held)


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", html)]


def test_a_row_says_all_of_an_image(raw):
    facts = raw(
        train_groups=np.array(["p1", "p2"] * 30), val_groups=np.array(["p3"] * 20), test_groups=np.array(["p4"] * 30)
    )
    rows = manifest.build(facts, paths.RAW)
    assert len(rows) == sum(COUNTS.values())
    assert rows["id"].is_unique
    first = rows.iloc[0].to_dict()
    assert {key: first[key] for key in ("path", "split", "index", "group", "label", "height", "width", "mode")} == {
        "path": "scans.npz", "split": "train", "index": 0, "group": "p1", "label": 0, "height": 16, "width": 16,
        "mode": "RGB",
    }  # fmt: skip
    assert first["id"] == f"own-scans-{facts.sha256[:8]}/train/0"


def test_good_data_pass_and_leave_a_page(raw):
    raw()
    assert "hold for 110 images" in validate.main()
    assert (paths.VALIDATION / "index.html").is_file()
    assert len(pd.read_parquet(paths.MANIFEST)) == 110


def test_the_page_needs_no_network_and_counts_every_class(raw):
    facts = raw()
    validate.main()
    text = (paths.VALIDATION / "index.html").read_text()
    assert "own-scans: all 9 expectations hold" in text
    assert not re.findall(r"(?:src|href)=['\"]?(?:https?:)?//", text)
    for label, name in enumerate(facts.classes):
        counts = [str(sum(i % 3 == label for i in range(count))) for count in COUNTS.values()]
        assert [name, *counts] in rows_of(text)
    assert (paths.VALIDATION / "data_docs" / "index.html").is_file()


def test_the_page_names_what_fails_and_escapes_what_it_shows(raw, archive):
    held = arrays_of(archive)
    held["val_images"][3] = held["train_images"][41]
    facts = raw(**held)
    rows = manifest.build(facts, paths.RAW)
    strange = dataclasses.replace(facts, classes=("<script>", "b & c", "c"))
    text = page.page(strange, rows, expectations.check(rows, strange, 0, paths.VALIDATION), "docs.html")
    assert "1 of 9 expectations do not hold" in text
    assert text.count("<span class=fails>FAILS</span>") == 1
    named = {row[0].split("/", 1)[1] for row in rows_of(text) if row[0].startswith("own-")}
    assert named == {"train/41", "val/3"}
    assert "<script>" not in text


def test_an_image_in_two_splits_stops_with_both_its_places(raw, archive):
    held = arrays_of(archive)
    held["val_images"][3] = held["train_images"][41]
    held["test_images"][7] = held["train_images"][41]
    facts = raw(**held)
    with pytest.raises(UserError) as error:
        validate.main()
    prefix = f"own-scans-{facts.sha256[:8]}"
    for place in ("train/41", "val/3", "test/7"):
        assert f"{prefix}/{place} " in str(error.value)
    assert "1 images stand in two splits" in str(error.value)
    assert "validate.max_cross_split_duplicates: 1" in str(error.value)
    assert not paths.MANIFEST.exists()
    assert len(pd.read_csv(paths.VALIDATION / "offending_rows.csv")) == 3


@pytest.mark.parametrize(("allowed", "passes"), [(1, False), (2, True), (3, True)])
def test_leaks_pass_only_up_to_the_threshold_and_never_silently(raw, archive, capsys, allowed, passes):
    held = arrays_of(archive)
    held["val_images"][:2] = held["train_images"][:2]
    raw(**held)
    overrides.apply(paths.PARAMS, {"validate": {"max_cross_split_duplicates": allowed}})
    assert params.load(paths.PARAMS).validate_.max_cross_split_duplicates == allowed
    if not passes:
        with pytest.raises(UserError, match="2 images stand in two splits"):
            validate.main()
        return
    validate.main()
    printed = capsys.readouterr().out
    assert f"RELAXED by validate.max_cross_split_duplicates: {allowed}: 2 images stand in two splits" in printed
    assert "/val/1 " in printed


def test_a_class_that_is_missing_from_val_is_named(raw):
    facts = raw(val_labels=np.zeros((20, 1), np.uint8))
    assert facts.classes[2] == "class 2"
    with pytest.raises(UserError, match="every class is in val: it has no class 1, class 2"):
        validate.main()


def test_an_empty_split_is_named(raw):
    raw(val_images=np.zeros((0, 16, 16, 3), np.uint8), val_labels=np.zeros((0, 1), np.uint8))
    with pytest.raises(UserError, match="train, val and test each have images: missing val"):
        validate.main()


def test_a_patient_in_two_splits_is_named(raw):
    raw(train_groups=np.arange(60), val_groups=np.array([5] + [100] * 19), test_groups=np.array([200] * 30))
    with pytest.raises(UserError) as error:
        validate.main()
    assert "no group (patient, lesion, slide) stands in two splits" in str(error.value)
    assert "/train/5 " in str(error.value)
    assert "/val/0 " in str(error.value)


def test_groups_that_are_not_known_are_told(raw, capsys):
    raw(train_groups=np.arange(60))
    assert "all 10" in page_text()
    assert "validate: 50 of 110 images have no known group (patient, lesion)" in capsys.readouterr().out
    raw()
    assert "no image has a known group" in page_text()
    assert "no image has a known group" in capsys.readouterr().out
    assert read_json(paths.VALIDATION / "validation.json")["images_without_group"] == 110


def page_text() -> str:
    validate.main()
    return (paths.VALIDATION / "index.html").read_text()


def test_a_label_out_of_range_is_named(raw, monkeypatch):
    facts = raw()
    monkeypatch.setattr(cards, "read", lambda folder: facts.__class__(**{**vars(facts), "classes": ("a", "b")}))
    with pytest.raises(UserError, match=r"every label is from 0 to 1\n.*train/2 "):
        validate.main()


def test_counts_that_are_not_the_published_ones_are_named(raw, monkeypatch):
    facts = raw()
    published = {**COUNTS, "val": 21}
    monkeypatch.setattr(cards, "read", lambda folder: facts.__class__(**{**vars(facts), "counts": published}))
    with pytest.raises(UserError, match="val has the published 21 images, but the file has 20"):
        validate.main()


def test_findings_pass_like_classes(raw):
    random = np.random.default_rng(0)
    raw(**{f"{split}_labels": random.integers(0, 2, (count, 4)) for split, count in COUNTS.items()})
    assert "hold for 110 images" in validate.main()
    assert list(pd.read_parquet(paths.MANIFEST).filter(like="label_")) == [f"label_{c}" for c in range(4)]


@pytest.mark.real_data
def test_the_eight_leaks_of_the_rebuilt_pneumoniamnist_are_found(real_data, small, monkeypatch):
    monkeypatch.chdir(small.parent)
    paths.RAW.mkdir(parents=True)
    cards.write(npz.fetch(real_data / "npz" / "pneumoniamnist.npz", None, paths.RAW), paths.RAW)
    with pytest.raises(UserError, match="8 images stand in two splits"):
        validate.main()
    overrides.apply(paths.PARAMS, {"validate": {"max_cross_split_duplicates": 8}})
    validate.main()
    report = read_json(paths.VALIDATION / "validation.json")
    assert report["duplicates_within_a_split"] == {"train": 18, "val": 0, "test": 3}
