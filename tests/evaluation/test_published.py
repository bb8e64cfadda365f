"""Published scores are clean, and none of another set, size or split, or chosen on test, stands beside ours."""

from typing import get_args

import numpy as np
import pandas as pd
import pytest

from fadeformer.config.schema import DatasetName
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.sources import chestxray14, isic2019, medmnist
from fadeformer.evaluation import published

MADE = "{}-0123456789ab.csv"  # a split that was made here, by its name
ADOPTED = "proposed-0123abcd.csv (SHA-256 0123abcd)"
NIH = {"train": 78_000, "val": 8_524, "test": 25_596}
SIZED = {"28", "64", "128", "224", "320", "384", "512"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return published.read()


def meta(name="retinamnist", size=28, split="published", image_size=None, counts=None) -> ArrayMetadata:
    """As meta.json of a MedMNIST set in its published split holds it."""
    known = medmnist.DATASETS[name].counts if name in medmnist.DATASETS else (700, 100, 200)
    of_split = dict(zip(("train", "val", "test"), known, strict=True))
    dataset = {"name": name, "size": size, "counts": of_split}
    return ArrayMetadata(dataset, image_size or size, 3, counts or of_split, split, 0, [0.5] * 3, [0.2] * 3, "squash")


def nih(split="chestxray14-0123456789ab.csv", image_size=320, counts=NIH) -> ArrayMetadata:
    """As that of NIH's radiographs, all of them, with val made here."""
    dataset = {"name": "chestxray14", "size": None, "counts": chestxray14.COUNTS}
    return ArrayMetadata(dataset, image_size, 3, counts, split, 0, [0.5] * 3, [0.2] * 3, "squash")


def found(rows: pd.DataFrame, method: str, resolution: str | None = None) -> pd.Series:
    chosen = rows[(rows["method"] == method) & (resolution is None or rows["resolution"] == resolution)]
    assert len(chosen) == 1, chosen
    return chosen.iloc[0]


def test_every_value_is_one_that_the_module_tells_of(rows):
    assert set(rows["dataset"]) == {*medmnist.DATASETS, "isic2019", "chestxray14"} <= set(get_args(DatasetName))
    assert set(rows["resolution"]) == {*SIZED, "any", "several", "unknown"}
    assert set(rows["split"]) == {"published", "other", "unknown"}
    assert set(rows["selection"]) == {"val", "test", "unknown"}
    assert set(rows["origin"]) == {"authors", "quoted", "recalled", "unknown"}
    scores = rows[list(published.SCORE_COLUMNS)].to_numpy()
    assert np.isfinite(scores).any(axis=1).all()  # a row without a score says nothing
    assert ((scores > 0) & (scores < 1) | np.isnan(scores)).all()
    assert not rows.duplicated(["dataset", "resolution", "method", "source"]).any()
    for name in published.TEXT_COLUMNS:
        assert (rows[name] == rows[name].str.strip()).all()
        assert name == "note" or (rows[name] != "").all()


@pytest.mark.parametrize(
    ("dataset", "resolution", "method", "auc", "accuracy"),
    [
        ("retinamnist", "28", "ResNet-18", 0.717, 0.524),
        ("retinamnist", "28", "ResNet-18, enlarged to 224", 0.710, 0.493),
        ("pneumoniamnist", "28", "Google AutoML Vision", 0.991, 0.946),
        ("bloodmnist", "224", "DenseNet-121 end-to-end", 0.9995, 0.9902),
        ("breastmnist", "128", "AlexNet end-to-end, padded to 224", 0.9397, 0.9060),
        ("organcmnist", "28", "FadeFormer, enlarged to 224", 0.9953, 0.920),
        ("organsmnist", "64", "DenseNet-121 end-to-end, padded to 224", None, 0.8347),
        ("octmnist", "224", "MedViTV2-L", 0.996, 0.952),
        ("chestmnist", "any", "constant prediction", None, 0.9474),
        ("chestxray14", "320", "Swin-T", 0.8184, None),
    ],
)
def test_scores_are_those_of_their_source(rows, dataset, resolution, method, auc, accuracy):
    row = found(rows[rows["dataset"] == dataset], method, resolution)
    assert [row["auc"], row["accuracy"]] == pytest.approx([auc or np.nan, accuracy or np.nan], nan_ok=True)


def test_constant_predictions_are_as_good_as_the_commonest_class(rows):
    """PneumoniaMNIST has 390 of 624 test images of one class, BreastMNIST 114 of 156."""
    floors = rows[rows["method"] == "constant prediction"].set_index("dataset")["accuracy"]
    assert len(floors) == 5
    assert floors["pneumoniamnist"] == pytest.approx(390 / 624, abs=5e-5)
    assert floors["breastmnist"] == pytest.approx(114 / 156, abs=5e-5)


def test_the_same_set_size_and_split_compare():
    seen = published.comparison_table(meta())
    assert set(seen["dataset"]) == {"retinamnist"}
    assert seen["comparable"].tolist() == sorted(seen["comparable"], reverse=True)  # those that compare come first
    assert (seen["comparable"] == (seen["reason"] == "")).all()
    assert set(seen.loc[seen["comparable"], "resolution"]) == {"28", "any"}
    row = found(seen, "ResNet-18")
    assert row["comparable"]
    assert row["caveat"] == ""
    assert list(seen.columns) == [*published.read().columns, "comparable", "reason", "caveat"]


def test_another_size_does_not_compare():
    row = found(published.comparison_table(meta(size=224)), "ResNet-18")
    assert not row["comparable"]
    assert row["reason"] == "its images have 28 pixels, ours 224"
    assert found(published.comparison_table(meta(size=224)), "ViT-B/16 end-to-end", "224")["comparable"]
    assert not found(published.comparison_table(meta(size=128)), "ViT-B/16 end-to-end", "224")["comparable"]
    enlarged = published.comparison_table(meta(image_size=224))  # they stay images of 28 pixels
    assert found(enlarged, "ResNet-18, enlarged to 224")["comparable"]
    assert not found(enlarged, "ResNet-18 end-to-end", "224")["comparable"]


def test_images_that_were_reduced_here_compare_with_none():
    seen = published.comparison_table(meta(size=224, image_size=28))
    assert not seen["comparable"].any()
    assert seen["reason"].str.contains("ours were downsized from 224 to 28 pixels").all()


@pytest.mark.parametrize("split", [MADE.format("retinamnist"), ADOPTED])
def test_another_split_compares_with_none(split):
    seen = published.comparison_table(meta(split=split))
    assert not seen["comparable"].any()
    assert seen["reason"].str.startswith(f"ours uses the split {split}").all()


@pytest.mark.parametrize("size", [28, 64, 128, 224])
@pytest.mark.parametrize("name", sorted(medmnist.DATASETS))
def test_a_checkpoint_chosen_on_test_or_a_recalled_score_never_compares(name, size):
    seen = published.comparison_table(meta(name, size))
    assert not seen.empty
    for flawed, reason in (
        (seen["selection"] == "test", "its checkpoint was selected on test"),
        (seen["origin"] == "recalled", "recalled, not checked against its source"),
        (seen["split"] == "unknown", "its split is not reported"),
    ):
        assert not seen.loc[flawed, "comparable"].any()
        assert seen.loc[flawed, "reason"].str.contains(reason).all()
        assert not seen.loc[~flawed, "reason"].str.contains(reason).any()
    assert (seen["selection"] == "test").sum() == 4  # MedViTV2 has four sizes
    assert seen["comparable"].any()


def test_a_choice_that_is_not_told_is_a_caveat():
    seen = published.comparison_table(meta())
    row = found(seen, "Google AutoML Vision")
    assert row["comparable"]
    assert row["caveat"].startswith("its checkpoint selection is not reported; trained by a service")
    silent = seen["selection"] == "unknown"
    assert seen["caveat"].str.startswith("its checkpoint selection is not reported").equals(silent)
    quoted = found(published.comparison_table(meta("octmnist")), "MedViT-L, enlarged to 224")
    assert quoted["comparable"]
    assert "quoted by others" in quoted["caveat"]


def test_radiographs_compare_on_the_test_images_of_nih():
    seen = published.comparison_table(nih())
    assert seen.loc[seen["comparable"], "method"].tolist() == ["DenseNet-121", "Swin-T"]
    assert published.comparison_table(nih(image_size=384))["comparable"].sum() == 2
    assert not published.comparison_table(nih(image_size=224))["comparable"].any()
    assert "it uses another split" in found(seen, "CheXNet (DenseNet-121)")["reason"]


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": {"train": 78_484, "val": 11_212, "test": 22_424}},  # split.resplit, by the same kind of name
        {"split": ADOPTED},
        {"split": "chestxray14-0123456789ab.csv (SHA-256 0123abcd)"},  # adopted, and so perhaps edited
    ],
)
def test_radiographs_of_another_split_compare_with_none(changed):
    seen = published.comparison_table(nih(**changed))
    assert not seen["comparable"].any()
    assert seen["reason"].str.startswith("ours uses the split ").all()


@pytest.mark.parametrize("name", ["isic2019", "chestxray14"])
def test_a_sample_or_another_edition_is_another_data_set(name):
    if name == "isic2019":
        card = isic2019.build_card({}, "", is_published=False)
    else:
        card = chestxray14.build_card({}, "", list(chestxray14.ARCHIVES), is_published=False)
    assert card.counts is None
    ours = ArrayMetadata(
        {"name": name, "size": None, "counts": card.counts}, 320, 3, NIH, MADE.format(name), 0, [], [], "squash"
    )
    seen = published.comparison_table(ours)
    assert not seen.empty
    assert not seen["comparable"].any()
    assert seen["reason"].str.startswith("ours is not the complete published data set").all()


def test_images_that_were_left_out_make_another_data_set_and_of_ones_own_images_nothing_is_published():
    seen = published.comparison_table(meta(counts={"train": 1080, "val": 120, "test": 399}))
    assert not seen["comparable"].any()
    assert seen["reason"].str.startswith("ours is not the complete published data set").all()
    assert published.comparison_table(meta("own-retinamnist")).empty


def test_isic_has_no_published_split_and_so_nothing_to_compare_with():
    counts = {"train": 17_732, "val": 2_533, "test": 5_066}
    ours = ArrayMetadata(
        {"name": "isic2019", "size": None, "counts": {"all": isic2019.IMAGE_COUNT}}, 224, 3, counts,
        MADE.format("isic2019"), 0, [], [], "squash",
    )  # fmt: skip
    seen = published.comparison_table(ours)
    assert not seen["comparable"].any()
    assert not seen["reason"].str.contains("not the whole").any()
    assert seen["reason"].str.contains(r"(?:it uses another split|its split is not reported)").all()
