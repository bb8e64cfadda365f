"""Operating points selected on val and evaluated on test; net benefit by formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.errors import UserError
from fadeformer.evaluation import operating_points
from fadeformer.evaluation.intervals.proportions import wilson_interval
from tests.evaluation.test_metrics import random_predictions

TARGETS = {"youden": None, "sensitivity": 0.9, "specificity": 0.8}
CONFIDENCE = 0.95
MULTI_LABEL = "multi-label, binary-class"


def rates(truth, predicted):
    return (predicted & truth).sum() / truth.sum(), (~predicted & ~truth).sum() / (~truth).sum()


@given(st.integers(0, 10_000), st.integers(4, 60), st.booleans(), st.floats(0.05, 1))
def test_threshold_meets_target_and_is_optimal(seed, images, coarse, target):
    random = np.random.default_rng(seed)
    truth = np.arange(images) % 3 == 0
    score = random.random(images) * 0.6 + 0.3 * truth
    score = np.round(score, 1) if coarse else score
    every = [rates(truth, score >= t) for t in np.append(np.unique(score), 2.0)]
    youden, sensitive, specific = (
        rates(truth, score >= operating_points.choose_threshold(truth, score, rule, target)) for rule in TARGETS
    )
    assert sum(youden) == pytest.approx(max(map(sum, every)))
    assert sensitive[0] >= target
    assert sensitive[1] == pytest.approx(max(spec for sens, spec in every if sens >= target))
    assert specific[1] >= target
    assert specific[0] == pytest.approx(max(sens for sens, spec in every if spec >= target))


def test_threshold_is_between_scores():
    truth, score = np.array([True, True, False, False]), np.array([0.9, 0.7, 0.4, 0.1])
    assert operating_points.choose_threshold(truth, score, "youden", None) == pytest.approx(0.55)
    assert operating_points.choose_threshold(truth, score, "sensitivity", 0.5) == pytest.approx(0.8)
    assert operating_points.choose_threshold(truth, score, "specificity", 0.5) == pytest.approx(0.25)
    assert operating_points.choose_threshold(truth, score, "sensitivity", 1.0) == pytest.approx(0.55)
    certain = np.array([True, False]), np.array([0.5, 1.0])
    assert not (certain[1] >= operating_points.choose_threshold(*certain, "specificity", 1.0)).any()
    adjacent = np.array([np.nextafter(1.0, 0), 1.0, 0.3])
    threshold = operating_points.choose_threshold(np.array([False, True, False]), adjacent, "youden", None)
    assert (adjacent >= threshold).tolist() == [False, True, False]
    assert operating_points.choose_threshold(np.ones(4, bool), score, "youden", None) is None


@pytest.mark.parametrize(("task", "classes"), [("binary-class", 2), ("multi-class", 4), (MULTI_LABEL, 3)])
def test_points_selected_on_val_evaluated_on_test(task, classes):
    val, test = random_predictions(task, classes, 200, 0), random_predictions(task, classes, 300, 1)
    points = operating_points.select_operating_points(val, test, TARGETS, CONFIDENCE)
    assert list(points) == list(TARGETS)
    for rule in TARGETS:
        assert len(points[rule]) == (1 if classes == 2 else classes)
    assert all(point["on_val"]["sensitivity"] >= 0.9 for point in points["sensitivity"].values())
    assert all(point["on_val"]["specificity"] >= 0.8 for point in points["specificity"].values())
    name = test.classes[-1]
    point = points["youden"][name]
    column = classes - 1
    truth = test.labels[:, column] == 1 if task == MULTI_LABEL else test.labels[:, 0] == column
    predicted = test.scores[:, column] >= point["threshold"]
    sensitivity = point["on_test"]["sensitivity"]
    assert sensitivity["value"] == pytest.approx(rates(truth, predicted)[0])
    assert (sensitivity["low"], sensitivity["high"]) == wilson_interval(
        int((truth & predicted).sum()), int(truth.sum())
    )
    positive = point["on_test"]["positive_predictive_value"]
    assert positive["value"] == pytest.approx(truth[predicted].mean())
    assert (positive["low"], positive["high"]) == wilson_interval(int((truth & predicted).sum()), int(predicted.sum()))
    assert point["on_test"]["negative_predictive_value"]["value"] == pytest.approx(1 - truth[~predicted].mean())


def test_predictive_values_follow_stated_prevalence():
    val, test = random_predictions("binary-class", 2, 200, 0), random_predictions("binary-class", 2, 300, 1)
    prevalences = operating_points.resolve_prevalences([0.01, 0.5], test)
    point = operating_points.select_operating_points(val, test, TARGETS, CONFIDENCE, prevalences)["youden"]["class 1"]
    rates = {name: point["on_test"][name]["value"] for name in ("sensitivity", "specificity")}
    assert [stated["prevalence"] for stated in point["at_prevalence"]] == [0.01, 0.5]
    for stated in point["at_prevalence"]:
        true = rates["sensitivity"] * stated["prevalence"]
        false = (1 - rates["specificity"]) * (1 - stated["prevalence"])
        positive, negative = stated["positive_predictive_value"], stated["negative_predictive_value"]
        assert positive["value"] == pytest.approx(true / (true + false))
        assert positive["low"] < positive["value"] < positive["high"]
        missed = (1 - rates["sensitivity"]) * stated["prevalence"]
        correct = rates["specificity"] * (1 - stated["prevalence"])
        assert negative["value"] == pytest.approx(correct / (correct + missed))
        assert negative["low"] < negative["value"] < negative["high"]


def test_prevalences_are_resolved_by_class():
    binary, several = random_predictions("binary-class", 2, 20, 0), random_predictions("multi-class", 3, 20, 0)
    assert operating_points.resolve_prevalences(None, binary) == {"class 1": []}
    assert operating_points.resolve_prevalences([0.1], binary) == {"class 1": [0.1]}
    assert operating_points.resolve_prevalences([0.1, 0.2], several) == {f"class {c}": [0.1, 0.2] for c in range(3)}
    by_class = {"class 0": [0.1], "class 2": [0.2, 0.3]}
    assert operating_points.resolve_prevalences(by_class, several) == by_class
    with pytest.raises(UserError, match=r"evaluate.prevalence names class 0; classes with a threshold: class 1"):
        operating_points.resolve_prevalences({"class 0": [0.1]}, binary)


def test_repeated_patient_images_widen_intervals():
    val, test = random_predictions("binary-class", 2, 200, 0), random_predictions("binary-class", 2, 100, 1)
    repeated = test.frame.loc[test.frame.index.repeat(4)].reset_index(drop=True)
    repeated["id"], repeated["group"] = [f"{i}" for i in range(400)], [f"patient {i // 4}" for i in range(400)]
    clustered = type(test)(repeated, test.task, test.classes)
    ungrouped = type(test)(repeated.assign(group=None), test.task, test.classes)
    widths = []
    for table in (clustered, ungrouped, test):
        point = operating_points.select_operating_points(val, table, TARGETS, CONFIDENCE)["youden"]["class 1"][
            "on_test"
        ]["sensitivity"]
        widths.append(point["high"] - point["low"])
    assert widths[0] > 1.5 * widths[1]
    assert widths[0] == pytest.approx(widths[2], rel=0.2)


def test_unevaluable_finding_has_no_operating_point():
    val, test = random_predictions(MULTI_LABEL, 3, 50, 0, absent=1), random_predictions(MULTI_LABEL, 3, 50, 1)
    assert operating_points.select_operating_points(val, test, TARGETS, CONFIDENCE)["youden"]["class 1"] is None
    assert operating_points.select_operating_points(test, val, TARGETS, CONFIDENCE)["youden"]["class 1"] is None


def test_net_benefit_matches_formula():
    p = random_predictions("binary-class", 2, 40, 0)
    table = operating_points.net_benefit(p)
    assert list(table.columns) == ["class", "probability", "model", "all"]
    assert len(table) == 99
    row = table[np.isclose(table["probability"], 0.3)].iloc[0]
    truth, predicted = p.labels[:, 0] == 1, p.scores[:, 1] >= 0.3
    assert row["model"] == pytest.approx(((truth & predicted).sum() - 3 / 7 * (~truth & predicted).sum()) / 40)
    assert row["all"] == pytest.approx((truth.sum() - 3 / 7 * (~truth).sum()) / 40)
    assert operating_points.net_benefit(random_predictions("binary-class", 2, 10, 0, absent=0)).empty
