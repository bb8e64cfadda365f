"""The data gate's page: what it shows of data with faults, and that nothing of theirs becomes markup."""

import re
from html import unescape

import numpy as np
import pytest

from fadeformer.data import dataset_card as cards
from fadeformer.data.manifest import Manifest
from fadeformer.data.sources import folder
from pipelines.validation import page, suite
from tests.data.conftest import built, scene
from tests.packages import png


def nearly(pixels: np.ndarray) -> np.ndarray:
    return np.roll(pixels, 1, axis=0)


pytestmark = pytest.mark.usefixtures("without_data_docs")


@pytest.fixture
def shown(tmp_path, config):
    """The page of a folder of images with a labels.csv, and what it is made of."""

    def make(images: dict, table: str, classes: list[str] | None = None) -> tuple[str, Manifest, cards.DatasetCard]:
        root = tmp_path / "scans"
        for name, pixels in images.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pixels if isinstance(pixels, bytes) else png(pixels))
        (root / "labels.csv").write_text(table)
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        facts = folder.import_images(root, classes, None, tmp_path / "salt", raw)
        found = built(facts, raw, tmp_path / "splits")
        checks = suite.validate_manifest(
            found, facts, severity=config.validate_.severity.model_dump(), allowed_duplicates=0,
            min_per_class=1, max_label_shift=0.5, folder=tmp_path / "docs",
        )  # fmt: skip
        return page.render_validation_page(facts, found, checks, "docs/index.html"), found, facts

    return make


SPLITS = {"train": 4, "val": 2, "test": 2}
NAMES = [f"{split}{i}.png" for split, count in SPLITS.items() for i in range(count)]


def images(**changes) -> dict:
    """Two classes by turns in each split; of these images some replaced."""
    return {name: changes.get(name.removesuffix(".png"), scene(i)) for i, name in enumerate(NAMES)}


def table(head="path,split,label", label=lambda i: "ab"[i % 2], more="", **changes) -> str:
    labels = {name: changes.get(name.removesuffix(".png"), label(i)) for i, name in enumerate(NAMES)}
    return "\n".join([head, *(f"{name},{name[:-5]},{of}{more}" for name, of in labels.items())])


def section(text: str, heading: str) -> str:
    """What stands below a heading."""
    (found,) = re.findall(rf"<h2>[^<]*{heading}.*?(?=<h2>|$)", text, re.DOTALL)
    return found


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def captions(html: str) -> list[str]:
    return [unescape(told).replace("<br>", " ") for told in re.findall(r"<figcaption>(.*?)</figcaption>", html)]


def test_copies_are_shown_from_two_different_splits(shown):
    # in the order of their names: train, val, train
    names = {"a.png": "train", "b.png": "val", "c.png": "train"}
    text, found, _ = shown(
        images() | dict.fromkeys(names, scene(50)), table() + "".join(f"\n{n},{s},a" for n, s in names.items())
    )
    assert found.rows.set_index("id").loc[["a.png", "c.png"], "split"].tolist() == ["train", "train"]
    assert captions(section(text, "are in two splits")) == ["a.png train: a", "b.png val: a"]


@pytest.mark.parametrize("pixels", [np.full((32, 32, 3), 7, np.uint8), scene(0, side=12)], ids=["blank", "small"])
def test_copies_that_have_no_thumbnail_are_shown_or_said_to_have_none(shown, pixels):
    text, found, facts = shown(images(train0=pixels, val0=pixels), table())
    assert found.thumbnails[0] is None
    pairs = section(text, "are in two splits")
    assert pairs.count("<img ") == 2
    bare = Manifest(found.rows, found.near, found.thumbnails, {}, found.split)
    pairs = section(page.render_validation_page(facts, bare, [], "docs.html"), "are in two splits")
    assert pairs.count("no picture: too small or of one value") == 2
    assert "<img" not in pairs


def test_text_of_the_user_is_escaped(shown):
    head = "path,split,label,label<script>alert(1)</script>"
    text, _, _ = shown(images(val0=scene(0)), table(head, lambda i: ["<i>", "b"][i % 2], more=",5"))
    assert "<script" not in text
    assert "<i>" not in text
    rows = rows_of(section(text, "Failed: no image is in two"))
    assert [row[:4] for row in rows] == [
        ["id", "split", "group", "label"],
        ["train0.png", "train", "", "&lt;i&gt;"],
        ["val0.png", "val", "", "&lt;i&gt;"]
    ]  # fmt: skip


def test_rows_that_offend_are_told_with_their_findings_in_one_column(shown):
    findings = table("path,split,A,B", lambda i: "1,1" if i % 2 else "0,0", val0="1,")
    text, _, _ = shown(images(), findings, classes=["A", "B"])
    rows = rows_of(section(text, "Failed: every image has a label B"))
    assert rows[1][:4] == ["val0.png", "val", "", "A, B: unknown"]
    assert rows[1][4:6] == ["48", "48"]


def test_only_images_that_will_be_used_are_counted(shown):
    text, _, _ = shown(images(train0=b"no image"), table(val1=""))
    counts = section(text, "Images of each split")
    assert rows_of(counts)[1:] == [
        ["a", "1", "1", "1"], ["b", "2", "0", "1"], ["<b>images</b>", "<b>3</b>", "<b>1</b>", "<b>2</b>"]
    ]  # fmt: skip
    assert "Excluded, because they cannot be read or have no label: 2 images (1 of train, 1 of val)." in counts
    assert "Left out" not in shown(images(), table())[0]


def test_near_duplicates_with_different_labels_are_shown_with_both(shown):
    text, found, _ = shown(images(train1=nearly(scene(0)), val1=nearly(scene(2))), table(train2="b"))
    assert len(found.near) == 2
    pairs = section(text, "Near duplicates with different labels")
    assert captions(pairs) == ["train0.png train: a", "train1.png train: b"]  # the other pair stands in two splits
    assert pairs.count("<img ") == 2
    same = shown(images(train1=nearly(scene(0))), table(train1="a"))[0]
    assert "Near duplicates with different labels" not in same
    unknown = shown(images(train1=nearly(scene(0))), table(train1=""))[0]
    assert "Near duplicates with different labels" not in unknown


def test_no_more_pairs_with_different_labels_are_shown_than_of_two_splits(shown, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAIRS", 1)
    text, _, _ = shown(images(train1=nearly(scene(0)), val1=nearly(scene(4))), table())
    pairs = section(text, "with different labels")
    assert len(captions(pairs)) == 2
    assert "and 1 more" in pairs
