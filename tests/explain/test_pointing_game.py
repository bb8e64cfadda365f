"""The pointing game, with boxes that are told in pixels of the original image."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.arrays import SplitArrays
from fadeformer.data.boxes import transform_boxes
from fadeformer.evaluation import predictions
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.explain import pointing_game
from fadeformer.explain.attribution import grad_cam
from fadeformer.explain.pointing_game import PointingScore, evaluate_pointing, find_hits
from fadeformer.io.atomic import read_json
from fadeformer.reporting import tables
from pipelines import paths
from pipelines.stages import evaluate
from tests.packages import load, write_model


def played(maps, boxes, sizes, side, aspect, margin=0.0) -> PointingScore:
    """The game, with boxes in pixels of originals, each image of a patient of its own."""
    mapped = [transform_boxes(of, *size, side, aspect) for of, size in zip(boxes, sizes, strict=True)]
    return pointing_game.score_hits(find_hits(maps, mapped, side, margin), np.arange(len(maps)), 0.95)


def peaks(*places: tuple[int, int], grid: int = 4):
    """Maps (images, grid, grid) that are largest at the given row and column."""
    maps = np.random.default_rng(0).random((len(places), grid, grid))
    for one, place in zip(maps, places, strict=True):
        one[place] = 2.0
    return maps


def test_pointing_counts():
    maps = peaks((0, 0), (1, 2), (3, 3))
    boxes = [[(0, 0, 50, 50)], [(0, 0, 10, 10), (100, 50, 50, 50)], [(0, 0, 50, 50)]]
    told = played(maps, boxes, [(200, 200)] * 3, 28, "squash")
    assert (told.hits, told.cases, told.share) == (2, 3, pytest.approx(2 / 3))
    assert told.chance == pytest.approx(1 / 16)
    assert (told.constant, told.unreachable, told.outside) == (0, 0, 0)


def test_width_and_height_are_not_mixed_up():
    maps = peaks((0, 3), (3, 0))
    right_above = [[(300, 0, 100, 50)]] * 2
    told = played(maps, right_above, [(400, 200)] * 2, 28, "squash")
    assert (told.hits, told.cases) == (1, 2)
    below = played(maps, [[(0, 150, 100, 50)]] * 2, [(400, 200)] * 2, 28, "squash")
    assert (below.hits, below.cases) == (1, 2)


def test_the_aspect_decides_where_a_box_lies():
    maps = peaks((0, 0))
    hits = {a: played(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, a).hits for a in ("squash", "pad")}
    assert hits == {"squash": 1, "pad": 0}  # padding moves the image's upper edge down by a quarter
    cropped = played(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, "crop")
    assert (cropped.cases, cropped.outside, cropped.share, cropped.chance) == (0, 1, None, None)


def test_a_map_that_points_nowhere_hits_nothing():
    told = played(np.zeros((1, 4, 4)), [[(0, 0, 200, 200)]], [(200, 200)], 28, "squash")
    assert (told.hits, told.cases, told.constant) == (0, 1, 1)
    assert told.chance == 1.0


def test_a_box_between_the_middles_of_patches_cannot_be_hit():
    maps = peaks((0, 0))
    small = [[(0, 0, 10, 10)]]
    told = played(maps, small, [(200, 200)], 28, "squash")
    assert (told.hits, told.unreachable) == (0, 1)
    wider = played(maps, small, [(200, 200)], 28, "squash", margin=3)
    assert (wider.hits, wider.unreachable) == (1, 0)


@pytest.mark.parametrize("boxes", [[], [[(0, 0, 1, 1)]] * 2, [[(0, 0, 1)]], [(0, 0, 1, 1)]])
def test_what_does_not_fit_is_told(boxes):
    with pytest.raises(ValueError, match="1 maps need as many box arrays"):
        find_hits(peaks((0, 0)), boxes, 28)


def test_the_interval_is_wilson_s_and_wider_where_cases_share_a_patient():
    maps = peaks(*[(0, 0)] * 10, *[(3, 3)] * 10)
    of = find_hits(maps, [[(0, 0, 7, 7)]] * 20, 28)
    alone = pointing_game.score_hits(of, np.arange(20), 0.95)
    assert alone.interval == wilson_interval(10, 20)
    assert alone.chance == pytest.approx(1 / 16)
    pairs = pointing_game.score_hits(of, np.arange(20) // 2, 0.95)
    assert pairs.share == alone.share
    assert pairs.interval[0] < alone.interval[0] < alone.interval[1] < pairs.interval[1]
    assert pointing_game.score_hits(of, np.zeros(20, np.int64), 0.95).interval is None


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)
INDEX = pd.DataFrame({"id": [f"i{n}" for n in range(40)], "group": [f"p{n // 2}" for n in range(40)]})
FINDINGS = ("a", "b", "c", "d", "e")
SMALL = {"side": 28, "channels": 1, "classes": list(FINDINGS)}


def at_the_peak(model, label):
    """A box of a patch, of the finding of that number, in every image: where Grad-CAM of the network is largest."""
    maps = grad_cam(model.model, PIXELS, model.normalization, np.full(40, label))
    patch = 28 // maps.shape[1]
    y, x = np.unravel_index(maps.reshape(40, -1).argmax(axis=1), maps.shape[1:])
    size = np.full(40, float(patch))
    return pd.DataFrame({"id": INDEX["id"], "class": label, "x": x * size, "y": y * size, "w": size, "h": size}), maps


def test_each_map_is_of_the_finding_of_its_box_and_every_method_is_judged(tmp_path):
    model = load(write_model(tmp_path, "findings", **SMALL))
    (first, maps), (second, _) = at_the_peak(model, 1), at_the_peak(model, 4)
    boxes = pd.concat([first, second.iloc[:30]])
    found = evaluate_pointing(model, boxes.sample(frac=1, random_state=0), INDEX, PIXELS, FINDINGS, 0.95)
    assert (found["total_cases"], found["cases"], found["images"]) == (70, 70, 40)
    assert list(found["methods"]) == ["grad_cam", "attention", "laplacian"]
    cam = found["methods"]["grad_cam"]
    assert {name: of["cases"] for name, of in cam["per_class"].items()} == {"b": 40, "e": 30}
    empty = int((maps.reshape(40, -1).max(axis=1) == 0).sum())  # nothing speaks for the finding: points nowhere
    assert cam["per_class"]["b"]["hits"] == 40 - empty
    assert cam["per_class"]["b"]["constant"] == empty
    assert cam["overall"]["chance"] == pytest.approx(1 / maps[0].size)
    for of in found["methods"].values():
        assert sum(one["hits"] for one in of["per_class"].values()) == of["overall"]["hits"]
    exchanged = boxes.assign(**{"class": 5 - boxes["class"]})
    other = evaluate_pointing(model, exchanged, INDEX, PIXELS, FINDINGS, 0.95)["methods"]["grad_cam"]
    assert other["overall"]["hits"] < cam["overall"]["hits"]


def test_what_was_found_is_told_in_sentences_and_a_table(tmp_path):
    model = load(write_model(tmp_path, "findings", **SMALL))
    boxes, _ = at_the_peak(model, 2)
    nowhere = boxes.assign(id="i3", x=np.nan).iloc[:1].assign(**{"class": 0})
    found = evaluate_pointing(model, pd.concat([boxes, nowhere]), INDEX, PIXELS, FINDINGS, 0.95)
    told = pointing_game.describe_results(found)
    assert told[0].startswith("Pointing game with hand-drawn boxes (Zhang et al. 2018): 41 findings in 40 test images.")
    (cam,) = [sentence for sentence in told if sentence.startswith("Grad-CAM hits in ")]
    assert " % of 40 cases (95 % interval " in cam
    assert cam.endswith("the chance level is 2 %: above chance.")
    table = tables.pointing_game(found)
    assert table.head == ("Finding", "Cases", "Chance level", "Grad-CAM", "Attention part", "Laplacian part")
    assert [row[:3] for row in table.rows] == [("all", "40", "2"), ("a", "0", "undefined"), ("c", "40", "2")]
    assert table.rows[1][3:] == ("undefined",) * 3


def test_the_stage_writes_what_was_found_beside_the_other_explanations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(write_model(tmp_path, "findings", **SMALL))
    boxes, _ = at_the_peak(model, 2)
    paths.PROCESSED.mkdir(parents=True)
    labels = np.random.default_rng(1).integers(0, 2, (40, 5))
    test = predictions.build_predictions(
        INDEX.assign(split="test"), labels, model.predict_proba(PIXELS, 8), model.task, FINDINGS
    )
    predictions.write(test, paths.PREDICTIONS)
    monkeypatch.setattr(evaluate, "load_classifier", lambda: model)
    monkeypatch.setattr(evaluate.arrays, "load_split", lambda folder, split: SplitArrays(PIXELS, labels, INDEX))
    maps, seconds = evaluate.explain.fn(3, 0, 0.95)
    assert {of.shape for of in maps.values()} == {(3, *PIXELS.shape[1:3])}
    assert read_json(paths.EXPLANATIONS)["pointing"] is None
    assert seconds is None
    boxes.assign(split="test").to_parquet(paths.PROCESSED / "boxes.parquet")
    _, seconds = evaluate.explain.fn(3, 0, 0.95)
    written = read_json(paths.EXPLANATIONS)
    assert written["pointing"]["methods"]["grad_cam"]["per_class"]["c"]["cases"] == 40
    assert sum(" hits in " in sentence for sentence in written["sentences"]) == 3
    assert set(written["randomization"]) == set(written["pointing"]["methods"])
    assert seconds > 0


def test_as_many_cases_as_the_bound_allows_spread_over_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(pointing_game, "MAX_CASES", 7)
    model = load(write_model(tmp_path, "findings", fade=None, **SMALL))
    boxes = pd.DataFrame({"id": INDEX["id"], "class": 0, "x": 0.0, "y": 0.0, "w": 9.0, "h": 9.0})
    found = evaluate_pointing(model, boxes, INDEX, PIXELS, FINDINGS, 0.95)
    assert (found["total_cases"], found["cases"], found["images"]) == (40, 7, 7)
    assert list(found["methods"]) == ["grad_cam"]
    assert "7 findings in 7 test images, an evenly spaced sample of 40." in pointing_game.describe_results(found)[0]
    assert evaluate_pointing(model, boxes.iloc[:0], INDEX, PIXELS, FINDINGS, 0.95) is None
