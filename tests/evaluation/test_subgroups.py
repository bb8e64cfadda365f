"""Subgroups: columns and age bands, metrics, and tests for worse performance."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.errors import UserError
from fadeformer.evaluation import predictions, subgroup_comparisons, subgroups, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import TASKS

BANDS = [0, 18, 40, 60, 80]
METADATA = pd.DataFrame(
    {
        "age": [3, 17.5, 18, 79, 101, np.nan], "sex": ["F", "M", "F", None, "M", "F"], "site": ["a"] * 6,
    }
)  # fmt: skip


def two_classes(images: int, seed: int, *, harder: float = 0.0) -> Predictions:
    """Binary predictions; scores of diseased women are lower by `harder` standard deviations."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, 1)) < 0.4).astype(np.int64)
    metadata = pd.DataFrame({"sex": random.choice(["F", "M"], images), "age": random.integers(0, 95, images)})
    logits = random.normal(size=images) + 2.5 * labels[:, 0] - 1.2
    logits -= harder * ((metadata["sex"] == "F") & (labels[:, 0] == 1))
    score = 1 / (1 + np.exp(-logits))
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": None})
    table = np.stack([1 - score, score], axis=1)
    return predictions.build_predictions(
        index, labels, table, TASKS["binary-class"], ("healthy", "ill"), subgroups=metadata
    )


def evaluate(p: Predictions, n_resamples: int = 300):
    return subgroups.evaluate_subgroups(p, BANDS, n_resamples=n_resamples, seed=0, confidence=0.95)


def test_auto_selects_columns_with_few_values():
    assert list(subgroups.select_columns(METADATA, "auto")) == ["age", "sex"]
    many = pd.DataFrame({"site": [str(i) for i in range(13)], "age": range(13)})
    assert list(subgroups.select_columns(many, "auto")) == ["age"]
    assert list(subgroups.select_columns(METADATA, ["site"])) == ["site"]
    assert list(subgroups.select_columns(METADATA, [])) == []


def test_unknown_or_high_cardinality_column_is_rejected():
    with pytest.raises(UserError, match=r"evaluate.subgroups: unknown column view; available: age, sex"):
        subgroups.select_columns(METADATA, ["view"])
    many = pd.DataFrame({"id": [str(i) for i in range(51)]})
    with pytest.raises(UserError, match="id has 51 values; at most 50"):
        subgroups.select_columns(many, ["id"])


def test_age_bands_and_unknown_values_form_subgroups():
    results = subgroups.assign_subgroups(METADATA[["age", "sex"]], BANDS)
    bands = ["0 to 17", "0 to 17", "18 to 39", "60 to 79", "80 and over", "unknown"]
    assert results["age"].tolist() == bands
    assert results["sex"].tolist() == ["F", "M", "F", "unknown", "M", "F"]
    assert subgroups.assign_subgroups(METADATA[["age"]], [18])["age"].tolist()[0] == "under 18"


def test_subgroup_metrics_match_separate_evaluation():
    p = two_classes(200, 0)
    overall, results = evaluate(p)
    women = p.select_rows((p.subgroups["sex"] == "F").to_numpy())
    separate = summary.summarize(women)
    assert results["sex"]["F"]["overall"] == separate["overall"]
    assert results["sex"]["F"]["per_class"] == separate["per_class"]
    assert results["sex"]["F"]["images"] + results["sex"]["M"]["images"] == 200
    intervals = summary.confidence_intervals(women, n_resamples=300, seed=0, confidence=0.95)
    assert results["sex"]["F"]["intervals"]["overall"]["auc"] == intervals["overall"]["auc"]
    low, high = results["sex"]["F"]["intervals"]["overall"]["loss"]
    assert (low, high) == pytest.approx(intervals["overall"]["loss"], rel=0.15)
    assert overall == summary.confidence_intervals(p, n_resamples=300, seed=0, confidence=0.95)


def test_only_failing_subgroup_is_flagged():
    _, results = evaluate(two_classes(400, 2, harder=1.8))
    flagged = subgroups.underperforming(results)
    assert {(comparison["column"], comparison["subgroup"]) for comparison in flagged} == {("sex", "F")}
    assert {comparison["metric"] for comparison in flagged} == {"auc", "recall"}
    assert all(comparison["value"] < comparison["others"] and comparison["p"] < 0.05 for comparison in flagged)


def four_sites(seed: int, *, worse: bool) -> Predictions:
    """400 images, 30 % ill; AUC 0.90, and 0.66 at a worse site a."""
    random = np.random.default_rng(seed)
    site = np.repeat(list("abcd"), 100)
    metadata = pd.DataFrame({"site": site, "sex": random.choice(["F", "M"], 400), "age": random.integers(10, 90, 400)})
    labels = (random.random(400) < 0.3).astype(np.int64)
    distance = np.where((site == "a") & worse, 0.583, 1.812)  # standard deviations between the classes
    score = 1 / (1 + np.exp(1 - distance * labels - random.normal(size=400)))
    index = pd.DataFrame({"split": "test", "id": np.arange(400).astype(str), "group": None})
    scores = np.stack([1 - score, score], axis=1)
    return predictions.build_predictions(
        index, labels[:, None], scores, TASKS["binary-class"], ("healthy", "ill"), subgroups=metadata
    )


def test_site_with_much_lower_auc_is_found():
    found = [
        any(
            row["metric"] == "auc" and row["worse"]
            for row in evaluate(four_sites(seed, worse=True), n_resamples=20)[1]["site"]["a"]["comparisons"]
        )
        for seed in range(10)
    ]
    assert sum(found) >= 6


def test_equal_sites_are_not_flagged():
    flagged = [
        bool(subgroups.underperforming(evaluate(four_sites(seed, worse=False), n_resamples=20)[1]))
        for seed in range(10)
    ]
    assert sum(flagged) <= 2


def test_subgroup_is_compared_with_other_images():
    p = four_sites(0, worse=False)
    _, results = evaluate(p, n_resamples=100)
    comparison = results["site"]["b"]["comparisons"][0]
    others = summary.summarize(p.select_rows((p.subgroups["site"] != "b").to_numpy()))
    assert comparison["metric"] == "auc"
    assert comparison["others"] == pytest.approx(others["overall"]["auc"])
    assert comparison["value"] == pytest.approx(results["site"]["b"]["overall"]["auc"])


def test_smaller_subgroups_have_larger_detectable_shortfalls():
    p = four_sites(0, worse=False)
    p.frame["subgroup_site"] = np.resize(["small", *["large"] * 4, *["other"] * 5], 400)
    _, results = evaluate(p, n_resamples=100)
    limits = {
        value: {row["metric"]: row["detectable_shortfall"] for row in results["site"][value]["comparisons"]}
        for value in ("small", "large")
    }
    assert 0.1 < limits["small"]["auc"] < 0.35
    assert all(limits["large"][name] < limits["small"][name] for name in limits["small"])


def test_patients_in_both_subgroups_are_paired():
    """Two views of each patient, of which one is always slightly worse: found only if patients are paired."""
    random = np.random.default_rng(0)
    labels = np.repeat((random.random(150) < 0.4).astype(np.int64), 2)
    score = np.repeat(random.normal(size=150), 2) + 1.5 * labels - 0.7
    score -= np.where((np.arange(300) % 2 == 0) & (labels == 1), 0.5, 0.0)
    score = 1 / (1 + np.exp(-score))
    metadata = pd.DataFrame({"view": np.tile(["AP", "PA"], 150)})

    def p_value(group: list[str] | None) -> float:
        index = pd.DataFrame({"split": "test", "id": np.arange(300).astype(str), "group": group})
        p = predictions.build_predictions(
            index, labels[:, None], np.stack([1 - score, score], axis=1), TASKS["binary-class"], ("healthy", "ill"),
            subgroups=metadata,
        )  # fmt: skip
        _, results = evaluate(p, n_resamples=100)
        return next(row["p"] for row in results["view"]["AP"]["comparisons"] if row["metric"] == "auc")

    assert p_value([f"patient {i // 2}" for i in range(300)]) < 0.01
    assert p_value(None) > 0.05


def test_cases_of_few_patients_are_not_compared():
    p = four_sites(0, worse=False)
    p.frame["group"] = np.where(
        (p.frame["label"] == 1) & (p.frame["subgroup_site"] == "a"), "one patient", p.frame["id"]
    )
    _, results = evaluate(p, n_resamples=100)
    assert {row["metric"] for row in results["site"]["a"]["comparisons"]} == {"specificity"}
    assert {row["metric"] for row in results["site"]["b"]["comparisons"]} == {"auc", "recall", "specificity"}


@pytest.mark.parametrize("classes", [2, 3])
def test_one_quantity_has_one_interval(classes):
    """Balanced accuracy is the mean sensitivity of exclusive classes, also where resamples lack a class."""
    random = np.random.default_rng(0)
    labels = np.resize([0] * 20 + list(range(classes)), 240)
    scores = random.dirichlet(np.ones(classes), 240) + 0.6 * np.eye(classes)[labels]
    index = pd.DataFrame({"split": "test", "id": np.arange(240).astype(str), "group": None})
    p = predictions.build_predictions(
        index, labels[:, None], scores / 1.6, TASKS["multi-class"], tuple("xyz"[:classes]),
        subgroups=pd.DataFrame({"site": np.where(np.arange(240) < 48, "a", "b")}),
    )  # fmt: skip
    overall, results = evaluate(p)
    for bounds in (overall["overall"], *(results["site"][value]["intervals"]["overall"] for value in "ab")):
        assert bounds["recall"] == bounds["balanced_accuracy"]
        assert bounds["recall"][0] > 0
        if classes == 2:
            assert bounds["specificity"] == pytest.approx(bounds["balanced_accuracy"])


def test_false_flags_are_rare():
    flagged = [
        bool(subgroups.underperforming(evaluate(two_classes(200, seed), n_resamples=100)[1])) for seed in range(20)
    ]
    assert sum(flagged) <= 3  # more than 3 of 20 at 5 % occur once in 60 runs


def test_small_subgroups_are_not_overinterpreted():
    p = two_classes(30, 0)
    _, results = evaluate(p)
    small = [
        subgroup["comparisons"]
        for subgroup in results["age"].values()
        if subgroup["groups"] < subgroup_comparisons.MIN_GROUPS
    ]
    assert small
    assert not any(small)
    p = two_classes(400, 0)
    frame = p.frame.copy()
    rows = frame.index[(frame["label"] == 1)][:10].append(frame.index[frame["label"] == 0][:20])
    frame["subgroup_site"] = "big"
    frame.loc[rows, "subgroup_site"] = "small"
    frame["score_1"] = np.where(frame["label"] == 1, np.where(np.arange(400) % 10 < 2, 0.9, 0.2), frame["score_1"])
    frame.loc[rows[:10], "score_1"] = 0.2  # 0 of 10 where the overall rate is 2 of 10: probability 1/9
    frame["score_0"] = 1 - frame["score_1"]
    _, results = evaluate(
        Predictions(frame[[c for c in frame if c not in ("subgroup_sex", "subgroup_age")]], p.task, p.classes)
    )
    (recall,) = [
        comparison for comparison in results["site"]["small"]["comparisons"] if comparison["metric"] == "recall"
    ]
    assert recall["value"] == 0
    assert recall["p"] > 0.05


def test_findings_are_compared_singly_and_as_mean():
    random = np.random.default_rng(0)
    labels = (random.random((300, 3)) < [0.3, 0.4, 0.01]).astype(np.int64)
    scores = 1 / (1 + np.exp(-(random.normal(size=(300, 3)) + 2 * labels - 1)))
    index = pd.DataFrame({"split": "test", "id": np.arange(300).astype(str), "group": None})
    metadata = pd.DataFrame({"view": random.choice(["PA", "AP"], 300)})
    p = predictions.build_predictions(
        index, labels, scores, TASKS["multi-label, binary-class"], ("mass", "edema", "hernia"), subgroups=metadata
    )
    _, results = evaluate(p)
    by_test = {
        (comparison["metric"], comparison["class"]): comparison for comparison in results["view"]["PA"]["comparisons"]
    }
    assert ("auc", "hernia") not in by_test  # too few positives
    mean = [by_test["auc", name]["value"] for name in ("mass", "edema")]
    assert by_test["auc", subgroup_comparisons.ALL_CLASSES]["value"] == pytest.approx(np.mean(mean))


def test_no_columns_give_no_subgroups():
    p = two_classes(50, 0)
    without_columns = Predictions(p.frame.drop(columns=["subgroup_sex", "subgroup_age"]), p.task, p.classes)
    overall, results = evaluate(without_columns)
    assert results == {}
    assert overall["overall"]["auc"] is not None
