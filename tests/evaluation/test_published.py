"""Published scores are consistent and comparable only for equal data set, size and split, without selection on test."""

from typing import get_args

import numpy as np
import pandas as pd
import pytest

from fadeformer.config.schema import DatasetName
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.data.sources import chestxray14, isic2019, medmnist
from fadeformer.evaluation import published

MADE = "{}-0123456789ab.csv"  # name of a split made by this project
ADOPTED = "proposed-0123abcd.csv (SHA-256 0123abcd)"
NIH = {"train": 78_000, "val": 8_524, "test": 25_596}
SIZED = {"28", "64", "128", "224", "320", "384", "512"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return published.read()


def meta(name="retinamnist", size=28, split="published", image_size=None, counts=None) -> ArrayMetadata:
    """Metadata of a MedMNIST data set in its published split."""
    known = medmnist.DATASETS[name].counts if name in medmnist.DATASETS else (700, 100, 200)
    split_counts = dict(zip(("train", "val", "test"), known, strict=True))
    dataset = {"name": name, "size": size, "counts": split_counts}
    return ArrayMetadata(
        dataset, image_size or size, 3, counts or split_counts, split, 0, [0.5] * 3, [0.2] * 3, "squash"
    )


def nih(split="chestxray14-0123456789ab.csv", image_size=320, counts=NIH) -> ArrayMetadata:
    """Metadata of the complete NIH ChestX-ray14 with val made here."""
    dataset = {"name": "chestxray14", "size": None, "counts": chestxray14.COUNTS}
    return ArrayMetadata(dataset, image_size, 3, counts, split, 0, [0.5] * 3, [0.2] * 3, "squash")


def select_row(rows: pd.DataFrame, method: str, resolution: str | None = None) -> pd.Series:
    matches = rows[(rows["method"] == method) & (resolution is None or rows["resolution"] == resolution)]
    assert len(matches) == 1, matches
    return matches.iloc[0]


def test_columns_hold_documented_values(rows):
    assert set(rows["dataset"]) == {*medmnist.DATASETS, "isic2019", "chestxray14"} <= set(get_args(DatasetName))
    assert set(rows["resolution"]) == {*SIZED, "any", "several", "unknown"}
    assert set(rows["split"]) == {"published", "other", "unknown"}
    assert set(rows["selection"]) == {"val", "test", "unknown"}
    assert set(rows["origin"]) == {"authors", "quoted", "recalled", "unknown"}
    scores = rows[list(published.SCORE_COLUMNS)].to_numpy()
    assert np.isfinite(scores).any(axis=1).all()  # a row has at least one score
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
def test_scores_match_their_source(rows, dataset, resolution, method, auc, accuracy):
    row = select_row(rows[rows["dataset"] == dataset], method, resolution)
    assert [row["auc"], row["accuracy"]] == pytest.approx([auc or np.nan, accuracy or np.nan], nan_ok=True)


def test_constant_predictions_score_majority_share(rows):
    """PneumoniaMNIST has 390 of 624 test images of one class, BreastMNIST 114 of 156."""
    floors = rows[rows["method"] == "constant prediction"].set_index("dataset")["accuracy"]
    assert len(floors) == 5
    assert floors["pneumoniamnist"] == pytest.approx(390 / 624, abs=5e-5)
    assert floors["breastmnist"] == pytest.approx(114 / 156, abs=5e-5)


def test_same_dataset_size_and_split_are_comparable():
    table = published.comparison_table(meta())
    assert set(table["dataset"]) == {"retinamnist"}
    assert table["comparable"].tolist() == sorted(table["comparable"], reverse=True)  # comparable rows come first
    assert (table["comparable"] == (table["reason"] == "")).all()
    assert set(table.loc[table["comparable"], "resolution"]) == {"28", "any"}
    row = select_row(table, "ResNet-18")
    assert row["comparable"]
    assert row["caveat"] == ""
    assert list(table.columns) == [*published.read().columns, "comparable", "reason", "caveat"]


def test_other_image_size_is_not_comparable():
    row = select_row(published.comparison_table(meta(size=224)), "ResNet-18")
    assert not row["comparable"]
    assert row["reason"] == "its images have 28 pixels, ours 224"
    assert select_row(published.comparison_table(meta(size=224)), "ViT-B/16 end-to-end", "224")["comparable"]
    assert not select_row(published.comparison_table(meta(size=128)), "ViT-B/16 end-to-end", "224")["comparable"]
    enlarged = published.comparison_table(meta(image_size=224))  # still images of 28 pixels
    assert select_row(enlarged, "ResNet-18, enlarged to 224")["comparable"]
    assert not select_row(enlarged, "ResNet-18 end-to-end", "224")["comparable"]


def test_downsized_images_are_not_comparable():
    table = published.comparison_table(meta(size=224, image_size=28))
    assert not table["comparable"].any()
    assert table["reason"].str.contains("ours were downsized from 224 to 28 pixels").all()


@pytest.mark.parametrize("split", [MADE.format("retinamnist"), ADOPTED])
def test_other_split_is_not_comparable(split):
    table = published.comparison_table(meta(split=split))
    assert not table["comparable"].any()
    assert table["reason"].str.startswith(f"ours uses the split {split}").all()


@pytest.mark.parametrize("size", [28, 64, 128, 224])
@pytest.mark.parametrize("name", sorted(medmnist.DATASETS))
def test_test_selected_or_recalled_scores_are_not_comparable(name, size):
    table = published.comparison_table(meta(name, size))
    assert not table.empty
    for flawed, reason in (
        (table["selection"] == "test", "its checkpoint was selected on test"),
        (table["origin"] == "recalled", "recalled, not checked against its source"),
        (table["split"] == "unknown", "its split is not reported"),
    ):
        assert not table.loc[flawed, "comparable"].any()
        assert table.loc[flawed, "reason"].str.contains(reason).all()
        assert not table.loc[~flawed, "reason"].str.contains(reason).any()
    assert (table["selection"] == "test").sum() == 4  # MedViTV2 has four sizes
    assert table["comparable"].any()


def test_unreported_checkpoint_selection_is_caveat():
    table = published.comparison_table(meta())
    row = select_row(table, "Google AutoML Vision")
    assert row["comparable"]
    assert row["caveat"].startswith("its checkpoint selection is not reported; trained by a service")
    unreported = table["selection"] == "unknown"
    assert table["caveat"].str.startswith("its checkpoint selection is not reported").equals(unreported)
    quoted = select_row(published.comparison_table(meta("octmnist")), "MedViT-L, enlarged to 224")
    assert quoted["comparable"]
    assert "quoted by others" in quoted["caveat"]


def test_nih_test_images_are_comparable():
    table = published.comparison_table(nih())
    assert table.loc[table["comparable"], "method"].tolist() == ["DenseNet-121", "Swin-T"]
    assert published.comparison_table(nih(image_size=384))["comparable"].sum() == 2
    assert not published.comparison_table(nih(image_size=224))["comparable"].any()
    assert "it uses another split" in select_row(table, "CheXNet (DenseNet-121)")["reason"]


@pytest.mark.parametrize(
    "changed",
    [
        {"counts": {"train": 78_484, "val": 11_212, "test": 22_424}},  # split.resplit has names of the same form
        {"split": ADOPTED},
        {"split": "chestxray14-0123456789ab.csv (SHA-256 0123abcd)"},  # an adopted split may have been edited
    ],
)
def test_nih_other_split_is_not_comparable(changed):
    table = published.comparison_table(nih(**changed))
    assert not table["comparable"].any()
    assert table["reason"].str.startswith("ours uses the split ").all()


@pytest.mark.parametrize("name", ["isic2019", "chestxray14"])
def test_sample_or_other_edition_is_not_comparable(name):
    if name == "isic2019":
        card = isic2019.build_card({}, "", is_published=False)
    else:
        card = chestxray14.build_card({}, "", list(chestxray14.ARCHIVES), is_published=False)
    assert card.counts is None
    ours = ArrayMetadata(
        {"name": name, "size": None, "counts": card.counts}, 320, 3, NIH, MADE.format(name), 0, [], [], "squash"
    )
    table = published.comparison_table(ours)
    assert not table.empty
    assert not table["comparable"].any()
    assert table["reason"].str.startswith("ours is not the complete published data set").all()


def test_dropped_images_and_own_data_are_not_comparable():
    table = published.comparison_table(meta(counts={"train": 1080, "val": 120, "test": 399}))
    assert not table["comparable"].any()
    assert table["reason"].str.startswith("ours is not the complete published data set").all()
    assert published.comparison_table(meta("own-retinamnist")).empty


def test_isic_without_published_split_is_not_comparable():
    counts = {"train": 17_732, "val": 2_533, "test": 5_066}
    ours = ArrayMetadata(
        {"name": "isic2019", "size": None, "counts": {"all": isic2019.IMAGE_COUNT}}, 224, 3, counts,
        MADE.format("isic2019"), 0, [], [], "squash",
    )  # fmt: skip
    table = published.comparison_table(ours)
    assert not table["comparable"].any()
    assert not table["reason"].str.contains("not the complete").any()
    assert table["reason"].str.contains(r"(?:it uses another split|its split is not reported)").all()
