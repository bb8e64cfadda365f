"""Subgroups: bands and columns, numbers as of the images alone, and what is called worse than the whole."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.errors import UserError
from fadeformer.evaluation import predictions, subgroups, summary
from fadeformer.evaluation.predictions import Predictions
from fadeformer.tasks import TASKS

BANDS = [0, 18, 40, 60, 80]
KNOWN = pd.DataFrame(
    {
        "age": [3, 17.5, 18, 79, 101, np.nan], "sex": ["F", "M", "F", None, "M", "F"], "site": ["a"] * 6,
    }
)  # fmt: skip


def two_classes(images: int, seed: int, *, harder: float = 0.0) -> Predictions:
    """Scores of which those of women with disease are lower by so many standard deviations."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, 1)) < 0.4).astype(np.int64)
    known = pd.DataFrame({"sex": random.choice(["F", "M"], images), "age": random.integers(0, 95, images)})
    logits = random.normal(size=images) + 2.5 * labels[:, 0] - 1.2
    logits -= harder * ((known["sex"] == "F") & (labels[:, 0] == 1))
    score = 1 / (1 + np.exp(-logits))
    index = pd.DataFrame({"split": "test", "id": np.arange(images).astype(str), "group": None})
    table = np.stack([1 - score, score], axis=1)
    return predictions.build_predictions(
        index, labels, table, TASKS["binary-class"], ("healthy", "ill"), subgroups=known
    )


def compared(p: Predictions, draws: int = 300):
    return subgroups.evaluate_subgroups(p, BANDS, n_resamples=draws, seed=0, confidence=0.95)


def test_columns_are_taken_by_themselves_if_they_divide_the_images_into_few_parts():
    assert list(subgroups.select_columns(KNOWN, "auto")) == ["age", "sex"]
    many = pd.DataFrame({"site": [str(i) for i in range(13)], "age": range(13)})
    assert list(subgroups.select_columns(many, "auto")) == ["age"]
    assert list(subgroups.select_columns(KNOWN, ["site"])) == ["site"]
    assert list(subgroups.select_columns(KNOWN, [])) == []


def test_a_column_that_is_not_there_or_has_too_many_values_is_named():
    with pytest.raises(UserError, match=r"evaluate.subgroups: unknown column view; available: age, sex"):
        subgroups.select_columns(KNOWN, ["view"])
    many = pd.DataFrame({"id": [str(i) for i in range(51)]})
    with pytest.raises(UserError, match="id has 51 values; at most 50"):
        subgroups.select_columns(many, ["id"])


def test_ages_fall_into_bands_and_what_is_not_known_is_a_subgroup():
    found = subgroups.assign_subgroups(KNOWN[["age", "sex"]], BANDS)
    told = ["0 to 17", "0 to 17", "18 to 39", "60 to 79", "80 and over", "unknown"]
    assert found["age"].tolist() == told
    assert found["sex"].tolist() == ["F", "M", "F", "unknown", "M", "F"]
    assert subgroups.assign_subgroups(KNOWN[["age"]], [18])["age"].tolist()[0] == "under 18"


def test_numbers_of_a_subgroup_are_those_of_its_images_and_the_whole_has_its_usual_intervals():
    p = two_classes(200, 0)
    whole, found = compared(p)
    women = p.select_rows((p.subgroups["sex"] == "F").to_numpy())
    told = summary.summarize(women)
    assert found["sex"]["F"]["overall"] == told["overall"]
    assert found["sex"]["F"]["per_class"] == told["per_class"]
    assert found["sex"]["F"]["images"] + found["sex"]["M"]["images"] == 200
    alone = summary.confidence_intervals(women, n_resamples=300, seed=0, confidence=0.95)
    assert found["sex"]["F"]["intervals"]["overall"]["auc"] == alone["overall"]["auc"]
    low, high = found["sex"]["F"]["intervals"]["overall"]["loss"]
    assert (low, high) == pytest.approx(alone["overall"]["loss"], rel=0.15)
    assert whole == summary.confidence_intervals(p, n_resamples=300, seed=0, confidence=0.95)


def test_a_subgroup_in_which_the_model_fails_is_called_worse_and_no_other_is():
    _, found = compared(two_classes(400, 1, harder=1.8))
    flagged = subgroups.underperforming(found)
    assert {(one["column"], one["subgroup"]) for one in flagged} == {("sex", "F")}
    assert {one["metric"] for one in flagged} == {"auc", "recall"}
    assert all(one["value"] < one["overall"] and one["p"] < 0.05 for one in flagged)


def test_chance_alone_is_rarely_called_worse():
    flagged = [bool(subgroups.underperforming(compared(two_classes(200, seed), draws=100)[1])) for seed in range(20)]
    assert sum(flagged) <= 3  # of 20 at 5 % more come once in 60 times


def test_few_patients_are_not_compared_and_a_share_of_none_among_few_is_not_certain():
    p = two_classes(30, 0)
    _, found = compared(p)
    few = [of["comparisons"] for of in found["age"].values() if of["groups"] < subgroups.MIN_GROUPS]
    assert few
    assert not any(few)
    p = two_classes(400, 0)
    frame = p.frame.copy()
    chosen = frame.index[(frame["label"] == 1)][:10].append(frame.index[frame["label"] == 0][:20])
    frame["subgroup_site"] = "big"
    frame.loc[chosen, "subgroup_site"] = "small"
    frame["score_1"] = np.where(frame["label"] == 1, np.where(np.arange(400) % 10 < 2, 0.9, 0.2), frame["score_1"])
    frame.loc[chosen[:10], "score_1"] = 0.2  # none of ten where the whole finds two of ten: one time in nine by chance
    frame["score_0"] = 1 - frame["score_1"]
    _, found = compared(
        Predictions(frame[[c for c in frame if c not in ("subgroup_sex", "subgroup_age")]], p.task, p.classes)
    )
    (recall,) = [one for one in found["site"]["small"]["comparisons"] if one["metric"] == "recall"]
    assert recall["value"] == 0
    assert recall["p"] > 0.05


def test_findings_are_compared_one_by_one_and_in_their_mean():
    random = np.random.default_rng(0)
    labels = (random.random((300, 3)) < [0.3, 0.4, 0.01]).astype(np.int64)
    scores = 1 / (1 + np.exp(-(random.normal(size=(300, 3)) + 2 * labels - 1)))
    index = pd.DataFrame({"split": "test", "id": np.arange(300).astype(str), "group": None})
    known = pd.DataFrame({"view": random.choice(["PA", "AP"], 300)})
    p = predictions.build_predictions(
        index, labels, scores, TASKS["multi-label, binary-class"], ("mass", "edema", "hernia"), subgroups=known
    )
    _, found = compared(p)
    told = {(one["metric"], one["class"]): one for one in found["view"]["PA"]["comparisons"]}
    assert ("auc", "hernia") not in told  # too few of it
    mean = [told["auc", name]["value"] for name in ("mass", "edema")]
    assert told["auc", subgroups.ALL_CLASSES]["value"] == pytest.approx(np.mean(mean))


def test_without_columns_there_are_no_subgroups():
    p = two_classes(50, 0)
    bare = Predictions(p.frame.drop(columns=["subgroup_sex", "subgroup_age"]), p.task, p.classes)
    whole, found = compared(bare)
    assert found == {}
    assert whole["overall"]["auc"] is not None
