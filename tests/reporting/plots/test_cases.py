"""Bands, the most wrong images and the map of features, and their figures."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fadeformer.evaluation import embedding, error_gallery, predictions, subgroups, summary
from fadeformer.evaluation.intervals import curve_bands
from fadeformer.evaluation.metrics import roc_curve_points
from fadeformer.reporting.plots import cases, uncertainty
from fadeformer.tasks import TASKS
from tests.evaluation.test_metrics import made
from tests.reporting.plots.test_base import overlapping

SETS = [("binary-class", 2), ("multi-class", 8), ("multi-class", 30), ("multi-label, binary-class", 14)]


def test_a_band_holds_its_curve_and_narrows_with_more_images():
    widths = []
    for images in (150, 2400):
        p = made("binary-class", 2, images, 0)
        found = curve_bands.compute_bands(p, seed=0, confidence=0.95)
        roc, points = found[found["curve"] == "roc"], roc_curve_points(p)
        curve = np.interp(roc["x"], points["fpr"], points["tpr"])
        inside = (curve >= roc["low"] - 0.02) & (curve <= roc["high"] + 0.02)
        assert inside.mean() > 0.97
        widths.append((roc["high"] - roc["low"]).mean())
    assert widths[1] < widths[0] / 2


def test_a_band_at_a_sensitivity_is_that_of_slow_samples_of_precision():
    p = made("binary-class", 2, 300, 1)
    found = curve_bands.compute_bands(p, seed=0, confidence=0.9)
    at_half = found[(found["curve"] == "pr") & np.isclose(found["x"], 0.5)].iloc[0]
    truth, score, random, read = p.labels[:, 0] == 1, p.scores[:, 1], np.random.default_rng(5), []
    for _ in range(2000):
        rows = np.concatenate([random.choice(np.flatnonzero(side), side.sum()) for side in (truth, ~truth)])
        order = rows[np.argsort(-score[rows], kind="stable")]
        hits = np.cumsum(truth[order])
        place = np.searchsorted(hits / hits[-1], 0.5)
        read.append(hits[place] / (place + 1))
    assert (at_half["low"], at_half["high"]) == pytest.approx(tuple(np.percentile(read, [5, 95])), abs=0.03)


def test_the_most_wrong_come_first_with_what_was_called():
    scores = np.array([[0.1, 0.9, 0.0], [0.7, 0.2, 0.1], [0.0, 0.05, 0.95], [0.3, 0.4, 0.3]])
    index = pd.DataFrame({"split": "test", "id": list("abcd"), "group": None})
    labels = np.array([[1], [2], [0], [0]])
    p = predictions.build_predictions(index, labels, scores, TASKS["multi-class"], ("x", "y", "z"))
    found = error_gallery.most_confident_errors(p, 2)
    assert found[["id", "true", "predicted"]].to_numpy().tolist() == [["c", "x", "z"], ["b", "z", "x"]]
    assert found["score"].tolist() == [0.95, 0.7]
    assert len(error_gallery.most_confident_errors(p, 12)) == 3


def test_a_finding_that_was_missed_or_called_in_vain_is_told_in_words():
    index = pd.DataFrame({"split": "test", "id": ["a", "b", "c"], "group": None})
    labels, scores = np.array([[1, 0], [0, 0], [0, 1]]), np.array([[0.02, 0.1], [0.1, 0.9], [0.2, 0.8]])
    p = predictions.build_predictions(index, labels, scores, TASKS["multi-label, binary-class"], ("mass", "edema"))
    found = error_gallery.most_confident_errors(p, 5)
    assert found[["id", "true", "predicted"]].to_numpy().tolist() == [["a", "mass", "no mass"], ["b", "no edema", "edema"]]
    assert found["score"].tolist() == pytest.approx([0.98, 0.9])


def test_directions_of_most_spread():
    random = np.random.default_rng(0)
    features = (random.normal(size=(50, 4)) * [9, 4, 0.1, 0.1]).astype(np.float32)
    found = embedding.pca_projection(features, pd.Series([f"i{k}" for k in range(50)]))
    assert abs(np.corrcoef(found["x"], features[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(found["y"], features[:, 1])[0, 1]) > 0.99
    assert sum(found.attrs["explained"]) > 0.99


def test_features_that_are_all_alike_lie_in_one_place():
    found = embedding.pca_projection(np.full((6, 3), 0.25, np.float32), pd.Series(list("abcdef")))
    assert (found[["x", "y"]].abs().to_numpy() < 1e-12).all()
    assert found.attrs["explained"] == [0.0, 0.0]


@pytest.mark.parametrize(("task", "classes"), SETS)
def test_figures_of_cases_scores_and_subgroups_cover_nothing(task, classes):
    p = made(task, classes, 300, 0)
    p.frame["subgroup_sex"] = np.resize(["F", "M", "F"], 300)
    p.frame["subgroup_age"] = np.resize(np.arange(95), 300)
    intervals, found = subgroups.evaluate_subgroups(p, [0, 18, 40, 60, 80], n_resamples=100, seed=0, confidence=0.9)
    wrong = error_gallery.most_confident_errors(p, 12)
    pixels = np.random.default_rng(0).integers(0, 256, (len(wrong), 28, 28, 3), dtype=np.uint8)
    maps = {"attention": np.full((len(wrong), 28, 28), 0.1)}
    places = embedding.pca_projection(np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32), p.frame["id"])
    forest = uncertainty.subgroup_forest(summary.summarize(p), intervals, found, 0.9)
    for figure in (
        cases.case_gallery(wrong, pixels, maps), cases.embedding_scatter(p, places, places.attrs["explained"]),
        uncertainty.score_histograms(p), forest,
    ):  # fmt: skip
        FigureCanvasAgg(figure).draw()
        titles = [axes.title for axes in figure.axes if axes.get_title()]
        assert not overlapping(titles)
        assert all(box.get_window_extent().x0 >= 0 for box in titles)
    labels = [label.get_text() for label in forest.axes[0].get_yticklabels()]
    assert labels[0] == "all images (300)"
    assert any(label.startswith("sex: F (200") for label in labels)
    assert not overlapping(list(forest.axes[0].get_yticklabels()))


def test_a_gallery_of_no_mistakes_says_so():
    p = made("binary-class", 2, 20, 0)
    wrong = error_gallery.most_confident_errors(p, 12).iloc[:0]
    figure = cases.case_gallery(wrong, np.zeros((0, 28, 28, 1), np.uint8), {})
    assert figure.texts[0].get_text() == "No errors on test"
