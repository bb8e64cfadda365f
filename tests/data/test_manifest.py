"""Manifest and data validation checks."""

import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

from fadeformer.config import schema
from fadeformer.data import dataset_card as cards
from fadeformer.data import manifest
from fadeformer.data.manifest import Manifest
from fadeformer.data.sources import npz
from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json
from pipelines import paths
from pipelines.config import overrides
from pipelines.stages import preprocess, validate
from pipelines.validation import suite
from tests.data.conftest import COUNTS, build_default_manifest, scene

pytestmark = pytest.mark.usefixtures("without_data_docs")


@pytest.fixture
def raw(archive, small_params, monkeypatch):
    """Write data/raw from an archive into an empty folder and change to it; arguments as for `archive`."""

    def make(**arrays):
        monkeypatch.chdir(small_params.parent)
        paths.RAW.mkdir(parents=True, exist_ok=True)
        card = npz.import_archive(archive(**arrays), None, None, paths.RAW)
        cards.write_card(card, paths.RAW)
        return card

    return make


def load_arrays(archive) -> dict:
    with np.load(archive()) as contents:
        return dict(contents)


def build(card, **changes):
    return build_default_manifest(card, paths.RAW, paths.SPLITS, **changes)


def check(data, card):
    severity = schema.load_params(paths.PARAMS).validate_.severity.model_dump()
    return suite.validate_manifest(
        data, card, severity=severity, allowed_duplicates=0, min_per_class=1, max_label_shift=0.05,
        folder=paths.VALIDATION,
    )  # fmt: skip


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", html)]


def test_manifest_row_describes_the_image(raw):
    card = raw(
        train_groups=np.array(["p1", "p2"] * 30), val_groups=np.array(["p3"] * 20), test_groups=np.array(["p4"] * 30)
    )
    rows = build(card).rows
    assert len(rows) == sum(COUNTS.values())
    assert rows["id"].is_unique
    first = rows.iloc[0].to_dict()
    expected = {
        "path": "scans.npz", "member": "train_images/0", "split": "train", "index": 0, "group": "p1", "label": 0,
        "height": 16, "width": 16, "mode": "RGB", "problem": None,
    }  # fmt: skip
    assert {key: first[key] for key in expected} == expected
    assert first["id"] == f"own-scans-{card.sha256[:8]}/train/0"


def test_valid_data_pass_with_self_contained_page(raw):
    card = raw()
    assert "expectations passed for 110 images" in validate.main()
    assert len(pd.read_parquet(paths.MANIFEST)) == 110
    text = (paths.VALIDATION / "index.html").read_text()
    assert "own-scans: all 19 expectations passed" in text
    assert not re.findall(r"(?:src|href)=['\"]?(?:https?:)?//", text)
    for label, name in enumerate(card.classes):
        counts = [str(sum(i % 3 == label for i in range(count))) for count in COUNTS.values()]
        assert [name, *counts] in rows_of(text)


def test_exact_duplicate_across_splits_stops_with_locations(raw, archive):
    contents = load_arrays(archive)
    contents["val_images"][3] = contents["train_images"][41]
    contents["test_images"][7] = contents["train_images"][41]
    contents["val_labels"][3] = contents["test_labels"][7] = contents["train_labels"][41]
    card = raw(**contents)
    with pytest.raises(UserError) as error:
        validate.main()
    prefix = f"own-scans-{card.sha256[:8]}"
    for place in ("train/41", "val/3", "test/7"):
        assert f"{prefix}/{place} " in str(error.value)
    assert "1 images are in two splits" in str(error.value)
    assert "validate.max_cross_split_duplicates: 1" in str(error.value)
    assert not paths.MANIFEST.exists()
    assert len(pd.read_csv(paths.VALIDATION / "offending_rows.csv")) == 3


@pytest.mark.parametrize(("allowed", "passes"), [(1, False), (2, True)])
def test_allowed_duplicates_pass_with_a_warning(raw, archive, capsys, allowed, passes):
    contents = load_arrays(archive)
    contents["val_images"][:2] = contents["train_images"][:2]
    raw(**contents)
    overrides.apply_overrides(paths.PARAMS, {"validate": {"max_cross_split_duplicates": allowed}})
    assert schema.load_params(paths.PARAMS).validate_.max_cross_split_duplicates == allowed
    if not passes:
        with pytest.raises(UserError, match="2 images are in two splits"):
            validate.main()
        return
    validate.main()
    printed = capsys.readouterr().out
    assert f"RELAXED by validate.max_cross_split_duplicates: {allowed}: 2 images are in two splits" in printed
    assert "/val/1 " in printed


def test_missing_groups_are_reported(raw, capsys):
    raw(train_groups=np.arange(60))
    assert "all 20" in page_text()
    assert "validate: 50 of 110 images have no known group (patient, lesion)" in capsys.readouterr().out
    raw()
    assert "No image has a known group" in page_text()
    assert "no image has a known group" in capsys.readouterr().out
    assert read_json(paths.VALIDATION / "validation.json")["images_without_group"] == 110


def page_text() -> str:
    validate.main()
    return (paths.VALIDATION / "index.html").read_text()


def test_published_counts_are_checked_per_published_split(raw, monkeypatch):
    card = raw()

    def publish(**counts: int) -> None:
        monkeypatch.setattr(cards, "read_card", lambda folder: dataclasses.replace(card, counts={**COUNTS, **counts}))

    publish(val=21)
    with pytest.raises(UserError, match="val has the published 21 images, but there are 20"):
        validate.main()
    overrides.apply_overrides(paths.PARAMS, {"split": {"resplit": True}})
    with pytest.raises(UserError, match="the data set has the published 111 images, but there are 110"):
        validate.main()
    publish()
    assert "expectations passed for 110 images" in validate.main()


def reencode(pixels: np.ndarray) -> np.ndarray:
    contents = io.BytesIO()
    Image.fromarray(pixels).save(contents, "JPEG", quality=70)
    return np.asarray(Image.open(contents))


@pytest.fixture
def scenes(raw):
    """Write an archive of distinct images; keyword arguments such as `test_7` replace single images."""

    def make(**changes):
        arrays, seed = {}, 0
        for split, count in COUNTS.items():
            arrays[f"{split}_images"] = np.stack([scene(seed + i) for i in range(count)])
            seed += count
        for place, pixels in changes.items():
            split, _, row = place.partition("_")
            arrays[f"{split}_images"][int(row)] = pixels
        return raw(**arrays)

    return make


@pytest.mark.parametrize("copy", [reencode, lambda x: np.roll(x, (-1, 1), axis=(0, 1))])
def test_near_duplicate_across_splits_is_reported_as_pair(scenes, copy):
    card = scenes(test_7=copy(scene(41)))
    with pytest.raises(UserError) as error:
        validate.main()
    prefix = f"own-scans-{card.sha256[:8]}"
    assert "1 expectation(s) not met" in str(error.value)
    assert re.search(
        rf"{prefix}/train/41 \(train, class 2\) and {prefix}/test/7 \(test, class 1\), similarity (0\.9|1\.0)",
        str(error.value),
    )
    assert "validate.severity.near_duplicate_in_two_splits: warn" in str(error.value)
    text = (paths.VALIDATION / "index.html").read_text()
    assert "1 pairs of images that are in two splits" in text
    assert f"{prefix}/test/7<br>test" in text


def test_proposed_split_has_no_leakage(scenes, monkeypatch):
    card = scenes(val_3=scene(41), test_7=reencode(scene(12)), test_8=scene(65))
    prefix = f"own-scans-{card.sha256[:8]}"
    message = validate.propose_split()
    assert re.search(r" moves [3-6] of 110 images", message)
    assert not paths.MANIFEST.exists()
    (proposed,) = paths.ADOPTED_SPLITS.glob("proposed-*.csv")
    assert message.startswith(str(proposed))
    assert f"to adopt it, set split.adopted: {proposed}\n" in message
    overrides.apply_overrides(paths.PARAMS, {"split": {"adopted": str(proposed)}})
    overrides.apply_overrides(paths.PARAMS, {"validate": {"severity": {"same_image_two_labels": "warn"}}})
    assert "expectations passed for 110 images" in validate.main()
    split = pd.read_parquet(paths.MANIFEST).set_index("id")["split"]
    for one, other in (("train/41", "val/3"), ("train/12", "test/7"), ("val/5", "test/8")):
        assert split[f"{prefix}/{one}"] == split[f"{prefix}/{other}"]
    assert abs(split.value_counts() - pd.Series(COUNTS)).max() <= 1
    before = proposed.read_bytes()
    message = "no image, near-duplicate or group is in two splits; there is nothing to propose"
    assert validate.propose_split() == message
    assert proposed.read_bytes() == before


def test_proposed_split_reports_missing_classes(raw, archive):
    contents = load_arrays(archive)
    groups = {split: np.array([f"{split} {i}" for i in range(count)]) for split, count in COUNTS.items()}
    for split in COUNTS:  # all images of the third class are one patient
        groups[split][contents[f"{split}_labels"][:, 0] == 2] = "one"
    raw(**{f"{split}_groups": names for split, names in groups.items()})
    assert re.search(
        r"too few groups for three splits:\n    val would have no image of class 2\n    test would",
        validate.propose_split(),
    )


def test_split_without_usable_images_fails(scenes, capsys):
    scenes()
    names = ("label_out_of_range", "split_missing", "class_missing")
    overrides.apply_overrides(paths.PARAMS, {"validate": {"severity": dict.fromkeys(names, "warn")}})
    build_manifest = manifest.build_manifest

    def build(*args, **settings):
        data = build_manifest(*args, **settings)
        data.rows.loc[data.rows["split"] == "val", "label"] = None
        return data

    manifest.build_manifest = build
    try:
        with pytest.raises(UserError, match="no usable image in val; see"):
            validate.main()
    finally:
        manifest.build_manifest = build_manifest
    assert "train, val and test each have images: missing val" in capsys.readouterr().out


def test_all_checks_can_be_turned_off(scenes):
    scenes(test_7=scene(41))
    severity = schema.load_params(paths.PARAMS).validate_.severity.model_dump()
    overrides.apply_overrides(paths.PARAMS, {"validate": {"severity": dict.fromkeys(severity, "off")}})
    assert "0 expectations passed for 110 images" in validate.main()
    assert "nothing to propose" in validate.propose_split()


def test_near_duplicates_with_different_labels_warn(scenes, capsys):
    card = scenes(train_4=reencode(scene(0)))
    validate.main()
    prefix = f"own-scans-{card.sha256[:8]}"
    printed = capsys.readouterr().out
    assert f"{prefix}/train/0 (train, class 0) and {prefix}/train/4 (train, class 1), similarity" in printed
    pairs = pd.read_csv(paths.VALIDATION / "near_duplicates.csv")
    assert pairs[["first_label", "second_label"]].to_numpy().tolist() == [["class 0", "class 1"]]


def test_low_contrast_images_are_compared_and_reported(scenes, capsys):
    dark = {f"test_{i}": scene(200 + i) // 64 for i in range(5)}
    card = scenes(**dark, train_3=np.roll(scene(202) // 64, 1, axis=1))
    with pytest.raises(UserError, match=rf"own-scans-{card.sha256[:8]}/train/3 \(train, class 0\) and .*/test/2 "):
        validate.main()
    overrides.apply_overrides(paths.PARAMS, {"validate": {"severity": {"near_duplicate_in_two_splits": "warn"}}})
    validate.main()
    assert "6 images have almost no contrast: if your images of more than 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(("severity", "outcome"), [("stop", "failed"), ("warn", "warned"), (False, "silent")])
def test_severity_decides_the_outcome(scenes, capsys, severity, outcome):
    scenes(test_7=reencode(scene(40)))  # of the same class
    overrides.apply_overrides(paths.PARAMS, {"validate": {"severity": {"near_duplicate_in_two_splits": severity}}})
    if outcome == "failed":
        with pytest.raises(UserError, match="data validation failed"):
            validate.main()
        return
    validate.main()
    printed = capsys.readouterr().out
    assert ("WARNING" in printed) == (outcome == "warned")
    assert ("/test/7 (test, class 1), similarity" in printed) == (outcome == "warned")
    report = read_json(paths.VALIDATION / "validation.json")
    assert report["passed"]
    assert report["near_duplicates"] == {"pairs": 1, "in_two_splits": 1}
    page_of = (paths.VALIDATION / "index.html").read_text()
    assert ("1 of 19 expectations failed: warnings only" in page_of) == (outcome == "warned")


def test_label_shift_and_small_classes_warn(raw, capsys):
    raw(test_labels=np.array([0] * 24 + [1, 1, 1, 2, 2, 2], np.uint8)[:, None])
    validate.main()
    printed = capsys.readouterr().out
    assert re.search(r"labels of test diverge by no more than 0.05 bits from those of train, but by 0\.1\d\d", printed)
    assert "every class has 5 or more images in each split\n    test has 3 of class 1\n" in printed
    overrides.apply_overrides(paths.PARAMS, {"validate": {"min_per_class": 7}})
    validate.main()
    printed = capsys.readouterr().out
    assert "every class has 7 or more images in each split\n    test has 3 of class 1\n" in printed
    assert "    val has 6 of class 2\n" in printed


def test_finding_without_positives_is_reported(raw, capsys):
    labels = {f"{split}_labels": np.tile([[0, 1, 0], [1, 0, 1]], (count // 2, 1)) for split, count in COUNTS.items()}
    labels["test_labels"][:, 2] = 0
    raw(**labels)
    validate.main()
    printed = capsys.readouterr().out
    assert "test has 5 or more images with class 2 (it has 0)" in printed
    assert "without class 2" not in printed
    overrides.apply_overrides(paths.PARAMS, {"validate": {"min_per_class": 16}})
    validate.main()
    assert "val has 16 or more images without class 0 (it has 10)" in capsys.readouterr().out


def test_all_leakage_kinds_are_found_in_large_manifest():
    """Find every kind of leakage in a large manifest; benchmarks/gate.py measures the time."""
    random = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(10_000)]
    rows = pd.DataFrame({
        "path": "a.zip", "member": names, "split": np.repeat(["train", "val", "test"], [7_000, 1_000, 2_000]),
        "id": names, "group": [f"p{i // 3}" for i in range(10_000)], "label": random.integers(0, 5, 10_000),
        "sha256": [f"{i:064x}" for i in range(10_000)], "height": 64, "width": 64, "mode": "L", "brightness": 120.0,
        "contrast": 40.0, "problem": None,
    })  # fmt: skip
    rows.loc[9_999, "sha256"] = rows.loc[5, "sha256"]
    rows.loc[9_999, "label"] = (rows.loc[5, "label"] + 1) % 5
    rows.loc[8_001, "label"] = rows.loc[7, "label"]
    data = Manifest(
        rows,
        pd.DataFrame({"first": ["7.png"], "second": ["8001.png"], "similarity": [0.99]}),
        [None] * 10_000,
        {},
        "published",
    )
    card = cards.DatasetCard("many", "a.zip", "0", "multi-class", tuple("abcde"), None, None, None, "", "")
    failed = {c.name: c for c in check(data, card) if not c.passed}
    assert set(failed) == {
        "image_in_two_splits",
        "near_duplicate_in_two_splits",
        "group_in_two_splits",
        "same_image_two_labels",
    }
    assert set(failed["image_in_two_splits"].rows["id"]) == {"5.png", "9999.png"}
    assert set(failed["near_duplicate_in_two_splits"].rows["id"]) == {"7.png", "8001.png"}
    assert set(failed["group_in_two_splits"].rows["group"]) == {"p2333", "p2666"}


@pytest.mark.parametrize("text", ["", "[]", '{"name": "a"}'])
def test_corrupt_dataset_card_raises_user_error(tmp_path, text):
    (tmp_path / cards.CARD_FILE).write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: corrupt or from another version; run `dvc repro -f download`"):
        cards.read_card(tmp_path)


def test_preprocess_holds_an_exclusive_lock(raw):
    raw()
    validate.main()
    with (
        FileLock(paths.PROCESSED.with_name(".processed.lock")),
        pytest.raises(
            UserError, match="data/processed: another process is writing the arrays; wait until it has finished"
        ),
    ):
        preprocess.main()
    assert preprocess.main().endswith("images of 16x16x3")


def test_pneumoniamnist_has_eight_cross_split_duplicates(real_data, small_params, monkeypatch):
    monkeypatch.chdir(small_params.parent)
    paths.RAW.mkdir(parents=True)
    cards.write_card(npz.import_archive(real_data / "npz" / "pneumoniamnist.npz", None, None, paths.RAW), paths.RAW)
    with pytest.raises(UserError, match="8 images are in two splits"):
        validate.main()
    overrides.apply_overrides(paths.PARAMS, {"validate": {"max_cross_split_duplicates": 8}})
    validate.main()
    report = read_json(paths.VALIDATION / "validation.json")
    assert report["duplicates_within_a_split"] == {"train": 18, "val": 0, "test": 3}
