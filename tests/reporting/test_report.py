"""Report: key findings, and the rendered page in a real browser, for data sets of every task."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.sources.medmnist import DATASETS
from fadeformer.evaluation import predictions, published, subgroups, summary  # fmt: skip
from fadeformer.evaluation.operating_points import resolve_prevalences, select_operating_points
from fadeformer.reporting import rendering, report, subgroup_tables, tables
from fadeformer.reporting.plots import base, uncertainty
from fadeformer.reporting.tables import ReportInputs
from fadeformer.tasks import TASKS

A4 = 680  # width in CSS pixels with margins of 15 mm
NUM_CLASSES = {"breastmnist": 2, "retinamnist": 5, "bloodmnist": 8, "organamnist": 11, "chestmnist": 14}
RUN = "0123456789abcdef0123456789abcdef"


def model_metadata(name: str) -> dict:
    return {
        "model": {"backbone": "fadevit_nano", "pretrained": False, "fade": None}, "best_epoch": 3, "weights": None,
        "params": {"seed": 42, "dataset": {"name": name}, "train": {"epochs": 20, "monitor": "loss"}},
        "calibration": {"slope": [0.5], "offset": [0.0]},
    }  # fmt: skip


def build_inputs(
    name: str, *, images: int = 200, skill: float = 2.0, leaks: int = 0, has_subgroups: bool = True
) -> SimpleNamespace:
    """Build the inputs of a report from random scores."""
    info, rng = DATASETS[name], np.random.default_rng(0)
    task, classes = TASKS[info.task], tuple(info.classes)
    if task.multi_label:
        labels = (rng.random((images, len(classes))) < 0.2).astype(np.int64)
        labels[:, 3] = 0
        raw = 1 / (1 + np.exp(1.5 - rng.normal(size=labels.shape) - skill * labels))
    else:
        labels = rng.integers(0, len(classes), (images, 1))
        logits = rng.normal(size=(images, len(classes)))
        logits[np.arange(images), labels[:, 0]] += skill
        raw = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = pd.DataFrame({"split": np.resize(["val", "test"], images), "id": np.arange(images), "group": None})
    index["id"] = index["id"].astype(str)
    columns = pd.DataFrame({"sex": rng.choice(["F", "M"], images), "age": rng.integers(0, 99, images)})
    table = predictions.build_predictions(index, labels, raw, task, classes, raw, columns if has_subgroups else None)
    val, test = table.select_split("val"), table.select_split("test")
    counts = {"train": 1000, "val": len(val.frame), "test": len(test.frame)}
    dataset = {
        "name": name, "file": f"{name}.npz", "sha256": "5e" * 32, "task": info.task, "classes": list(classes),
        "license": "CC BY 4.0", "note": "", "size": 28, "counts": counts,
    }  # fmt: skip
    meta = ArrayMetadata(dataset, 28, 1, counts, "published", leaks, [0.5], [0.2], "squash")
    intervals, groups = subgroups.evaluate_subgroups(test, [0, 40, 80], n_resamples=100, seed=0, confidence=0.95)
    targets = {"youden": None, "sensitivity": 0.9}
    points = select_operating_points(val, test, targets, 0.95, resolve_prevalences([0.01, 0.2], test))
    results = ReportInputs(
        meta, model_metadata(name), {"val": summary.summarize(val), "test": summary.summarize(test)}, intervals,
        {"targets": targets, "confidence": 0.95, "points": points}, groups,
    )  # fmt: skip
    return SimpleNamespace(meta=meta, test=test, results=results, published=published.comparison_table(meta))


def key_findings(inputs: SimpleNamespace) -> dict[str, str]:
    findings = report.key_findings(inputs.results, inputs.results.summary["test"], inputs.published)
    return {sentence: status for status, sentence in findings}


EXPLANATIONS = {"sentences": ["A sentence on <explanations>."], "pointing": None}


def write_page(inputs: SimpleNamespace, folder: Path, explanations: dict = EXPLANATIONS) -> Path:
    folder.mkdir(exist_ok=True)
    omitted = () if inputs.results.subgroups else ("subgroup_forest",)
    for name, figure in {
        "confusion_matrix": base.confusion_matrix(inputs.test),
        "score_histograms": uncertainty.score_histograms(inputs.test),
    }.items():
        base.save_figure(figure, folder / f"{name}.png", 40)
    matrix = (folder / "confusion_matrix.png").read_bytes()  # used for all other figures too
    pngs = dict.fromkeys({*report.FIGURES, "gallery"}.difference(omitted), matrix)
    pngs["score_histograms"] = (folder / "score_histograms.png").read_bytes()
    text = report.render_report(
        inputs.results,
        inputs.results.summary["test"],
        inputs.published,
        explanations,
        pngs,
        RUN,
    )
    (folder / "index.html").write_text(text, encoding="utf-8")
    return folder / "index.html"


def test_key_findings_cover_all_results():
    findings = key_findings(build_inputs("retinamnist"))
    sentences = list(findings)
    assert sentences[0].startswith("AUC 0.")
    assert "on 100 test images (95 % intervals)." in sentences[0]
    (sentence,) = [sentence for sentence in sentences if sentence.startswith("Calibration error 0.")]
    error = build_inputs("retinamnist").results.summary["test"]["overall"]["class_calibration_error"]
    assert sentence.endswith(f" before calibration on validation; of the scores of all classes {error:.3f} on average.")
    binary = next(sentence for sentence in key_findings(build_inputs("breastmnist")) if "Calibration error" in sentence)
    assert binary.endswith(" before calibration on validation.")
    assert any("none is significantly worse" in sentence for sentence in sentences)
    (comparison,) = [sentence for sentence in sentences if "Comparable published AUCs" in sentence]
    assert findings[comparison] == "good"  # better than every published method


VALIDATION = {
    "expectations": [
        {"check": check, "severity": severity, "description": text, "passed": passed, "rows": rows}
        for check, severity, text, passed, rows in [
            ("same_image_two_labels", "warn", "exact duplicates have the same label", False, 4),
            ("class_too_small", "warn", "val has 5 or more images with RBC", False, 0),
            ("class_too_small", "warn", "test has 5 or more images with RBC", False, 0),
            ("label_shift", "warn", "the labels are alike", True, 0),
        ]
    ]
}


def test_failed_warnings_are_in_findings_and_limitations():
    inputs = build_inputs("breastmnist")
    warnings = tables.data_warnings(VALIDATION)
    assert warnings == [
        "same_image_two_labels, not met: exact duplicates have the same label (4 images)",
        "class_too_small, not met: val has 5 or more images with RBC; test has 5 or more images with RBC",
    ]
    inputs.results = replace(inputs.results, data_warnings=warnings)
    findings = key_findings(inputs)
    for warning in warnings:
        assert findings[f"Data validation warned of {warning}."] == report.BAD
        assert f"**Data validation warned** of {warning}." in tables.limitations(inputs.results)


def test_key_findings_warn_of_chance_and_leakage():
    findings = key_findings(build_inputs("breastmnist", images=60, skill=0.0, leaks=3, has_subgroups=False))
    assert next(iter(findings.values())) == "bad"
    assert "not significantly better than chance" in next(iter(findings))
    assert findings["3 images are in two splits, so the metrics may be optimistic."] == "bad"
    assert subgroup_tables.NO_SUBGROUPS in findings
    sentence = next(
        sentence for sentence in key_findings(build_inputs("chestmnist")) if sentence.startswith("Left out of means")
    )
    assert (
        sentence
        == f"Left out of means, fewer than two patients with or without it: {DATASETS['chestmnist'].classes[3]}."
    )


def test_page_is_escaped_and_has_no_external_links(tmp_path):
    inputs = build_inputs("bloodmnist")
    inputs.meta.dataset["note"] = "a <script>alert(1)</script> note"
    text = write_page(inputs, tmp_path).read_text()
    assert "<script" not in text
    assert "A sentence on &lt;explanations&gt;." in text
    assert "http" not in text.replace("https://medmnist.com", "")
    assert "monitor: loss" in text


def test_page_has_shortfalls_and_stated_prevalences(tmp_path):
    text = write_page(build_inputs("breastmnist"), tmp_path).read_text()
    assert "Smallest detectable shortfall" in text
    assert "smallest detectable shortfall: 0." in text
    assert "Predictive values at stated prevalences" in text
    assert "at the case mix of the test set, as a random sample" in text


def test_missing_subgroups_replace_table_and_figure(tmp_path):
    with_them = write_page(build_inputs("retinamnist"), tmp_path / "with").read_text()
    without = write_page(build_inputs("retinamnist", has_subgroups=False), tmp_path / "without").read_text()
    assert 'id="subgroup_forest"' in with_them
    assert subgroup_tables.NO_SUBGROUPS not in with_them
    assert "subgroup_forest" not in re.sub(r"<style>.*</style>", "", without, flags=re.DOTALL)
    assert f"<p>{subgroup_tables.NO_SUBGROUPS}</p>" in without
    assert "Patients or lesions" not in without


def test_pointing_game_table_is_in_the_page(tmp_path):
    score = {"cases": 20, "share": 0.5, "interval": (0.299, 0.701), "chance": 0.071}
    empty_score = {"cases": 0, "share": None, "interval": None, "chance": None}
    method = {"name": "Grad-CAM", "overall": score, "per_class": {"mass": score, "nodule": empty_score}}
    explanations = {"sentences": ["It points."], "pointing": {"methods": {"grad_cam": method}}}
    text = write_page(build_inputs("chestmnist"), tmp_path, explanations).read_text()
    assert "Pointing game: hit rates" not in write_page(build_inputs("chestmnist"), tmp_path).read_text()
    cells = re.findall(r"<t[hd]\b[^>]*>([^<]*)", text[text.index("Pointing game: hit rates") :])
    assert cells == [
        "Finding", "Cases", "Chance level", "Grad-CAM", "all", "20", "7", "50 (30 to 70)", "mass", "20", "7",
        "50 (30 to 70)", "nodule", "0", "undefined", "undefined",
    ]  # fmt: skip


def test_markdown_is_rendered_and_other_text_escaped(tmp_path):
    text = write_page(build_inputs("bloodmnist", leaks=2), tmp_path).read_text()
    assert "<strong>2 images are in two splits</strong>" in text
    assert f"<code>{'5e' * 32}</code>" in text
    body = re.sub(r"base64,[^\"]*", "", text)
    assert "**" not in body
    assert "`" not in body
    assert rendering.render_markup("<b> `a<b` **c&d**") == "&lt;b&gt; <code>a&lt;b</code> <strong>c&amp;d</strong>"


@pytest.fixture(scope="module", params=NUM_CLASSES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a data set of each task."""
    inputs = build_inputs(request.param)
    assert len(inputs.meta.classes) == NUM_CLASSES[request.param]
    return write_page(inputs, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("width", [1200, 375])
def test_page_is_accessible_in_browser(browser, written, width):
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
    # heading order for screen readers
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(head => +head.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert tab.evaluate("[...document.querySelectorAll('table')].every(table => table.caption)")
    wide = "[...document.querySelectorAll('caption span')].map(of => of.getBoundingClientRect().right)"
    assert max(tab.evaluate(wide)) <= width  # captions wrap even if the table scrolls
    assert tab.evaluate("document.querySelectorAll('h2')[0].textContent") == "Key findings"
    # keyboard navigation: the skip link comes first, and every link has a target
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    links = tab.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href').slice(1))")
    assert len(links) > 3
    assert all(tab.evaluate("id => document.getElementById(id) !== null", link) for link in links)
    tab.close()


def test_print_layout_shows_everything(browser, written):
    tab = browser.new_page(viewport={"width": A4, "height": 1000})
    tab.emulate_media(media="print")
    tab.goto(written.as_uri())
    edges = "[...document.querySelectorAll('table, img, pre')].map(of => of.getBoundingClientRect().right)"
    assert max(tab.evaluate(edges)) <= A4
    assert tab.evaluate("document.querySelector('details table').getBoundingClientRect().height") > 100
    assert not tab.evaluate("document.querySelector('nav').checkVisibility()")
    tab.close()
