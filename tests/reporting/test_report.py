"""The report: verdicts in words, and the page itself in a real browser, for sets of every kind."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.sources.medmnist import DATASETS
from fadeformer.evaluation import predictions, published, subgroups, summary  # fmt: skip
from fadeformer.evaluation.operating_points import select_operating_points
from fadeformer.reporting import rendering, report, tables
from fadeformer.reporting.plots import base, uncertainty
from fadeformer.reporting.tables import ReportInputs
from fadeformer.tasks import TASKS

A4 = 680  # pixels of CSS between margins of 15 mm
KINDS = {"breastmnist": 2, "retinamnist": 5, "bloodmnist": 8, "organamnist": 11, "chestmnist": 14}
RUN = "0123456789abcdef0123456789abcdef"


def described(name: str) -> dict:
    return {
        "model": {"backbone": "fadevit_nano", "pretrained": False, "fade": None}, "best_epoch": 3, "weights": None,
        "params": {"seed": 42, "dataset": {"name": name}, "train": {"epochs": 20, "monitor": "loss"}},
        "calibration": {"slope": [0.5], "offset": [0.0]},
    }  # fmt: skip


def made(name: str, *, images: int = 200, skill: float = 2.0, leaks: int = 0, known: bool = True) -> SimpleNamespace:
    """All that a report is made of, of a set with random scores."""
    of, random = DATASETS[name], np.random.default_rng(0)
    task, classes = TASKS[of.task], tuple(of.classes)
    if task.multi_label:
        labels = (random.random((images, len(classes))) < 0.2).astype(np.int64)
        labels[:, 3] = 0
        raw = 1 / (1 + np.exp(1.5 - random.normal(size=labels.shape) - skill * labels))
    else:
        labels = random.integers(0, len(classes), (images, 1))
        logits = random.normal(size=(images, len(classes)))
        logits[np.arange(images), labels[:, 0]] += skill
        raw = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = pd.DataFrame({"split": np.resize(["val", "test"], images), "id": np.arange(images), "group": None})
    index["id"] = index["id"].astype(str)
    columns = pd.DataFrame({"sex": random.choice(["F", "M"], images), "age": random.integers(0, 99, images)})
    table = predictions.build_predictions(index, labels, raw, task, classes, raw, columns if known else None)
    val, test = table.select_split("val"), table.select_split("test")
    counts = {"train": 1000, "val": len(val.frame), "test": len(test.frame)}
    dataset = {
        "name": name, "file": f"{name}.npz", "sha256": "5e" * 32, "task": of.task, "classes": list(classes),
        "license": "CC BY 4.0", "note": "", "size": 28, "counts": counts,
    }  # fmt: skip
    meta = ArrayMetadata(dataset, 28, 1, counts, "published", leaks, [0.5], [0.2], "squash")
    intervals, found = subgroups.evaluate_subgroups(test, [0, 40, 80], n_resamples=100, seed=0, confidence=0.95)
    wanted = {"youden": None, "sensitivity": 0.9}
    points = select_operating_points(val, test, wanted, 0.95)
    evidence = ReportInputs(
        meta, described(name), {"val": summary.summarize(val), "test": summary.summarize(test)}, intervals,
        {"targets": wanted, "confidence": 0.95, "points": points}, found,
    )  # fmt: skip
    return SimpleNamespace(meta=meta, test=test, evidence=evidence, published=published.comparison_table(meta))


def verdicts(of: SimpleNamespace) -> dict[str, str]:
    told = report.key_findings(of.evidence, of.evidence.summary["test"], of.published)
    return {sentence: kind for kind, sentence in told}


EXPLAINED = {"sentences": ["A sentence on <explanations>."], "pointing": None}


def page(of: SimpleNamespace, folder: Path, explained: dict = EXPLAINED) -> Path:
    folder.mkdir(exist_ok=True)
    left_out = () if of.evidence.subgroups else ("subgroup_forest",)
    for name, figure in {
        "confusion_matrix": base.confusion_matrix(of.test),
        "score_histograms": uncertainty.score_histograms(of.test),
    }.items():
        base.save_figure(figure, folder / f"{name}.png", 40)
    matrix = (folder / "confusion_matrix.png").read_bytes()  # stands for all others
    pngs = dict.fromkeys({*report.FIGURES, "gallery"}.difference(left_out), matrix)
    pngs["score_histograms"] = (folder / "score_histograms.png").read_bytes()
    text = report.render_report(
        of.evidence,
        of.evidence.summary["test"],
        of.published,
        explained,
        pngs,
        RUN,
    )
    (folder / "index.html").write_text(text, encoding="utf-8")
    return folder / "index.html"


def test_the_verdict_tells_numbers_calibration_subgroups_and_published_scores():
    told = verdicts(made("retinamnist"))
    sentences = list(told)
    assert sentences[0].startswith("AUC 0.")
    assert "on 100 test images (95 % intervals)." in sentences[0]
    assert any(sentence.startswith("Calibration error 0.") for sentence in sentences)
    assert any("none is significantly worse" in sentence for sentence in sentences)
    (beside,) = [sentence for sentence in sentences if "Comparable published AUCs" in sentence]
    assert told[beside] == "good"  # a skill that no published method has


def test_the_verdict_warns_of_chance_leaks_and_classes_that_are_not_judged():
    told = verdicts(made("breastmnist", images=60, skill=0.0, leaks=3, known=False))
    assert next(iter(told.values())) == "bad"
    assert "not significantly better than chance" in next(iter(told))
    assert told["3 images are in two splits, so the metrics may be optimistic."] == "bad"
    assert tables.NO_SUBGROUPS in told
    without = next(sentence for sentence in verdicts(made("chestmnist")) if sentence.startswith("Not evaluated"))
    assert without == f"Not evaluated, without positive or without negative images: {DATASETS['chestmnist'].classes[3]}."


def test_what_stands_in_the_page_is_escaped_and_nothing_points_outside(tmp_path):
    of = made("bloodmnist")
    of.meta.dataset["note"] = "a <script>alert(1)</script> note"
    text = page(of, tmp_path).read_text()
    assert "<script" not in text
    assert "A sentence on &lt;explanations&gt;." in text
    assert "http" not in text.replace("https://medmnist.com", "")
    assert "monitor: loss" in text


def test_without_subgroups_a_sentence_stands_for_table_and_figure(tmp_path):
    with_them = page(made("retinamnist"), tmp_path / "with").read_text()
    without = page(made("retinamnist", known=False), tmp_path / "without").read_text()
    assert 'id="subgroup_forest"' in with_them
    assert tables.NO_SUBGROUPS not in with_them
    assert "subgroup_forest" not in re.sub(r"<style>.*</style>", "", without, flags=re.DOTALL)
    assert f"<p>{tables.NO_SUBGROUPS}</p>" in without
    assert "Patients or lesions" not in without


def test_how_often_maps_point_into_boxes_stands_below_the_gallery(tmp_path):
    one = {"cases": 20, "share": 0.5, "interval": (0.299, 0.701), "chance": 0.071}
    none = {"cases": 0, "share": None, "interval": None, "chance": None}
    of = {"name": "Grad-CAM", "overall": one, "per_class": {"mass": one, "nodule": none}}
    told = {"sentences": ["It points."], "pointing": {"methods": {"grad_cam": of}}}
    text = page(made("chestmnist"), tmp_path, told).read_text()
    assert "Pointing game: hit rates" not in page(made("chestmnist"), tmp_path).read_text()
    cells = re.findall(r"<t[hd]\b[^>]*>([^<]*)", text[text.index("Pointing game: hit rates") :])
    assert cells == [
        "Finding", "Cases", "Chance level", "Grad-CAM", "all", "20", "7", "50 (30 to 70)", "mass", "20", "7",
        "50 (30 to 70)", "nodule", "0", "undefined", "undefined",
    ]  # fmt: skip


def test_marks_of_markdown_are_html_in_the_page_and_all_else_is_escaped(tmp_path):
    text = page(made("bloodmnist", leaks=2), tmp_path).read_text()
    assert "<strong>2 images are in two splits</strong>" in text
    assert f"<code>{'5e' * 32}</code>" in text
    body = re.sub(r"base64,[^\"]*", "", text)
    assert "**" not in body
    assert "`" not in body
    assert rendering.render_markup("<b> `a<b` **c&d**") == "&lt;b&gt; <code>a&lt;b</code> <strong>c&amp;d</strong>"


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a set of each kind."""
    of = made(request.param)
    assert len(of.meta.classes) == KINDS[request.param]
    return page(of, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("width", [1200, 375])
def test_the_page_in_a_browser(browser, written, width):
    tab = browser.new_page(viewport={"width": width, "height": 800})
    messages, requests = [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(written.as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("document.images.length") == len(report.FIGURES) + 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert all(tab.evaluate("[...document.images].map(image => image.alt.length > 20)"))
    # what a screen reader hears first, and in which order
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(head => +head.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tab.evaluate("[...document.querySelectorAll('table')].every(table => table.caption)")
    wide = "[...document.querySelectorAll('caption span')].map(of => of.getBoundingClientRect().right)"
    assert max(tab.evaluate(wide)) <= width  # a caption wraps, however far its table scrolls
    assert tab.evaluate("document.querySelectorAll('h2')[0].textContent") == "Key findings"
    # the keyboard: first the way past the links, then the links, each to a place that is there
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    links = tab.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href').slice(1))")
    assert len(links) > 3
    assert all(tab.evaluate("id => document.getElementById(id) !== null", link) for link in links)
    tab.close()


def test_nothing_is_cut_off_or_folded_away_on_paper(browser, written):
    tab = browser.new_page(viewport={"width": A4, "height": 1000})
    tab.emulate_media(media="print")
    tab.goto(written.as_uri())
    edges = "[...document.querySelectorAll('table, img, pre')].map(of => of.getBoundingClientRect().right)"
    assert max(tab.evaluate(edges)) <= A4
    assert tab.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 100
    assert not tab.evaluate("document.querySelector('nav').checkVisibility()")
    tab.close()
