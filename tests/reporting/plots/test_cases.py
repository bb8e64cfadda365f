"""Confidence bands, error gallery and feature embedding, and their figures."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fadeformer.evaluation import embedding, error_gallery, predictions, subgroups, summary
from fadeformer.evaluation.intervals import curve_bands
from fadeformer.evaluation.metrics import roc_curve_points
from fadeformer.reporting.plots import cases, uncertainty
from fadeformer.tasks import TASKS
from tests.evaluation.test_metrics import random_predictions
from tests.reporting.plots.test_base import find_overlaps

SETS = [("binary-class", 2), ("multi-class", 8), ("multi-class", 30), ("multi-label, binary-class", 14)]


def test_band_contains_curve_and_narrows_with_sample_size():
    widths = []
    for images in (150, 2400):
        p = random_predictions("binary-class", 2, images, 0)
        bands = curve_bands.compute_bands(p, seed=0, confidence=0.95)
        roc, points = bands[bands["curve"] == "roc"], roc_curve_points(p)
        curve = np.interp(roc["x"], points["fpr"], points["tpr"])
        inside = (curve >= roc["low"] - 0.02) & (curve <= roc["high"] + 0.02)
        assert inside.mean() > 0.97
        widths.append((roc["high"] - roc["low"]).mean())
    assert widths[1] < widths[0] / 2


def test_precision_band_matches_explicit_bootstrap():
    p = random_predictions("binary-class", 2, 300, 1)
    bands = curve_bands.compute_bands(p, seed=0, confidence=0.9)
    at_half = bands[(bands["curve"] == "pr") & np.isclose(bands["x"], 0.5)].iloc[0]
    truth, score, rng, precisions = p.labels[:, 0] == 1, p.scores[:, 1], np.random.default_rng(5), []
    for _ in range(2000):
        rows = np.concatenate([rng.choice(np.flatnonzero(side), side.sum()) for side in (truth, ~truth)])
        order = rows[np.argsort(-score[rows], kind="stable")]
        hits = np.cumsum(truth[order])
        index = np.searchsorted(hits / hits[-1], 0.5)
        precisions.append(hits[index] / (index + 1))
    assert (at_half["low"], at_half["high"]) == pytest.approx(tuple(np.percentile(precisions, [5, 95])), abs=0.03)


def test_most_confident_errors_come_first():
    scores = np.array([[0.1, 0.9, 0.0], [0.7, 0.2, 0.1], [0.0, 0.05, 0.95], [0.3, 0.4, 0.3]])
    index = pd.DataFrame({"split": "test", "id": list("abcd"), "group": None})
    labels = np.array([[1], [2], [0], [0]])
    p = predictions.build_predictions(index, labels, scores, TASKS["multi-class"], ("x", "y", "z"))
    errors = error_gallery.most_confident_errors(p, 2)
    assert errors[["id", "true", "predicted"]].to_numpy().tolist() == [["c", "x", "z"], ["b", "z", "x"]]
    assert errors["score"].tolist() == [0.95, 0.7]
    assert len(error_gallery.most_confident_errors(p, 12)) == 3


def test_missed_and_false_findings_are_named():
    index = pd.DataFrame({"split": "test", "id": ["a", "b", "c"], "group": None})
    labels, scores = np.array([[1, 0], [0, 0], [0, 1]]), np.array([[0.02, 0.1], [0.1, 0.9], [0.2, 0.8]])
    p = predictions.build_predictions(index, labels, scores, TASKS["multi-label, binary-class"], ("mass", "edema"))
    errors = error_gallery.most_confident_errors(p, 5)
    assert errors[["id", "true", "predicted"]].to_numpy().tolist() == [
        ["a", "mass", "no mass"],
        ["b", "no edema", "edema"],
    ]
    assert errors["score"].tolist() == pytest.approx([0.98, 0.9])


def test_embedding_finds_principal_components():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(50, 4)) * [9, 4, 0.1, 0.1]).astype(np.float32)
    coordinates = embedding.pca_projection(features, pd.Series([f"i{k}" for k in range(50)]))
    assert abs(np.corrcoef(coordinates["x"], features[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(coordinates["y"], features[:, 1])[0, 1]) > 0.99
    assert sum(coordinates.attrs["explained"]) > 0.99


def test_identical_features_have_identical_coordinates():
    coordinates = embedding.pca_projection(np.full((6, 3), 0.25, np.float32), pd.Series(list("abcdef")))
    assert (coordinates[["x", "y"]].abs().to_numpy() < 1e-12).all()
    assert coordinates.attrs["explained"] == [0.0, 0.0]


@pytest.mark.parametrize(("task", "classes"), SETS)
def test_figure_labels_do_not_overlap(task, classes):
    p = random_predictions(task, classes, 300, 0)
    p.frame["subgroup_sex"] = np.resize(["F", "M", "F"], 300)
    p.frame["subgroup_age"] = np.resize(np.arange(95), 300)
    intervals, groups = subgroups.evaluate_subgroups(p, [0, 18, 40, 60, 80], n_resamples=100, seed=0, confidence=0.9)
    errors = error_gallery.most_confident_errors(p, 12)
    pixels = np.random.default_rng(0).integers(0, 256, (len(errors), 28, 28, 3), dtype=np.uint8)
    maps = {"attention": np.full((len(errors), 28, 28), 0.1)}
    coordinates = embedding.pca_projection(
        np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32), p.frame["id"]
    )
    forest = uncertainty.subgroup_forest(summary.summarize(p), intervals, groups, 0.9)
    for figure in (
        cases.case_gallery(errors, pixels, maps),
        cases.embedding_scatter(p, coordinates, coordinates.attrs["explained"]),
        uncertainty.score_histograms(p), forest,
    ):  # fmt: skip
        FigureCanvasAgg(figure).draw()
        titles = [axes.title for axes in figure.axes if axes.get_title()]
        assert not find_overlaps(titles)
        assert all(box.get_window_extent().x0 >= 0 for box in titles)
    labels = [label.get_text() for label in forest.axes[0].get_yticklabels()]
    assert labels[0] == "all images (300)"
    assert any(label.startswith("sex: F (200") for label in labels)
    assert not find_overlaps(list(forest.axes[0].get_yticklabels()))


def test_gallery_without_errors_says_so():
    index = pd.DataFrame({"split": "test", "id": ["a", "b"], "group": None})
    scores = np.array([[0.9, 0.1], [0.2, 0.8]])
    p = predictions.build_predictions(index, np.array([[0], [1]]), scores, TASKS["binary-class"], ("x", "y"))
    errors = error_gallery.most_confident_errors(p, 12)
    figure = cases.case_gallery(errors, np.zeros((2, 28, 28, 1), np.uint8)[errors["row"].to_numpy()], {})
    assert figure.texts[0].get_text() == "No errors on test"
