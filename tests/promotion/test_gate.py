"""Promotion gate: checks of a challenger alone and against earlier champions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fadeformer.evaluation import operating_points, predictions, subgroups, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.inference.calibration import fit_calibration
from fadeformer.promotion import gate
from fadeformer.promotion.comparison import Opponent, Pair
from fadeformer.promotion.criteria import Challenger, PromotionCriteria
from fadeformer.promotion.decision import Check, Decision
from fadeformer.tasks import TASKS

MINIMAL = PromotionCriteria(
    min_auc=0.0, min_class_auc=None, min_subgroup_auc=None, min_cases=20, max_ece=None, operating_point="youden",
    min_sensitivity=None, margin=0.02, class_margin=None, recall_margin=None, min_gain=None, not_assessed="refuse",
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
    names = [f"test/{first + i}" for i in range(images)]
    index = pd.DataFrame({"split": "test", "id": names, "group": None, "sha256": [f"content of {n}" for n in names]})
    metadata = pd.DataFrame({"sex": np.where(np.arange(images) % 20 < 10, "female", "male")}) if sex else None
    return predictions.build_predictions(
        index, labels[:, None], task.probabilities(logits), task, classes, subgroups=metadata
    )


def evaluate(test: Predictions, **changes: object) -> Challenger:
    """Evaluation results of predictions; test also serves as val."""
    _, subgroup_results = subgroups.evaluate_subgroups(test, [0.0], n_resamples=100, seed=0, confidence=0.95)
    return replace(Challenger(test, 0.95, subgroup_results, [0.0], select_points(test), is_data_valid=True), **changes)


def select_points(test: Predictions) -> dict:
    return operating_points.select_operating_points(test, test, TARGETS, 0.95)


def opponent(test: Predictions, training_images: frozenset[str] | None = frozenset()) -> Opponent:
    return Opponent("champion", test, select_points(test), training_images)


GOOD = simulate(2.0)
GOOD_CHALLENGER = evaluate(GOOD)
CHAMPION = opponent(GOOD)


def statuses(decision: Decision) -> dict[str, str]:
    return {check.name: check.status for check in decision.checks}


def get_check(decision: Decision, name: str) -> Check:
    return next(check for check in decision.checks if check.name == name)


def auc_difference(first: Predictions, second: Predictions):
    return Pair(first, second, 20).auc_difference(CLASSES, 0.95)


def test_data_check_names_failed_warnings():
    challenger = replace(GOOD_CHALLENGER, data_warnings=["label_shift, not met: x", "blank_image, not met: y"])
    check = get_check(gate.decide(challenger, None, MINIMAL), "data_gate")
    assert check.status == "passed"
    assert check.details == "passed, with warnings: label_shift, not met: x. blank_image, not met: y"


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
    low, high = summary.auc_intervals(GOOD, 0.95)["overall"]
    value = summary.summarize(GOOD)["overall"]["auc"]
    assert low < value < high
    assert gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=low)).promoted
    refused = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=(low + value) / 2))
    assert statuses(refused)["min_auc"] == "failed"
    requirement = f"lower bound of the test AUC at least {(low + value) / 2:g}, at 95 %"
    assert refused.reason.startswith(f"2 passed, 1 failed; {requirement}: 0.")


def test_value_equal_to_limit_passes():
    area = summary.summarize(GOOD)["per_class"]["benign"]["auc"]
    items = get_check(gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_class_auc=area)), "min_class_auc").items
    assert next(item for item in items if item.name == "benign").status == "passed"
    items = get_check(
        gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_class_auc=np.nextafter(area, 1))), "min_class_auc"
    ).items
    assert next(item for item in items if item.name == "benign").status == "failed"


def test_rare_class_is_not_assessed():
    labels = np.r_[np.zeros(300), np.ones(293), np.full(7, 2)].astype(int)
    rare = evaluate(simulate(2.0, labels=labels))
    decision = gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, min_sensitivity=0.99))
    assert [
        (item.status, item.details) for item in get_check(decision, "min_class_auc").items if item.name == "malignant"
    ] == [("not assessed", "n = 7")]
    assert get_check(decision, "min_class_auc").status == "not assessed"
    assert get_check(decision, "min_class_auc").details == "malignant n = 7"
    assert get_check(decision, "min_sensitivity").status == "failed"
    assert "malignant" not in get_check(decision, "min_sensitivity").details
    assert (
        statuses(gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, min_cases=7)))["min_class_auc"] == "passed"
    )
    not_assessed = gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7))
    assert not not_assessed.promoted
    assert not_assessed.reason == (
        "3 passed, 1 not assessed; AUC of each class at least 0.7: malignant n = 7; see promote.not_assessed"
    )
    assert gate.decide(rare, None, replace(MINIMAL, min_class_auc=0.7, not_assessed="allow")).promoted


def test_cases_are_counted_per_patient():
    groups = [f"patient {place % 15}" for place in range(600)]
    few = evaluate(Predictions(GOOD.frame.assign(group=groups), GOOD.task, GOOD.classes))
    criteria = replace(MINIMAL, min_class_auc=0.99, min_subgroup_auc=0.99, min_sensitivity=0.99, min_cases=16)
    decision = gate.decide(few, None, criteria)
    for name in ("min_class_auc", "min_subgroup_auc", "min_sensitivity"):
        assert get_check(decision, name).status == "not assessed"
        assert {item.details for item in get_check(decision, name).items} <= {"n = 5", "n = 15"}
    assert not gate.decide(few, None, replace(criteria, min_cases=5)).promoted


def test_binary_model_has_one_auc_two_recalls():
    binary = evaluate(simulate(2.0, classes=("normal", "pneumonia")))
    decision = gate.decide(binary, None, replace(MINIMAL, min_class_auc=0.8, min_sensitivity=0.5))
    assert [item.name for item in get_check(decision, "min_class_auc").items] == ["pneumonia"]
    assert [item.name for item in get_check(decision, "min_sensitivity").items] == ["normal", "pneumonia"]


def test_unknown_subgroup_column_fails():
    by_column = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_subgroup_auc={"sex": 0.8}))
    assert statuses(by_column)["min_subgroup_auc"] == "passed"
    missing = gate.decide(GOOD_CHALLENGER, None, replace(MINIMAL, min_subgroup_auc={"sex": 0.8, "site": 0.8}))
    assert not missing.promoted
    assert get_check(missing, "min_subgroup_auc").details == (
        "site is not a subgroup column of the test images (available: sex); see evaluate.subgroups"
    )
    no_subgroups = gate.decide(evaluate(simulate(2.0, sex=False)), None, replace(MINIMAL, min_subgroup_auc=0.8))
    assert "min_subgroup_auc" not in statuses(no_subgroups)
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
    decision = gate.decide(invalid, CHAMPION, MINIMAL)
    assert list(statuses(decision)) == ["data_gate", "finite_scores"]
    assert get_check(decision, "finite_scores").details == "1 images with invalid scores, such as test/7"
    assert not decision.promoted
    champion = replace(CHAMPION, test=Predictions(frame, GOOD.task, GOOD.classes))
    with_invalid_champion = gate.decide(GOOD_CHALLENGER, champion, MINIMAL)
    assert statuses(with_invalid_champion)["champion_finite"] == "failed"
    assert with_invalid_champion.champion_auc is None


def test_non_inferiority_uses_paired_difference():
    worse = evaluate(simulate(1.9, seed=1))
    difference = auc_difference(worse.test, GOOD)
    assert difference.low < difference.value < 0
    within_margin = gate.decide(worse, CHAMPION, replace(MINIMAL, margin=-difference.low + 1e-6))
    assert within_margin.promoted
    assert get_check(within_margin, "not_inferior").details.startswith(f"difference {difference.value:+.4f}")
    beyond_margin = gate.decide(worse, CHAMPION, replace(MINIMAL, margin=-difference.low - 1e-6))
    assert statuses(beyond_margin)["not_inferior"] == "failed"
    assert within_margin.champion_auc == summary.summarize(GOOD)["overall"]["auc"]


def test_comparison_ignores_row_order():
    other = simulate(1.5, seed=1)
    shuffled = Predictions(other.frame.sample(frac=1, random_state=0), other.task, other.classes)
    decisions = [gate.decide(evaluate(rows), CHAMPION, MINIMAL) for rows in (shuffled, other)]
    assert decisions[0].checks == decisions[1].checks
    assert auc_difference(GOOD, GOOD).low == 0


def test_reason_names_first_failed_check():
    criteria = replace(MINIMAL, min_auc=0.99, min_class_auc=0.99, max_ece=0.0)
    reason = gate.decide(GOOD_CHALLENGER, None, criteria).reason
    assert reason.startswith("2 passed, 3 failed; lower bound of the test AUC at least 0.99, at 95 %: 0.")
    assert reason.endswith("; and 2 more")


def test_force_promotes_and_is_reported():
    decision = gate.decide(
        GOOD_CHALLENGER, None, replace(MINIMAL, min_auc=1.0), force_reason="the old one cannot read DICOM"
    )
    assert decision.promoted
    assert not decision.passed
    assert decision.reason.startswith(
        "FORCED: the old one cannot read DICOM; without force: 2 passed, 1 failed; lower bound of the test AUC"
    )


def without_class(labels: np.ndarray) -> Challenger:
    return evaluate(simulate(2.0, labels=labels))


def with_nan() -> Predictions:
    frame = GOOD.frame.copy()
    frame.loc[3, "score_0"] = np.nan
    return Predictions(frame, GOOD.task, GOOD.classes)


def champion_with_nan() -> Opponent:
    return replace(CHAMPION, test=with_nan())


def single_patient() -> Predictions:
    return Predictions(GOOD.frame.assign(group="p1"), GOOD.task, GOOD.classes)


def never_decided(model: Predictions, class_name: str) -> Predictions:
    """The same ranking within each class, but the class is never the most probable one."""
    frame, column = model.frame.copy(), f"score_{model.classes.index(class_name)}"
    frame[column] = frame[column] * 0.01
    return Predictions(frame, model.task, model.classes)


def collapsed(model: Predictions, class_name: str, share: float) -> Predictions:
    """A share of the images has the scores of a class exchanged among them; the other classes keep theirs."""
    frame, column = model.frame.copy(), f"score_{model.classes.index(class_name)}"
    rows = frame.sample(frac=share, random_state=0).index
    frame.loc[rows, column] = frame.loc[rows, column].sample(frac=1, random_state=1).to_numpy()
    return Predictions(frame, model.task, model.classes)


def overstated(model: Predictions, class_name: str, factor: float) -> Predictions:
    """The odds of a class are too high by a factor; its ranking is the same."""
    odds = np.where(np.array(model.classes) == class_name, factor, 1.0)
    scores = model.scores * odds / (model.scores * odds).sum(axis=1, keepdims=True)
    frame = model.frame.assign(**{f"score_{c}": scores[:, c] for c in range(len(model.classes))})
    return Predictions(frame, model.task, model.classes)


def calibrated(model: Predictions) -> Predictions:
    fitted = fit_calibration(model.labels, model.scores, model.task)
    scores = fitted(model.scores, model.task)
    frame = model.frame.assign(**{f"score_{c}": scores[:, c] for c in range(len(model.classes))})
    return Predictions(frame, model.task, model.classes)


RARE_CLASS = calibrated(simulate(2.0, images=2000, labels=np.r_[np.arange(1950) % 2, np.full(50, 2)]))
RARE_CRITERIA = {"min_subgroup_auc": None, "min_sensitivity": None, "max_ece": 0.1}
EIGHT = tuple(f"class {c}" for c in range(8))
EIGHT_CHAMPION = simulate(2.2, images=1600, classes=EIGHT)
EIGHT_CHALLENGER = collapsed(simulate(2.6, images=1600, classes=EIGHT, seed=1), "class 3", 0.35)
IMAGES_OF_ONE_CLASS = np.r_[np.arange(599) % 2, 2]
SEEN = frozenset(GOOD.frame["sha256"][:150])
SMALL_SET = simulate(2.0, images=30)
CRITERIA = replace(
    MINIMAL, min_auc=0.8, min_class_auc=0.7, min_subgroup_auc=0.7, max_ece=0.3, min_sensitivity=0.5, class_margin=0.1,
    recall_margin=0.2,
)  # fmt: skip
# Challenger, champion, changes to CRITERIA, failed checks, and checks that were not assessed; without any, the
# challenger is promoted.
DECISIONS = {
    "first model, good": (GOOD_CHALLENGER, None, {}, [], []),
    "first model, below min_auc": (GOOD_CHALLENGER, None, {"min_auc": 0.97}, ["min_auc"], []),
    "first model, at chance": (
        evaluate(simulate(0.0)), None, {}, ["min_auc", "min_class_auc", "min_subgroup_auc", "min_sensitivity"], [],
    ),
    "equal to champion": (GOOD_CHALLENGER, CHAMPION, {}, [], []),
    "equal to champion, margin 0": (GOOD_CHALLENGER, CHAMPION, {"margin": 0.0}, [], []),
    "equal to champion, gain required": (GOOD_CHALLENGER, CHAMPION, {"min_gain": 0.0}, ["better"], []),
    "better than champion": (evaluate(simulate(3.0, seed=1)), CHAMPION, {}, [], []),
    "better than champion, gain required": (
        evaluate(simulate(3.0, seed=1)), CHAMPION, {"min_gain": 0.01}, [], [],
    ),
    "better than champion, larger gain required": (
        evaluate(simulate(3.0, seed=1)), CHAMPION, {"min_gain": 0.5}, ["better"], [],
    ),
    "worse within margin": (evaluate(simulate(1.8, seed=1)), CHAMPION, {"margin": 0.03}, [], []),
    "worse within margin, not significant": (
        evaluate(simulate(1.8, seed=1)), CHAMPION, {"margin": 0.015}, ["not_inferior"], [],
    ),
    "the same as candidate 20": (
        evaluate(simulate(1.8, seed=1), candidate=20), CHAMPION, {"margin": 0.03}, ["not_inferior"], [],
    ),
    "worse than champion": (evaluate(simulate(1.5, seed=1)), CHAMPION, {}, ["not_inferior"], []),
    "worse with a large margin, below min_auc": (
        evaluate(simulate(1.0, seed=1)), CHAMPION, {"margin": 1.0, "class_margin": None, "recall_margin": None},
        ["min_auc"], [],
    ),
    "small test set, wide interval": (
        evaluate(SMALL_SET), None, {"min_auc": 0.9}, ["min_auc"],
        ["min_class_auc", "min_subgroup_auc", "max_ece", "min_sensitivity"],
    ),
    "small test set, too few cases per class": (
        evaluate(SMALL_SET), None, {"min_auc": 0.7}, [],
        ["min_class_auc", "min_subgroup_auc", "max_ece", "min_sensitivity"],
    ),
    "small test set, too few cases to compare": (
        evaluate(simulate(2.0, images=30, seed=1)), opponent(SMALL_SET),
        {"min_auc": 0.7, "min_class_auc": None, "min_subgroup_auc": None, "max_ece": None, "min_sensitivity": None}, [],
        ["not_inferior", "class_auc_not_inferior", "subgroup_auc_not_inferior", "recall_not_inferior"],
    ),
    "single patient": (
        evaluate(single_patient()), None,
        {"min_class_auc": None, "min_subgroup_auc": None, "max_ece": None, "min_sensitivity": None},
        ["min_auc"], [],
    ),
    "unknown subgroup column": (GOOD_CHALLENGER, None, {"min_subgroup_auc": {"site": 0.7}}, ["min_subgroup_auc"], []),
    "no subgroups": (evaluate(simulate(2.0, sex=False)), None, {}, [], []),
    "subgroup below its minimum": (
        GOOD_CHALLENGER, None, {"min_subgroup_auc": {"sex": 0.99}}, ["min_subgroup_auc"], [],
    ),
    "changed test set": (GOOD_CHALLENGER, opponent(simulate(2.0, first=1)), {}, ["same_test_images"], []),
    "changed test label": (
        GOOD_CHALLENGER, opponent(simulate(2.0, labels=(np.arange(600) + (np.arange(600) == 5)) % 3)), {},
        ["same_test_images"], [],
    ),
    "other classes": (GOOD_CHALLENGER, opponent(simulate(2.0, classes=("a", "b", "c"))), {}, ["same_classes"], []),
    "another task": (
        GOOD_CHALLENGER, opponent(simulate(2.0, classes=("normal", "pneumonia"))), {}, ["same_classes"], [],
    ),
    "NaN in challenger": (replace(GOOD_CHALLENGER, test=with_nan()), None, {}, ["finite_scores"], []),
    "NaN in champion": (GOOD_CHALLENGER, champion_with_nan(), {}, ["champion_finite"], []),
    "absent class": (
        without_class(np.arange(600) % 2), None, {}, [], ["min_class_auc", "max_ece", "min_sensitivity"],
    ),
    "class with one image": (
        without_class(IMAGES_OF_ONE_CLASS), None, {}, [], ["min_class_auc", "max_ece", "min_sensitivity"],
    ),
    "class with one image, allowed": (
        without_class(IMAGES_OF_ONE_CLASS), opponent(simulate(1.9, labels=IMAGES_OF_ONE_CLASS, seed=1)),
        {"not_assessed": "allow"}, [],
        ["min_class_auc", "max_ece", "min_sensitivity", "class_auc_not_inferior", "recall_not_inferior"],
    ),
    "single class": (
        without_class(np.zeros(600, int)), None, {}, ["min_auc"],
        ["min_class_auc", "min_subgroup_auc", "max_ece", "min_sensitivity"],
    ),
    "calibration error": (GOOD_CHALLENGER, None, {"max_ece": 0.001}, ["max_ece"], []),
    "rare class is overstated": (
        evaluate(overstated(RARE_CLASS, "malignant", 4)), None, RARE_CRITERIA, ["max_ece"], [],
    ),
    "rare class is calibrated": (evaluate(RARE_CLASS), None, RARE_CRITERIA, [], []),
    "recall": (GOOD_CHALLENGER, None, {"min_sensitivity": 0.99}, ["min_sensitivity"], []),
    "class that is never decided": (
        evaluate(never_decided(GOOD, "benign")), CHAMPION, {"max_ece": None},
        ["min_sensitivity", "recall_not_inferior"], [],
    ),
    "one of eight classes collapsed": (
        evaluate(EIGHT_CHALLENGER), opponent(EIGHT_CHAMPION), {"min_sensitivity": None, "recall_margin": None},
        ["class_auc_not_inferior"], [],
    ),
    "data validation failed": (replace(GOOD_CHALLENGER, is_data_valid=False), None, {}, ["data_gate"], []),
    "rolled back before": (
        replace(GOOD_CHALLENGER, rollback_reason="wrong on the new scanner"), None, {}, ["not_rolled_back"], [],
    ),
    "champion saw some test images": (GOOD_CHALLENGER, replace(CHAMPION, training_images=SEEN), {}, [], []),
    "champion saw all test images": (
        GOOD_CHALLENGER, replace(CHAMPION, training_images=frozenset(GOOD.frame["sha256"])), {}, [],
        ["unseen_test_images"],
    ),
    "training images of champion unknown": (
        GOOD_CHALLENGER, replace(CHAMPION, training_images=None), {}, [], ["unseen_test_images"],
    ),
    "initial weights saw test images": (
        replace(GOOD_CHALLENGER, initial_weights="a.pth", initial_images=SEEN), None, {}, ["initial_weights"], [],
    ),
    "initial weights saw other images": (
        replace(GOOD_CHALLENGER, initial_weights="a.pth", initial_images=frozenset({"b"})), None, {}, [], [],
    ),
    "training images of initial weights unknown": (
        replace(GOOD_CHALLENGER, initial_weights="a.pth"), None, {}, [], ["initial_weights"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_decision(case):
    challenger, champion, changes, failed, not_assessed = DECISIONS[case]
    criteria = replace(CRITERIA, **changes)
    decision = gate.decide(challenger, champion, criteria)
    assert [name for name, status in statuses(decision).items() if status == "failed"] == failed
    assert [name for name, status in statuses(decision).items() if status == "not assessed"] == not_assessed
    assert decision.promoted == (not failed and (not not_assessed or criteria.not_assessed == "allow"))
    assert gate.decide(challenger, champion, criteria, force_reason="because").promoted


def test_slow_decline_ends_at_the_margin():
    """Each candidate is within the margin of its champion, but the best champion is remembered."""
    criteria = replace(MINIMAL, margin=0.03)
    models = [simulate(quality, images=3000, seed=seed) for seed, quality in enumerate((2.0, 1.9, 1.8, 1.7, 1.6))]
    champion, promoted = models[0], []
    for model in models[1:]:
        best = None if champion is models[0] else replace(opponent(models[0]), name="best champion so far")
        decision = gate.decide(evaluate(model), opponent(champion), criteria, best)
        assert statuses(decision)["not_inferior"] == "passed"
        promoted.append(decision.promoted)
        champion = model
    assert promoted == [True, True, False, False]


def test_images_seen_by_champion_are_left_out():
    seen = GOOD.frame["sha256"].isin(SEEN)
    frame = GOOD.frame.copy()
    frame.loc[seen, [f"score_{c}" for c in range(3)]] = np.eye(3)[frame.loc[seen, "label"]]
    memorized = Predictions(frame, GOOD.task, GOOD.classes)
    decision = gate.decide(GOOD_CHALLENGER, opponent(memorized, SEEN), MINIMAL)
    assert get_check(decision, "unseen_test_images").details == (
        "450 of 600 images: 150 were in its train or val set and are left out, with their patients or lesions"
    )
    assert get_check(decision, "not_inferior").details.startswith("difference +0.0000")
    assert not gate.decide(GOOD_CHALLENGER, opponent(memorized), MINIMAL).promoted
