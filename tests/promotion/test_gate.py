"""Who becomes champion, and why not: what is asked of one model, and of two."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fadeformer.evaluation import operating_points, predictions, subgroups, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.promotion import gate
from fadeformer.promotion.gate import Challenger, PromotionCriteria
from fadeformer.tasks import TASKS

NOTHING = PromotionCriteria(
    min_auc=0.0, min_class_auc=None, min_subgroup_auc=None, min_cases=20, max_ece=None, operating_point="youden",
    min_sensitivity=None, margin=0.02, min_gain=None,
)  # fmt: skip
POINTS = {"youden": None, "sensitivity": 0.9, "specificity": 0.9}
CLASSES = ("normal", "benign", "malignant")


def judged(
    quality: float, *, images: int = 600, seed: int = 0, noise: float = 1.0, classes: tuple[str, ...] = CLASSES,
    labels: np.ndarray | None = None, first: int = 0, sex: bool = True,
) -> Predictions:  # fmt: skip
    """Predictions whose AUC grows with quality: what `seed` draws is shared by all models, `noise` is a model's own."""
    shared = np.random.default_rng(0).normal(size=(images, len(classes)))
    own = np.random.default_rng(seed + 1).normal(size=shared.shape)
    if labels is None:
        labels = np.arange(images) % len(classes)
    task = TASKS["multi-class" if len(classes) > 2 else "binary-class"]
    logits = shared + noise * 0.3 * own + quality * np.eye(len(classes))[labels]
    index = pd.DataFrame({"split": "test", "id": [f"test/{first + i}" for i in range(images)], "group": None})
    known = pd.DataFrame({"sex": np.where(np.arange(images) % 20 < 10, "female", "male")}) if sex else None
    return predictions.build_predictions(
        index, labels[:, None], task.probabilities(logits), task, classes, subgroups=known
    )


def candidate(test: Predictions, **changes: object) -> Challenger:
    """All that evaluate would have found of it; val is like test."""
    bounds, of_subgroups = subgroups.evaluate_subgroups(test, [0.0], n_resamples=100, seed=0, confidence=0.95)
    points = operating_points.select_operating_points(test, test, POINTS, 0.95)
    return replace(Challenger(test, bounds, 0.95, of_subgroups, points, is_data_valid=True), **changes)


GOOD = judged(2.0)
OF_GOOD = candidate(GOOD)


def rules(decision: gate.Decision) -> dict[str, str]:
    return {rule.name: rule.status for rule in decision.checks}


def one(decision: gate.Decision, name: str) -> gate.Check:
    return next(rule for rule in decision.checks if rule.name == name)


def test_what_is_asked_is_shown_with_its_figures():
    asked = replace(
        NOTHING, min_auc=0.8, min_class_auc=0.8, min_subgroup_auc=0.8, max_ece=0.3, min_sensitivity=0.6
    )  # fmt: skip
    decision = gate.decide(OF_GOOD, None, asked)
    assert decision.promoted
    assert set(rules(decision).values()) == {"passed"}
    assert list(rules(decision)) == [
        "data_gate", "finite_scores", "min_auc", "min_class_auc", "min_subgroup_auc", "max_ece", "min_sensitivity",
    ]  # fmt: skip
    assert [part.name for part in one(decision, "min_class_auc").items] == list(CLASSES)
    assert [part.name for part in one(decision, "min_subgroup_auc").items] == ["sex female", "sex male"]
    assert decision.auc == summary.summarize(GOOD)["overall"]["auc"]


def test_the_lower_bound_counts_and_not_the_value():
    low, high = OF_GOOD.intervals["overall"]["auc"]
    value = summary.summarize(GOOD)["overall"]["auc"]
    assert low < value < high
    assert gate.decide(OF_GOOD, None, replace(NOTHING, min_auc=low)).promoted
    refused = gate.decide(OF_GOOD, None, replace(NOTHING, min_auc=(low + value) / 2))
    assert rules(refused)["min_auc"] == "failed"
    assert refused.reason.startswith(f"lower bound of the test AUC at least {(low + value) / 2:g}: 0.")


def test_a_bound_is_passed_by_exactly_what_it_asks():
    area = summary.summarize(GOOD)["per_class"]["benign"]["auc"]
    parts = one(gate.decide(OF_GOOD, None, replace(NOTHING, min_class_auc=area)), "min_class_auc").items
    assert next(part for part in parts if part.name == "benign").status == "passed"
    parts = one(
        gate.decide(OF_GOOD, None, replace(NOTHING, min_class_auc=np.nextafter(area, 1))), "min_class_auc"
    ).items
    assert next(part for part in parts if part.name == "benign").status == "failed"


def test_a_rare_class_is_not_judged_and_a_common_one_that_is_bad_stops():
    labels = np.r_[np.zeros(300), np.ones(293), np.full(7, 2)].astype(int)
    rare = candidate(judged(2.0, labels=labels))
    decision = gate.decide(rare, None, replace(NOTHING, min_class_auc=0.7, min_sensitivity=0.99))
    assert [
        (part.status, part.details) for part in one(decision, "min_class_auc").items if part.name == "malignant"
    ] == [("not evaluated", "n = 7")]
    assert one(decision, "min_class_auc").details == "2 passed, 1 not evaluated"
    assert one(decision, "min_sensitivity").status == "failed"
    assert "malignant" not in one(decision, "min_sensitivity").details
    assert rules(gate.decide(rare, None, replace(NOTHING, min_class_auc=0.7, min_cases=7)))["min_class_auc"] == "passed"
    every = gate.decide(rare, None, replace(NOTHING, min_class_auc=0.7, min_cases=301))
    assert one(every, "min_class_auc").status == "not evaluated"
    assert every.promoted


def test_patients_are_counted_where_they_are_known():
    groups = [f"patient {place % 15}" for place in range(600)]
    few = candidate(Predictions(GOOD.frame.assign(group=groups), GOOD.task, GOOD.classes))
    asked = replace(NOTHING, min_class_auc=0.99, min_subgroup_auc=0.99, min_sensitivity=0.99, min_cases=16)
    decision = gate.decide(few, None, asked)
    for name in ("min_class_auc", "min_subgroup_auc", "min_sensitivity"):
        assert one(decision, name).status == "not evaluated"
        assert {part.details for part in one(decision, name).items} <= {"n = 5", "n = 15"}
    assert not gate.decide(few, None, replace(asked, min_cases=5)).promoted


def test_of_two_classes_one_is_told():
    binary = candidate(judged(2.0, classes=("normal", "pneumonia")))
    decision = gate.decide(binary, None, replace(NOTHING, min_class_auc=0.8, min_sensitivity=0.5))
    for name in ("min_class_auc", "min_sensitivity"):
        assert [part.name for part in one(decision, name).items] == ["pneumonia"]


def test_subgroups_by_column_and_one_that_is_not_known():
    by_column = gate.decide(OF_GOOD, None, replace(NOTHING, min_subgroup_auc={"sex": 0.8}))
    assert rules(by_column)["min_subgroup_auc"] == "passed"
    missing = gate.decide(OF_GOOD, None, replace(NOTHING, min_subgroup_auc={"sex": 0.8, "site": 0.8}))
    assert not missing.promoted
    assert one(missing, "min_subgroup_auc").details == (
        "site is not a subgroup column of the test images (available: sex); see evaluate.subgroups"
    )
    undivided = gate.decide(candidate(judged(2.0, sex=False)), None, replace(NOTHING, min_subgroup_auc=0.8))
    assert one(undivided, "min_subgroup_auc").details == "nothing to evaluate"
    assert undivided.promoted


def test_a_subgroup_that_is_bad_stops_what_is_good_as_a_whole():
    frame = GOOD.frame.copy()
    men = frame["subgroup_sex"] == "male"
    columns = [f"score_{c}" for c in range(3)]
    frame.loc[men, columns] = frame.loc[men, columns].sample(frac=1, random_state=0).to_numpy()
    unfair = candidate(Predictions(frame, GOOD.task, GOOD.classes))
    decision = gate.decide(unfair, None, replace(NOTHING, min_auc=0.65, min_subgroup_auc=0.7))
    assert [name for name, verdict in rules(decision).items() if verdict == "failed"] == ["min_subgroup_auc"]
    assert one(decision, "min_subgroup_auc").details.startswith("sex male 0.")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.1, 1.5])
def test_scores_that_are_none_are_named_and_nothing_else_is_computed(wrong):
    frame = GOOD.frame.copy()
    frame.loc[7, "score_1"] = wrong
    broken = replace(OF_GOOD, test=Predictions(frame, GOOD.task, GOOD.classes))
    decision = gate.decide(broken, GOOD, NOTHING)
    assert list(rules(decision)) == ["data_gate", "finite_scores"]
    assert one(decision, "finite_scores").details == "1 images with invalid scores, such as test/7"
    assert not decision.promoted
    of_champion = gate.decide(OF_GOOD, Predictions(frame, GOOD.task, GOOD.classes), NOTHING)
    assert rules(of_champion)["champion_finite"] == "failed"
    assert of_champion.champion_auc is None


def test_non_inferiority_by_the_paired_difference():
    worse = candidate(judged(1.9, seed=1))
    compared = gate.paired_auc_difference(worse.test, GOOD, 0.95)
    assert compared.low < compared.value < 0
    inside = gate.decide(worse, GOOD, replace(NOTHING, margin=-compared.low + 1e-6))
    assert inside.promoted
    assert one(inside, "not_inferior").details.startswith(f"difference {compared.value:+.4f}")
    assert rules(gate.decide(worse, GOOD, replace(NOTHING, margin=-compared.low - 1e-6)))["not_inferior"] == "failed"
    assert inside.champion_auc == summary.summarize(GOOD)["overall"]["auc"]


def test_the_comparison_does_not_hang_on_the_order_of_the_rows():
    other = judged(1.5, seed=1)
    shuffled = Predictions(other.frame.sample(frac=1, random_state=0), other.task, other.classes)
    assert gate.paired_auc_difference(shuffled, GOOD, 0.95) == gate.paired_auc_difference(other, GOOD, 0.95)
    assert gate.paired_auc_difference(GOOD, GOOD, 0.95).low == 0


def test_force_promotes_and_is_told():
    decision = gate.decide(OF_GOOD, None, replace(NOTHING, min_auc=1.0), force_reason="the old one cannot read DICOM")
    assert decision.promoted
    assert not decision.passed
    assert decision.reason.startswith(
        "FORCED: the old one cannot read DICOM; without force: lower bound of the test AUC"
    )


def without_class(labels: np.ndarray) -> Challenger:
    return candidate(judged(2.0, labels=labels))


def with_nan() -> Predictions:
    frame = GOOD.frame.copy()
    frame.loc[3, "score_0"] = np.nan
    return Predictions(frame, GOOD.task, GOOD.classes)


def in_one_patient() -> Predictions:
    return Predictions(GOOD.frame.assign(group="p1"), GOOD.task, GOOD.classes)


SMALL_SET = judged(2.0, images=30)
ASKED = replace(NOTHING, min_auc=0.8, min_class_auc=0.7, min_subgroup_auc=0.7, max_ece=0.3, min_sensitivity=0.5)
# Challenger and champion, what is asked beyond ASKED, and the rules that are broken: none of them, and it is promoted.
DECISIONS = {
    "the first model, good": (OF_GOOD, None, {}, []),
    "the first model, below the floor": (OF_GOOD, None, {"min_auc": 0.97}, ["min_auc"]),
    "the first model, no better than chance": (
        candidate(judged(0.0)), None, {}, ["min_auc", "min_class_auc", "min_subgroup_auc", "min_sensitivity"],
    ),
    "an equal one": (OF_GOOD, GOOD, {}, []),
    "an equal one, no margin": (OF_GOOD, GOOD, {"margin": 0.0}, []),
    "an equal one where a gain is asked": (OF_GOOD, GOOD, {"min_gain": 0.0}, ["better"]),
    "a better one": (candidate(judged(3.0, seed=1)), GOOD, {}, []),
    "a better one where a gain is asked": (candidate(judged(3.0, seed=1)), GOOD, {"min_gain": 0.01}, []),
    "a better one where more is asked": (candidate(judged(3.0, seed=1)), GOOD, {"min_gain": 0.5}, ["better"]),
    "worse within the margin": (candidate(judged(1.8, seed=1)), GOOD, {"margin": 0.02}, []),
    "worse within the margin, not for certain": (
        candidate(judged(1.8, seed=1)), GOOD, {"margin": 0.015}, ["not_inferior"],
    ),
    "worse": (candidate(judged(1.5, seed=1)), GOOD, {}, ["not_inferior"]),
    "worse, however large the margin, below the floor": (
        candidate(judged(1.0, seed=1)), GOOD, {"margin": 1.0}, ["min_auc"],
    ),
    "a small test set, by its lower bound": (candidate(SMALL_SET), None, {"min_auc": 0.9}, ["min_auc"]),
    "a small test set, classes too rare to be judged": (candidate(SMALL_SET), None, {"min_auc": 0.7}, []),
    "a small test set, as good as the champion for all one can see": (
        candidate(judged(2.0, images=30, seed=1)), SMALL_SET, {"min_auc": 0.7}, ["not_inferior"],
    ),
    "one patient alone": (
        candidate(in_one_patient()), in_one_patient(), {"min_auc": 0.0, "margin": 0.0}, ["min_auc", "not_inferior"],
    ),
    "a subgroup that is not known": (OF_GOOD, None, {"min_subgroup_auc": {"site": 0.7}}, ["min_subgroup_auc"]),
    "no subgroups at all": (candidate(judged(2.0, sex=False)), None, {}, []),
    "a subgroup below its floor": (OF_GOOD, None, {"min_subgroup_auc": {"sex": 0.99}}, ["min_subgroup_auc"]),
    "a changed test set": (OF_GOOD, judged(2.0, first=1), {}, ["same_test_images"]),
    "a test set of which a label was changed": (
        OF_GOOD, judged(2.0, labels=(np.arange(600) + (np.arange(600) == 5)) % 3), {}, ["same_test_images"],
    ),
    "other classes": (OF_GOOD, judged(2.0, classes=("a", "b", "c")), {}, ["same_classes"]),
    "another task": (OF_GOOD, judged(2.0, classes=("normal", "pneumonia")), {}, ["same_classes"]),
    "NaN": (replace(OF_GOOD, test=with_nan()), None, {}, ["finite_scores"]),
    "NaN of the champion": (OF_GOOD, with_nan(), {}, ["champion_finite"]),
    "an absent class": (without_class(np.arange(600) % 2), None, {}, []),
    "a class with 7 images": (without_class(np.r_[np.arange(593) % 2, np.full(7, 2)]), None, {}, []),
    "one class alone": (without_class(np.zeros(600, int)), None, {}, ["min_auc"]),
    "calibration error": (OF_GOOD, None, {"max_ece": 0.001}, ["max_ece"]),
    "sensitivity": (OF_GOOD, None, {"min_sensitivity": 0.99}, ["min_sensitivity"]),
    "sensitivity at another point": (
        OF_GOOD, None, {"min_sensitivity": 0.85, "operating_point": "sensitivity"}, [],
    ),
    "data that were not let pass": (replace(OF_GOOD, is_data_valid=False), None, {}, ["data_gate"]),
    "taken back before": (replace(OF_GOOD, rollback_reason="wrong on the new scanner"), None, {}, ["not_rolled_back"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_a_decision(case):
    of, champion, more, broken = DECISIONS[case]
    asked = replace(ASKED, **more)
    decision = gate.decide(of, champion, asked)
    assert [name for name, verdict in rules(decision).items() if verdict == "failed"] == broken
    assert decision.promoted == (not broken)
    assert gate.decide(of, champion, asked, force_reason="because").promoted
