"""The validation report: contents for faulty data, and escaping of user text."""

import re
from html import unescape

import numpy as np
import pytest

from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.manifest import Manifest
from fadeformer.data.sources import folder
from pipelines.validation import page, suite
from tests.data.conftest import build_default_manifest, scene
from tests.packages import png


def near_duplicate(pixels: np.ndarray) -> np.ndarray:
    return np.roll(pixels, 1, axis=0)


pytestmark = pytest.mark.usefixtures("without_data_docs")


@pytest.fixture
def rendered_page(tmp_path, config):
    """Return a function that renders the page of a folder of images with a labels.csv; also manifest and card."""

    def render(images: dict, table: str, classes: list[str] | None = None) -> tuple[str, Manifest, DatasetCard]:
        root = tmp_path / "scans"
        for name, pixels in images.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pixels if isinstance(pixels, bytes) else png(pixels))
        (root / "labels.csv").write_text(table)
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        card = folder.import_images(root, classes, None, tmp_path / "salt", raw)
        data = build_default_manifest(card, raw, tmp_path / "splits")
        checks = suite.validate_manifest(
            data, card, severity=config.validate_.severity.model_dump(), allowed_duplicates=0,
            min_per_class=1, max_label_shift=0.5, folder=tmp_path / "docs",
        )  # fmt: skip
        return page.render_validation_page(card, data, checks, "docs/index.html"), data, card

    return render


SPLITS = {"train": 4, "val": 2, "test": 2}
NAMES = [f"{split}{i}.png" for split, count in SPLITS.items() for i in range(count)]


def images(**changes) -> dict:
    """Return images of two alternating classes in each split; `changes` replaces some of them."""
    return {name: changes.get(name.removesuffix(".png"), scene(i)) for i, name in enumerate(NAMES)}


def table(head="path,split,label", label=lambda i: "ab"[i % 2], more="", **changes) -> str:
    labels = {name: changes.get(name.removesuffix(".png"), label(i)) for i, name in enumerate(NAMES)}
    return "\n".join([head, *(f"{name},{name[:-5]},{label}{more}" for name, label in labels.items())])


def section(text: str, heading: str) -> str:
    """Return the HTML below a heading."""
    (html,) = re.findall(rf"<h2>[^<]*{heading}.*?(?=<h2>|$)", text, re.DOTALL)
    return html


def rows_of(html: str) -> list[list[str]]:
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


def captions(html: str) -> list[str]:
    return [unescape(caption).replace("<br>", " ") for caption in re.findall(r"<figcaption>(.*?)</figcaption>", html)]


def test_copies_are_shown_from_different_splits(rendered_page):
    # sorted by name: train, val, train
    names = {"a.png": "train", "b.png": "val", "c.png": "train"}
    text, data, _ = rendered_page(
        images() | dict.fromkeys(names, scene(50)), table() + "".join(f"\n{n},{s},a" for n, s in names.items())
    )
    assert data.rows.set_index("id").loc[["a.png", "c.png"], "split"].tolist() == ["train", "train"]
    assert captions(section(text, "are in two splits")) == ["a.png train: a", "b.png val: a"]


@pytest.mark.parametrize("pixels", [np.full((32, 32, 3), 7, np.uint8), scene(0, side=12)], ids=["blank", "small"])
def test_copies_without_thumbnail_use_examples_or_placeholder(rendered_page, pixels):
    text, data, card = rendered_page(images(train0=pixels, val0=pixels), table())
    assert data.thumbnails[0] is None
    pairs = section(text, "are in two splits")
    assert pairs.count("<img ") == 2
    without_examples = Manifest(data.rows, data.near_duplicates, data.thumbnails, {}, data.split)
    pairs = section(page.render_validation_page(card, without_examples, [], "docs.html"), "are in two splits")
    assert pairs.count("no thumbnail: too small or blank") == 2
    assert "<img" not in pairs


def test_user_text_is_escaped(rendered_page):
    head = "path,split,label,label<script>alert(1)</script>"
    text, _, _ = rendered_page(images(val0=scene(0)), table(head, lambda i: ["<i>", "b"][i % 2], more=",5"))
    assert "<script" not in text
    assert "<i>" not in text
    rows = rows_of(section(text, "Failed: no image is in two"))
    assert [row[:4] for row in rows] == [
        ["id", "split", "group", "label"],
        ["train0.png", "train", "", "&lt;i&gt;"],
        ["val0.png", "val", "", "&lt;i&gt;"]
    ]  # fmt: skip


def test_offending_rows_list_findings_in_one_column(rendered_page):
    findings = table("path,split,A,B", lambda i: "1,1" if i % 2 else "0,0", val0="1,")
    text, _, _ = rendered_page(images(), findings, classes=["A", "B"])
    rows = rows_of(section(text, "Failed: every image has a label B"))
    assert rows[1][:4] == ["val0.png", "val", "", "A, B: unknown"]
    assert rows[1][4:6] == ["48", "48"]


def test_only_usable_images_are_counted(rendered_page):
    text, _, _ = rendered_page(images(train0=b"no image"), table(val1=""))
    counts = section(text, "Images of each split")
    assert rows_of(counts)[1:] == [
        ["a", "1", "1", "1"], ["b", "2", "0", "1"], ["<b>images</b>", "<b>3</b>", "<b>1</b>", "<b>2</b>"]
    ]  # fmt: skip
    assert "Excluded, because they cannot be read or have no label: 2 images (1 of train, 1 of val)." in counts
    assert "Excluded" not in rendered_page(images(), table())[0]


def test_near_duplicates_with_different_labels_are_shown(rendered_page):
    text, data, _ = rendered_page(
        images(train1=near_duplicate(scene(0)), val1=near_duplicate(scene(2))), table(train2="b")
    )
    assert len(data.near_duplicates) == 2
    pairs = section(text, "Near-duplicates with different labels")
    assert captions(pairs) == ["train0.png train: a", "train1.png train: b"]  # the other pair is in two splits
    assert pairs.count("<img ") == 2
    same = rendered_page(images(train1=near_duplicate(scene(0))), table(train1="a"))[0]
    assert "Near-duplicates with different labels" not in same
    unknown = rendered_page(images(train1=near_duplicate(scene(0))), table(train1=""))[0]
    assert "Near-duplicates with different labels" not in unknown


def test_number_of_conflicting_pairs_is_limited(rendered_page, monkeypatch):
    monkeypatch.setattr(page, "MAX_PAIRS", 1)
    text, _, _ = rendered_page(images(train1=near_duplicate(scene(0)), val1=near_duplicate(scene(4))), table())
    pairs = section(text, "with different labels")
    assert len(captions(pairs)) == 2
    assert "and 1 more" in pairs


def test_page_shows_expected_precision(rendered_page):
    groups = {name: f"{name[:4]}{i % 3}" for i, name in enumerate(NAMES)}
    rows = table(head="path,split,label,group").splitlines()
    text = rendered_page(images(), "\n".join([rows[0], *(f"{row},{groups[row.split(',')[0]]}" for row in rows[1:])]))[0]
    cells = section(text, "Expected precision")
    assert "AUC 0.95" in cells
    assert "1 / 1" in cells
    assert "too few cases" in cells
