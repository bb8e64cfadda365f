"""Figures of uncertainty, calibration and clinical utility: complete, with labels that do not overlap."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fadeformer.evaluation import operating_points, summary
from fadeformer.io import formatting
from fadeformer.reporting.plots import uncertainty
from tests.evaluation.test_metrics import random_predictions
from tests.reporting.plots.test_base import find_overlaps

SETS = [
    ("binary-class", 2, None), ("ordinal-regression", 5, None), ("multi-class", 8, 1), ("multi-class", 30, None),
    ("multi-label, binary-class", 14, 3),
]  # fmt: skip


def forest(p):
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.9)
    return uncertainty.auc_forest(p, summary.summarize(p), bounds, 0.9)


@pytest.mark.parametrize(("task", "classes", "absent"), SETS)
def test_auc_forest_has_a_row_per_class(task, classes, absent):
    p = random_predictions(task, classes, 600, 0, absent=absent)
    figure = forest(p)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert set(names) - {"mean"} == set(p.classes[-1:] if classes == 2 else p.classes)
    assert not find_overlaps(axes.get_yticklabels())
    assert not find_overlaps(axes.texts)
    metrics, labels = summary.summarize(p), dict(zip(names, (text.get_text() for text in axes.texts), strict=True))
    bounds = summary.confidence_intervals(p, n_resamples=100, seed=0, confidence=0.9)
    name = p.classes[-1]
    auc = formatting.format_with_interval(metrics["per_class"][name]["auc"], bounds["per_class"][name]["auc"])
    assert labels[name] == f"{auc},  n = {metrics['per_class'][name]['support']} of 600"
    if absent is not None:
        assert labels[f"class {absent}"] == "not evaluated"
    assert figure.bbox.x1 >= max(text.get_window_extent().x1 for text in axes.texts)


@pytest.mark.parametrize(("task", "classes", "absent"), SETS)
def test_reliability_points_are_bin_frequencies(task, classes, absent):
    p = random_predictions(task, classes, 600, 0, absent=absent)
    figure = uncertainty.reliability_diagram(p, (0.456, 0.123), 0.95)
    FigureCanvasAgg(figure).draw()
    assert "0.123" in figure.legends[0].get_texts()[-1].get_text()
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    mean_scores, frequencies = line.get_data()
    assert len(mean_scores) == 10
    assert np.all(np.diff(mean_scores) > 0)
    if classes == 2:
        order = np.argsort(p.scores[:, 1])
        assert frequencies[0] == pytest.approx(p.labels[order[:60], 0].mean())
        assert mean_scores[-1] == pytest.approx(p.scores[order[-60:], 1].mean())
    (steps,) = figure.axes[1].patches  # each count appears twice, at both edges of its bar
    assert steps.get_xy()[1:-1, 1].sum() / 2 == 600 * (classes if p.task.multi_label else 1)


@pytest.mark.parametrize(("task", "classes", "absent"), SETS)
def test_decision_curves_cover_all_evaluated_classes(task, classes, absent):
    p = random_predictions(task, classes, 600, 0, absent=absent)
    figure = uncertainty.decision_curves(operating_points.net_benefit(p))
    FigureCanvasAgg(figure).draw()
    drawn = {axes.get_title() for axes in figure.axes if axes.lines}
    assert drawn == {name for c, name in enumerate(p.classes[-1:] if classes == 2 else p.classes) if c != absent}
    titles = [axes.title for axes in figure.axes if axes.lines]
    assert not find_overlaps([*titles, *figure.legends[0].get_texts(), figure._supxlabel])


def test_single_label_value_is_marked_not_evaluated():
    p = random_predictions("binary-class", 2, 30, 0, absent=0)
    texts = [text.get_text() for text in forest(p).axes[0].texts]
    assert texts == ["not evaluated"]
    assert not [axes for axes in uncertainty.decision_curves(operating_points.net_benefit(p)).axes if axes.lines]
