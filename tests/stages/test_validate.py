"""Remedies of data validation: a group from file names, images left out, and what `--fix` does not correct."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json
from pipelines import paths
from pipelines.config import overrides
from pipelines.stages import download, validate

pytestmark = pytest.mark.usefixtures("without_data_docs")
SCANS = Path("data/own/scans")
OFF = dict.fromkeys(("near_duplicate_in_two_splits", "label_shift", "near_duplicate_two_labels"), "off")


@pytest.fixture
def scans(small_params, monkeypatch):
    """Return a function that writes random images under the given names and imports them."""
    monkeypatch.chdir(small_params.parent)

    def write(names):
        for seed, name in enumerate(names):
            path = SCANS / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        change(dataset={"name": "folder", "root": str(SCANS)}, validate={"severity": OFF})
        download.main()

    return write


def change(**values):
    overrides.apply_overrides(paths.PARAMS, values)


SPLIT_OF_SHOT = ("train", "train", "train", "val", "test", "test")
PEOPLE = [
    f"{SPLIT_OF_SHOT[(shot + p) % 6]}/{'ab'[p % 2]}/person{p}_virus_{7 * shot + p}.png"
    for p in range(30)
    for shot in range(6)
]


def patients_in_two_splits():
    rows = pd.read_parquet(paths.MANIFEST)
    patient = rows["id"].str.extract(r"(person\d+)_", expand=False)
    assert patient.notna().all()
    return sum(len(set(splits)) > 1 for _, splits in rows["split"].groupby(patient))


@pytest.mark.parametrize("remedy", ["resplit", "fix"])
def test_proposed_pattern_separates_the_patients(scans, capsys, remedy):
    scans(PEOPLE)
    validate.main()
    printed = capsys.readouterr().out
    assert "no patient is in two splits by the file names, but 30 of" in printed
    assert re.search(r"    person0: \w+/a/person0_virus_\d+.png, \w+/a/person0_virus_\d+.png\n", printed)
    assert patients_in_two_splits() == 30
    pattern = re.search(r"set split.group_from: '(.*?)', and split.resplit: true", printed)[1]
    change(split={"group_from": pattern})
    with pytest.raises(UserError, match=r"remedy for group_in_two_splits: `python -m pipelines.stages.validate --fix`"):
        validate.main()
    if remedy == "resplit":
        change(split={"resplit": True})
    else:
        change(split={"adopted": re.search(r"set split.adopted: (\S+)", validate.propose_split())[1]})
    validate.main()
    assert patients_in_two_splits() == 0
    assert "180 images of 30 patients or originals; 0 file names do not match" in capsys.readouterr().out


def test_excluded_images_are_left_out(scans, capsys):
    scans([f"{split}/{c}/{i}.png" for split in ("train", "val", "test") for c in "ab" for i in range(6)])
    Path("leave_out.txt").write_text("train/a/0.png\nval/b/5.png\n")
    change(split={"exclude": "leave_out.txt"})
    validate.main()
    rows = pd.read_parquet(paths.MANIFEST)
    assert len(rows) == 34
    assert not {"train/a/0.png", "val/b/5.png"} & set(rows["id"])
    assert rows.attrs["split"].startswith("published, without 2 images (leave_out.txt, SHA-256 ")
    assert "2 images are excluded by split.exclude" in capsys.readouterr().out
    assert "Excluded by <code>split.exclude</code>: 2 images" in (paths.VALIDATION / "index.html").read_text()
    assert read_json(paths.VALIDATION_RESULT)["excluded_images"] == 2
    Path("leave_out.txt").write_text("id;reason\ntrain/a/0.png;blurred\ntrain/a/77.png;\n")
    with pytest.raises(UserError, match=r"leave_out.txt: lists images that do not exist: train/a/77.png; use ids"):
        validate.main()


def test_fix_lists_images_no_split_corrects(scans):
    scans([f"{split}/{c}/{i}.png" for split in ("train", "val", "test") for c in "ab" for i in range(6)])
    shutil.copy(SCANS / "train/a/0.png", SCANS / "train/b/again.png")
    shutil.copy(SCANS / "train/a/1.png", SCANS / "test/a/again.png")
    download.main()
    with pytest.raises(
        UserError, match="remedy for same_image_two_labels: correct the labels, or leave the images out"
    ):
        validate.main()
    assert "Remedy: correct the labels, or leave the images out" in (paths.VALIDATION / "index.html").read_text()
    message = validate.propose_split()
    assert "a new split does not correct:\n- exact duplicates have the same label\n" in message
    change(split={"adopted": re.search(r"set split.adopted: (\S+)", message)[1]})
    change(split={"exclude": re.search(r"set split.exclude: (\S+)", message)[1]})
    validate.main()
    assert len(pd.read_parquet(paths.MANIFEST)) == 36 + 2 - 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("person(", "which is not a regular expression"),
        ("person", r"put the part of the file name that is the patient in parentheses, such as"),
        ("(a)(b)", r"use \(\?:...\) for other parentheses"),
        ("^scan_(.*)$", r"matches none of 180 file names, such as person\d+_virus_"),
    ],
)
def test_invalid_group_pattern_is_reported(scans, pattern, message):
    scans(PEOPLE)

    def run():
        change(split={"group_from": pattern})
        validate.main()

    with pytest.raises(UserError, match=rf"^params.yaml: split.group_from .*{message}"):
        run()
