"""Figures: everything named, nothing on top of anything else, the same bytes each time."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fadeformer import plots
from fadeformer.datasets.medmnist import SETS
from tests.test_metrics import made

FIGURES = (plots.confusion_matrix, plots.roc_curves, plots.pr_curves)
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3], "train_loss": [1.0, 0.6, 0.4], "val_loss": [1.1, 0.7, 0.8],
        "train_accuracy": [0.4, 0.6, 0.8], "val_accuracy": [0.4, 0.5, 0.6], "val_auc": [0.6, 0.7, 0.8],
    }
)  # fmt: skip


def texts(figure: Figure) -> str:
    """All that is written in a figure, in one line."""
    axes = figure.axes[0]
    found = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    legend = axes.get_legend()
    if legend:
        found += legend.get_texts()
    return " | ".join(text.get_text().replace("\n", " ") for text in found)


def overlapping(labels: list) -> list[tuple[str, str]]:
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.shrunk(0.95, 0.95).overlaps(two)]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("task", "classes"),
    [
        ("binary-class", 2),
        ("multi-class", 5),
        ("multi-class", 30),
        ("ordinal-regression", 5),
        ("multi-label, binary-class", 14),
    ],
)
def test_every_class_is_named_and_no_label_covers_another(figure, task, classes):
    p = made(task, classes, 400, 0)
    drawn = figure(p)
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    for name in p.classes[-1:] if classes == 2 and figure is not plots.confusion_matrix else p.classes:
        assert name in texts(drawn)
    assert not overlapping([label for label in axes.get_xticklabels() if label.get_visible()])
    assert not overlapping([label for label in axes.get_yticklabels() if label.get_visible()])
    if axes.get_legend():
        assert not overlapping(axes.get_legend().get_texts())
        assert not axes.get_legend().get_window_extent().overlaps(axes.patch.get_window_extent())
        assert axes.get_legend().get_window_extent().x1 <= drawn.bbox.x1


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("name", ["bloodmnist", "dermamnist", "tissuemnist"])
def test_long_names_stay_inside(figure, name):
    p = made("multi-class", len(SETS[name].classes), 300, 1)
    p = type(p)(p.frame, p.task, SETS[name].classes)
    drawn = figure(p)
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    assert not overlapping(list(axes.get_yticklabels()))
    assert not overlapping(list(axes.get_xticklabels()))
    assert axes.get_tightbbox().x0 >= 0
    assert axes.get_tightbbox().y0 >= 0


@pytest.mark.parametrize("figure", [plots.roc_curves, plots.pr_curves])
def test_a_class_that_is_not_there_is_named_as_not_judged(figure):
    assert "class 1 not judged" in texts(figure(made("multi-class", 3, 50, 0, absent=1)))


def test_counts_of_a_confusion_matrix_are_those_of_the_images():
    p = made("multi-class", 3, 90, 0)
    cells = [text.get_text().split("\n")[0] for text in plots.confusion_matrix(p).axes[0].texts]
    assert sum(int(cell) for cell in cells) == 90
    hits = int((p.scores.argmax(axis=1) == p.labels[:, 0]).sum())
    assert sum(int(cells[i]) for i in (0, 4, 8)) == hits


def test_training_curves_mark_the_epoch_that_was_kept():
    left, right = plots.training_curves(HISTORY, 2).axes
    assert "kept: epoch 2" in [text.get_text() for text in left.get_legend().get_texts()]
    assert len(right.lines) == 4
    assert len(plots.training_curves(HISTORY.assign(val_auc=np.nan), 2).axes[1].lines) == 3


@pytest.mark.parametrize("dpi", [50, 100])
def test_a_figure_is_saved_with_the_same_bytes(tmp_path, dpi):
    for name in ("a.png", "b.png"):
        plots.save(plots.roc_curves(made("multi-class", 4, 100, 0)), tmp_path / name, dpi)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
