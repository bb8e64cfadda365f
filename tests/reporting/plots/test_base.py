"""Figures: complete labels without overlap, and reproducible files."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fadeformer.data.sources.medmnist import DATASETS
from fadeformer.evaluation import summary
from fadeformer.evaluation.intervals import curve_bands
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io import formatting
from fadeformer.reporting.plots import base, curves
from tests.evaluation.test_metrics import random_predictions

HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3], "train_loss": [1.0, 0.6, 0.4], "val_loss": [1.1, 0.7, 0.8],
        "train_accuracy": [0.4, 0.6, 0.8], "val_accuracy": [0.4, 0.5, 0.6], "val_auc": [0.6, 0.7, 0.8],
    }
)  # fmt: skip


def find_overlaps(labels: list) -> list[tuple[str, str]]:
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.shrunk(0.95, 0.95).overlaps(two)]


TASKS = [
    ("binary-class", 2), ("multi-class", 5), ("multi-class", 30), ("ordinal-regression", 5),
    ("multi-label, binary-class", 14),
]  # fmt: skip


@pytest.mark.parametrize(("task", "classes"), TASKS)
def test_confusion_matrix_labels_do_not_overlap(task, classes):
    p = random_predictions(task, classes, 400, 0)
    drawn = base.confusion_matrix(p)
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    assert set(p.classes) <= {label.get_text().replace("\n", " ") for label in labels}
    assert not find_overlaps([label for label in axes.get_xticklabels() if label.get_visible()])
    assert not find_overlaps([label for label in axes.get_yticklabels() if label.get_visible()])


@pytest.mark.parametrize("figure", [curves.roc_curves, curves.pr_curves])
@pytest.mark.parametrize(("task", "classes"), TASKS)
def test_curves_have_name_value_interval_and_band(figure, task, classes):
    p = random_predictions(task, classes, 400, 0)
    metrics, bounds = summary.summarize(p), summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.9)
    drawn = figure(p, metrics, bounds, curve_bands.compute_bands(p, seed=0, confidence=0.9))
    FigureCanvasAgg(drawn).draw()
    key = "auc" if figure is curves.roc_curves else "average_precision"
    shown = p.classes[-1:] if classes == 2 else p.classes
    values = {
        name: formatting.format_with_interval(metrics["per_class"][name][key], bounds["per_class"][name][key])
        for name in shown
    }
    if classes == 2:
        (entry,) = drawn.axes[0].get_legend().get_texts()
        assert all(part in entry.get_text() for part in (shown[0], values[shown[0]]))
    else:
        assert [axes.get_title() for axes in drawn.axes if axes.lines] == [f"{n}\n{t}" for n, t in values.items()]
    assert all(axes.collections for axes in drawn.axes if axes.lines)
    titles = [axes.title for axes in drawn.axes if axes.lines]
    assert not find_overlaps([*titles, *drawn.legends[0].get_texts(), drawn.legends[0].get_title(), drawn._supxlabel])


@pytest.mark.parametrize("name", ["bloodmnist", "dermamnist", "tissuemnist"])
def test_long_names_stay_inside_the_figure(name):
    p = random_predictions("multi-class", len(DATASETS[name].classes), 300, 1)
    p = type(p)(p.frame, p.task, DATASETS[name].classes)
    drawn = base.confusion_matrix(p)
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    assert not find_overlaps(list(axes.get_yticklabels()))
    assert not find_overlaps(list(axes.get_xticklabels()))
    assert axes.get_tightbbox().x0 >= 0
    assert axes.get_tightbbox().y0 >= 0


def test_numeric_class_names_keep_their_bands(tmp_path):
    p = random_predictions("ordinal-regression", 5, 400, 0)
    p = Predictions(p.frame, p.task, ("0", "1", "2", "NA", "1.50"))
    curve_bands.compute_bands(p, seed=0, confidence=0.9).to_csv(tmp_path / "bands.csv", index=False)
    metrics, bounds = summary.summarize(p), summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.9)
    drawn = curves.roc_curves(p, metrics, bounds, curve_bands.read(tmp_path / "bands.csv"))
    collections = [axes.collections for axes in drawn.axes if axes.lines]
    assert len(collections) == 5
    for (band,) in collections:
        assert len(band.get_paths()[0].vertices) > 100


def test_tiny_test_set_has_curves_without_bands(tmp_path):
    p = random_predictions("binary-class", 2, 4, 0)
    curve_bands.compute_bands(p, seed=0, confidence=0.95).to_csv(tmp_path / "bands.csv", index=False)
    bands = curve_bands.read(tmp_path / "bands.csv")
    assert bands.empty
    metrics, bounds = summary.summarize(p), summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.95)
    assert curves.roc_curves(p, metrics, bounds, bands).axes


@pytest.mark.parametrize("figure", [curves.roc_curves, curves.pr_curves])
def test_absent_class_is_marked_not_evaluated(figure):
    p = random_predictions("multi-class", 3, 50, 0, absent=1)
    metrics, bounds = summary.summarize(p), summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.9)
    drawn = figure(p, metrics, bounds, curve_bands.compute_bands(p, seed=0, confidence=0.9))
    assert "not evaluated: class 1" in drawn.legends[0].get_title().get_text()


def test_confusion_matrix_counts_all_images():
    p = random_predictions("multi-class", 3, 90, 0)
    cells = [text.get_text().split("\n")[0] for text in base.confusion_matrix(p).axes[0].texts]
    assert sum(int(cell) for cell in cells) == 90
    hits = int((p.scores.argmax(axis=1) == p.labels[:, 0]).sum())
    assert sum(int(cells[i]) for i in (0, 4, 8)) == hits


def test_training_curves_mark_the_selected_epoch():
    left, right = base.training_curves(HISTORY, 2).axes
    assert "selected: epoch 2" in [text.get_text() for text in left.get_legend().get_texts()]
    assert len(right.lines) == 4
    assert len(base.training_curves(HISTORY.assign(val_auc=np.nan), 2).axes[1].lines) == 3


@pytest.mark.parametrize("dpi", [50, 100])
def test_saved_figures_are_reproducible(tmp_path, dpi):
    for name in ("a.png", "b.png"):
        base.save_figure(base.confusion_matrix(random_predictions("multi-class", 4, 100, 0)), tmp_path / name, dpi)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
