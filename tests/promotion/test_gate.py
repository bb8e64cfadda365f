"""Promotion gate: checks of a challenger alone and against the champion."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fadeformer.evaluation import operating_points, predictions, subgroups, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.promotion import gate
from fadeformer.promotion.gate import Challenger, PromotionCriteria
from fadeformer.tasks import TASKS

MINIMAL = PromotionCriteria(
    min_auc=0.0, min_class_auc=None, min_subgroup_auc=None, min_cases=20, max_ece=None, operating_point="youden",
    min_sensitivity=None, margin=0.02, min_gain=None,
)  # fmt: skip
TARGETS = {"youden": None, "sensitivity": 0.9, "specificity": 0.9}
CLASSES = ("normal", "benign", "malignant")


def simulate(
    quality: float, *, images: int = 600, seed: int = 0, noise: float = 1.0, classes: tuple[str, ...] = CLASSES,
    labels: np.ndarray | None = None, first: int = 0, sex: bool = True,
) -> Predictions:  # fmt: skip
    """Simulated predictions; AUC grows with `quality`, and models share a component of their noise."""
    shared = np.random.default_rng(0).normal(size=(images, len(classes)))
    model_noise = np.random.default_rng(seed + 1).normal(size=shared.shape)
    if labels is None:
        labels = np.arange(images) % len(classes)
    task = TASKS["multi-class" if len(classes) > 2 else "binary-class"]
    logits = shared + noise * 0.3 * model_noise + quality * np.eye(len(classes))[labels]
    index = pd.DataFrame({"split": "test", "id": [f"test/{first + i}" for i in range(images)], "group": None})
    metadata = pd.DataFrame({"sex": np.where(np.arange(images) % 20 < 10, "female", "male")}) if sex else None
    return predictions.build_predictions(
        index, labels[:, None], task.probabilities(logits), task, classes, subgroups=metadata
    )


def evaluate(test: Predictions, **changes: object) -> Challenger:
    """Evaluation results of predictions; test also serves as val."""
    bounds, subgroup_results = subgroups.evaluate_subgroups(test, [0.0], n_resamples=100, seed=0, confidence=0.95)
    points = operating_points.select_operating_points(test, test, TARGETS, 0.95)
    return replace(Challenger(test, bounds, 0.95, subgroup_results, points, is_data_valid=True), **changes)


GOOD = simulate(2.0)
GOOD_CHALLENGER = evaluate(GOOD)


def statuses(decision: gate.Decision) -> dict[str, str]:
    return {check.name: check.status for check in decision.checks}


def get_check(decision: gate.Decision, name: str) -> gate.Check:
    return next(check for check in decision.checks if check.name == name)


def test_decision_lists_checks_with_details():
    criteria = replace(
        MINIMAL, min_auc=0.8, min_class_auc=0.8, min_subgroup_auc=0.8, max_ece=0.3, min_sensitivity=0.6
    )  # fmt: skip
    decision = gate.decide(GOOD_CHALLENGER, None, criteria)
    assert decision.promoted
    assert set(statuses(decision).values()) == {"passed"}
    assert list(statuses(decision)) == [
        "data_gate", "finite_scores", "min_auc", "min_class_auc", "min_subgroup_auc", "max_ece", "min_sensitivity",
    ]  # fmt: skip
    assert [item.name for item in get_check(decision, "min_class_auc").items] == list(CLASSES)
    assert [item.name for item in get_check(decision, "min_subgroup_auc").items] == ["sex female", "sex male"]
    assert decision.auc == summary.summarize(GOOD)["overall"]["auc"]


def test_min_auc_uses_lower_bound():
    low, high = GOOD_CHALLENGER.intervals["overall"]["auc"]
    value = summary.summarize(GOOD)["overall"]["auc"]
    assert low < value < high
    assert gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=low)).promoted
    refused = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=(low + value) / 2))
    assert statuses(refused)["min_auc"] == "failed"
    assert refused.reason.startswith(f"lower bound of the test AUC at least {(low + value) / 2:g}: 0.")


def test_value_equal_to_limit_passes():
    area = summary.summarize(GOOD)["per_class"]["benign"]["auc"]
    items = get_check(gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_class_auc=area)), "min_class_auc").items
    assert next(item for item in items if item.name == "benign").status == "passed"
    items = get_check(
        gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_class_auc=np.nextafter(area, 1))), "min_class_auc"
    ).items
    assert next(item for item in items if item.name == "benign").status == "failed"


def test_rare_class_is_skipped_bad_class_fails():
    labels = np.r_[np.zeros(300), np.ones(293), np.full(7, 2)].astype(int)
    rare = evaluate(simulate(2.0, labels=labels))
    decision = gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, min_sensitivity=0.99))
    assert [
        (item.status, item.details) for item in get_check(decision, "min_class_auc").items if item.name == "malignant"
    ] == [("not evaluated", "n = 7")]
    assert get_check(decision, "min_class_auc").details == "2 passed, 1 not evaluated"
    assert get_check(decision, "min_sensitivity").status == "failed"
    assert "malignant" not in get_check(decision, "min_sensitivity").details
    assert (
        statuses(gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, min_cases=7)))["min_class_auc"] == "passed"
    )
    all_rare = gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, min_cases=301))
    assert get_check(all_rare, "min_class_auc").status == "not evaluated"
    assert all_rare.promoted


def test_cases_are_counted_per_patient():
    groups = [f"patient {place % 15}" for place in range(600)]
    few = evaluate(Predictions(GOOD.frame.assign(group=groups), GOOD.task, GOOD.classes))
    criteria = replace(MINIMAL, min_class_auc=0.99, min_subgroup_auc=0.99, min_sensitivity=0.99, min_cases=16)
    decision = gate.decide(few, None, criteria)
    for name in ("min_class_auc", "min_subgroup_auc", "min_sensitivity"):
        assert get_check(decision, name).status == "not evaluated"
        assert {item.details for item in get_check(decision, name).items} <= {"n = 5", "n = 15"}
    assert not gate.decide(few, None, replace(criteria, min_cases=5)).promoted


def test_binary_checks_list_one_class():
    binary = evaluate(simulate(2.0, classes=("normal", "pneumonia")))
    decision = gate.decide(binary, None, replace(MINIMAL, min_class_auc=0.8, min_sensitivity=0.5))
    for name in ("min_class_auc", "min_sensitivity"):
        assert [item.name for item in get_check(decision, name).items] == ["pneumonia"]


def test_unknown_subgroup_column_fails():
    by_column = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_subgroup_auc={"sex": 0.8}))
    assert statuses(by_column)["min_subgroup_auc"] == "passed"
    missing = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_subgroup_auc={"sex": 0.8, "site": 0.8}))
    assert not missing.promoted
    assert get_check(missing, "min_subgroup_auc").details == (
        "site is not a subgroup column of the test images (available: sex); see evaluate.subgroups"
    )
    no_subgroups = gate.decide(evaluate(simulate(2.0, sex=False)), None, replace(MINIMAL, min_subgroup_auc=0.8))
    assert get_check(no_subgroups, "min_subgroup_auc").details == "nothing to evaluate"
    assert no_subgroups.promoted


def test_bad_subgroup_fails_good_model():
    frame = GOOD.frame.copy()
    men = frame["subgroup_sex"] == "male"
    columns = [f"score_{c}" for c in range(3)]
    frame.loc[men, columns] = frame.loc[men, columns].sample(frac=1, random_state=0).to_numpy()
    unfair = evaluate(Predictions(frame, GOOD.task, GOOD.classes))
    decision = gate.decide(unfair, None, replace(MINIMAL, min_auc=0.65, min_subgroup_auc=0.7))
    assert [name for name, status in statuses(decision).items() if status == "failed"] == ["min_subgroup_auc"]
    assert get_check(decision, "min_subgroup_auc").details.startswith("sex male 0.")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.1, 1.5])
def test_invalid_scores_stop_further_checks(wrong):
    frame = GOOD.frame.copy()
    frame.loc[7, "score_1"] = wrong
    invalid = replace(GOOD_CHALLENGER, test=Predictions(frame, GOOD.task, GOOD.classes))
    decision = gate.decide(invalid, GOOD, MINIMAL)
    assert list(statuses(decision)) == ["data_gate", "finite_scores"]
    assert get_check(decision, "finite_scores").details == "1 images with invalid scores, such as test/7"
    assert not decision.promoted
    with_invalid_champion = gate.decide(GOOD_CHALLENGER, Predictions(frame, GOOD.task, GOOD.classes), MINIMAL)
    assert statuses(with_invalid_champion)["champion_finite"] == "failed"
    assert with_invalid_champion.champion_auc is None


def test_non_inferiority_uses_paired_difference():
    worse = evaluate(simulate(1.9, seed=1))
    difference = gate.paired_auc_difference(worse.test, GOOD, 0.95)
    assert difference.low < difference.value < 0
    within_margin = gate.decide(worse, GOOD, replace(MINIMAL, margin=-difference.low + 1e-6))
    assert within_margin.promoted
    assert get_check(within_margin, "not_inferior").details.startswith(f"difference {difference.value:+.4f}")
    assert (
        statuses(gate.decide(worse, GOOD, replace(MINIMAL, margin=-difference.low - 1e-6)))["not_inferior"] == "failed"
    )
    assert within_margin.champion_auc == summary.summarize(GOOD)["overall"]["auc"]


def test_comparison_ignores_row_order():
    other = simulate(1.5, seed=1)
    shuffled = Predictions(other.frame.sample(frac=1, random_state=0), other.task, other.classes)
    assert gate.paired_auc_difference(shuffled, GOOD, 0.95) == gate.paired_auc_difference(other, GOOD, 0.95)
    assert gate.paired_auc_difference(GOOD, GOOD, 0.95).low == 0


def test_force_promotes_and_is_reported():
    decision = gate.decide(
        GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=1.0), force_reason="the old one cannot read DICOM"
    )
    assert decision.promoted
    assert not decision.passed
    assert decision.reason.startswith(
        "FORCED: the old one cannot read DICOM; without force: lower bound of the test AUC"
    )


def without_class(labels: np.ndarray) -> Challenger:
    return evaluate(simulate(2.0, labels=labels))


def with_nan() -> Predictions:
    frame = GOOD.frame.copy()
    frame.loc[3, "score_0"] = np.nan
    return Predictions(frame, GOOD.task, GOOD.classes)


def single_patient() -> Predictions:
    return Predictions(GOOD.frame.assign(group="p1"), GOOD.task, GOOD.classes)


SMALL_SET = simulate(2.0, images=30)
CRITERIA = replace(MINIMAL, min_auc=0.8, min_class_auc=0.7, min_subgroup_auc=0.7, max_ece=0.3, min_sensitivity=0.5)
# Challenger, champion, changes to CRITERIA, and the failed checks; without any, the challenger is promoted.
DECISIONS = {
    "first model, good": (GOOD_CHALLENGER, None, {}, []),
    "first model, below min_auc": (GOOD_CHALLENGER, None, {"min_auc": 0.97}, ["min_auc"]),
    "first model, at chance": (
        evaluate(simulate(0.0)), None, {}, ["min_auc", "min_class_auc", "min_subgroup_auc", "min_sensitivity"],
    ),
    "equal to champion": (GOOD_CHALLENGER, GOOD, {}, []),
    "equal to champion, margin 0": (GOOD_CHALLENGER, GOOD, {"margin": 0.0}, []),
    "equal to champion, gain required": (GOOD_CHALLENGER, GOOD, {"min_gain": 0.0}, ["better"]),
    "better than champion": (evaluate(simulate(3.0, seed=1)), GOOD, {}, []),
    "better than champion, gain required": (evaluate(simulate(3.0, seed=1)), GOOD, {"min_gain": 0.01}, []),
    "better than champion, larger gain required": (
        evaluate(simulate(3.0, seed=1)), GOOD, {"min_gain": 0.5}, ["better"],
    ),
    "worse within margin": (evaluate(simulate(1.8, seed=1)), GOOD, {"margin": 0.02}, []),
    "worse within margin, not significant": (
        evaluate(simulate(1.8, seed=1)), GOOD, {"margin": 0.015}, ["not_inferior"],
    ),
    "worse than champion": (evaluate(simulate(1.5, seed=1)), GOOD, {}, ["not_inferior"]),
    "worse with a large margin, below min_auc": (
        evaluate(simulate(1.0, seed=1)), GOOD, {"margin": 1.0}, ["min_auc"],
    ),
    "small test set, wide interval": (evaluate(SMALL_SET), None, {"min_auc": 0.9}, ["min_auc"]),
    "small test set, too few cases per class": (evaluate(SMALL_SET), None, {"min_auc": 0.7}, []),
    "small test set, non-inferiority not shown": (
        evaluate(simulate(2.0, images=30, seed=1)), SMALL_SET, {"min_auc": 0.7}, ["not_inferior"],
    ),
    "single patient": (
        evaluate(single_patient()), single_patient(), {"min_auc": 0.0, "margin": 0.0}, ["min_auc", "not_inferior"],
    ),
    "unknown subgroup column": (GOOD_CHALLENGER, None, {"min_subgroup_auc": {"site": 0.7}}, ["min_subgroup_auc"]),
    "no subgroups": (evaluate(simulate(2.0, sex=False)), None, {}, []),
    "subgroup below its minimum": (GOOD_CHALLENGER, None, {"min_subgroup_auc": {"sex": 0.99}}, ["min_subgroup_auc"]),
    "changed test set": (GOOD_CHALLENGER, simulate(2.0, first=1), {}, ["same_test_images"]),
    "changed test label": (
        GOOD_CHALLENGER, simulate(2.0, labels=(np.arange(600) + (np.arange(600) == 5)) % 3), {}, ["same_test_images"],
    ),
    "other classes": (GOOD_CHALLENGER, simulate(2.0, classes=("a", "b", "c")), {}, ["same_classes"]),
    "another task": (GOOD_CHALLENGER, simulate(2.0, classes=("normal", "pneumonia")), {}, ["same_classes"]),
    "NaN in challenger": (replace(GOOD_CHALLENGER, test=with_nan()), None, {}, ["finite_scores"]),
    "NaN in champion": (GOOD_CHALLENGER, with_nan(), {}, ["champion_finite"]),
    "absent class": (without_class(np.arange(600) % 2), None, {}, []),
    "class with 7 images": (without_class(np.r_[np.arange(593) % 2, np.full(7, 2)]), None, {}, []),
    "single class": (without_class(np.zeros(600, int)), None, {}, ["min_auc"]),
    "calibration error": (GOOD_CHALLENGER, None, {"max_ece": 0.001}, ["max_ece"]),
    "sensitivity": (GOOD_CHALLENGER, None, {"min_sensitivity": 0.99}, ["min_sensitivity"]),
    "sensitivity at another operating point": (
        GOOD_CHALLENGER, None, {"min_sensitivity": 0.85, "operating_point": "sensitivity"}, [],
    ),
    "data validation failed": (replace(GOOD_CHALLENGER, is_data_valid=False), None, {}, ["data_gate"]),
    "rolled back before": (
        replace(GOOD_CHALLENGER, rollback_reason="wrong on the new scanner"), None, {}, ["not_rolled_back"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_decision(case):
    challenger, champion, changes, failed = DECISIONS[case]
    criteria = replace(CRITERIA, **changes)
    decision = gate.decide(challenger, champion, criteria)
    assert [name for name, status in statuses(decision).items() if status == "failed"] == failed
    assert decision.promoted == (not failed)
    assert gate.decide(challenger, champion, criteria, force_reason="because").promoted
