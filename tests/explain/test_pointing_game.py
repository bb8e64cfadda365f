"""Pointing game with boxes in pixels of the original images."""

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


def play(maps, boxes, sizes, side, aspect, margin=0.0) -> PointingScore:
    """Play the game with boxes in pixels of the original images; each image is of a different patient."""
    mapped = [transform_boxes(image_boxes, *size, side, aspect) for image_boxes, size in zip(boxes, sizes, strict=True)]
    return pointing_game.score_hits(find_hits(maps, mapped, side, margin), np.arange(len(maps)), 0.95)


def peaks(*positions: tuple[int, int], grid: int = 4):
    """Return maps (images, grid, grid) with their maxima at the given rows and columns."""
    maps = np.random.default_rng(0).random((len(positions), grid, grid))
    for heatmap, position in zip(maps, positions, strict=True):
        heatmap[position] = 2.0
    return maps


def test_hits_are_counted():
    maps = peaks((0, 0), (1, 2), (3, 3))
    boxes = [[(0, 0, 50, 50)], [(0, 0, 10, 10), (100, 50, 50, 50)], [(0, 0, 50, 50)]]
    score = play(maps, boxes, [(200, 200)] * 3, 28, "squash")
    assert (score.hits, score.cases, score.share) == (2, 3, pytest.approx(2 / 3))
    assert score.chance == pytest.approx(1 / 16)
    assert (score.constant, score.unreachable, score.outside) == (0, 0, 0)


def test_width_and_height_are_not_swapped():
    maps = peaks((0, 3), (3, 0))
    right_above = [[(300, 0, 100, 50)]] * 2
    score = play(maps, right_above, [(400, 200)] * 2, 28, "squash")
    assert (score.hits, score.cases) == (1, 2)
    below = play(maps, [[(0, 150, 100, 50)]] * 2, [(400, 200)] * 2, 28, "squash")
    assert (below.hits, below.cases) == (1, 2)


def test_aspect_mode_moves_boxes():
    maps = peaks((0, 0))
    hits = {a: play(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, a).hits for a in ("squash", "pad")}
    assert hits == {"squash": 1, "pad": 0}  # padding moves the upper edge of the image down by a quarter
    cropped = play(maps, [[(0, 0, 60, 50)]], [(400, 200)], 32, "crop")
    assert (cropped.cases, cropped.outside, cropped.share, cropped.chance) == (0, 1, None, None)


def test_constant_map_is_no_hit():
    score = play(np.zeros((1, 4, 4)), [[(0, 0, 200, 200)]], [(200, 200)], 28, "squash")
    assert (score.hits, score.cases, score.constant) == (0, 1, 1)
    assert score.chance == 1.0


def test_box_without_patch_center_is_unreachable():
    maps = peaks((0, 0))
    small = [[(0, 0, 10, 10)]]
    score = play(maps, small, [(200, 200)], 28, "squash")
    assert (score.hits, score.unreachable) == (0, 1)
    wider = play(maps, small, [(200, 200)], 28, "squash", margin=3)
    assert (wider.hits, wider.unreachable) == (1, 0)


@pytest.mark.parametrize("boxes", [[], [[(0, 0, 1, 1)]] * 2, [[(0, 0, 1)]], [(0, 0, 1, 1)]])
def test_mismatched_boxes_raise_error(boxes):
    with pytest.raises(ValueError, match="1 maps need as many box arrays"):
        find_hits(peaks((0, 0)), boxes, 28)


def test_interval_is_wider_if_cases_share_a_patient():
    maps = peaks(*[(0, 0)] * 10, *[(3, 3)] * 10)
    hits = find_hits(maps, [[(0, 0, 7, 7)]] * 20, 28)
    independent = pointing_game.score_hits(hits, np.arange(20), 0.95)
    assert independent.interval == wilson_interval(10, 20)
    assert independent.chance == pytest.approx(1 / 16)
    clustered = pointing_game.score_hits(hits, np.arange(20) // 2, 0.95)
    assert clustered.share == independent.share
    assert clustered.interval[0] < independent.interval[0] < independent.interval[1] < clustered.interval[1]
    assert pointing_game.score_hits(hits, np.zeros(20, np.int64), 0.95).interval is None


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), dtype=np.uint8)
INDEX = pd.DataFrame({"id": [f"i{n}" for n in range(40)], "group": [f"p{n // 2}" for n in range(40)]})
FINDINGS = ("a", "b", "c", "d", "e")
SMALL = {"side": 28, "channels": 1, "classes": list(FINDINGS)}


def boxes_at_maximum(model, label):
    """Return boxes of one finding that cover the patch of the Grad-CAM maximum in each image, and the maps."""
    maps = grad_cam(model.model, PIXELS, model.normalization, np.full(40, label))
    patch = 28 // maps.shape[1]
    y, x = np.unravel_index(maps.reshape(40, -1).argmax(axis=1), maps.shape[1:])
    size = np.full(40, float(patch))
    return pd.DataFrame({"id": INDEX["id"], "class": label, "x": x * size, "y": y * size, "w": size, "h": size}), maps


def test_each_method_explains_the_finding_of_the_box(tmp_path):
    model = load(write_model(tmp_path, "findings", **SMALL))
    (first, maps), (second, _) = boxes_at_maximum(model, 1), boxes_at_maximum(model, 4)
    boxes = pd.concat([first, second.iloc[:30]])
    results = evaluate_pointing(model, boxes.sample(frac=1, random_state=0), INDEX, PIXELS, FINDINGS, 0.95)
    assert (results["total_cases"], results["cases"], results["images"]) == (70, 70, 40)
    assert list(results["methods"]) == ["grad_cam", "attention", "laplacian"]
    cam = results["methods"]["grad_cam"]
    assert {name: method["cases"] for name, method in cam["per_class"].items()} == {"b": 40, "e": 30}
    num_constant = int((maps.reshape(40, -1).max(axis=1) == 0).sum())  # no evidence for the finding: constant map
    assert cam["per_class"]["b"]["hits"] == 40 - num_constant
    assert cam["per_class"]["b"]["constant"] == num_constant
    assert cam["overall"]["chance"] == pytest.approx(1 / maps[0].size)
    for method in results["methods"].values():
        assert sum(score["hits"] for score in method["per_class"].values()) == method["overall"]["hits"]
    exchanged = boxes.assign(**{"class": 5 - boxes["class"]})
    exchanged_cam = evaluate_pointing(model, exchanged, INDEX, PIXELS, FINDINGS, 0.95)["methods"]["grad_cam"]
    assert exchanged_cam["overall"]["hits"] < cam["overall"]["hits"]


def test_results_are_described_in_sentences_and_table(tmp_path):
    model = load(write_model(tmp_path, "findings", **SMALL))
    boxes, _ = boxes_at_maximum(model, 2)
    outside = boxes.assign(id="i3", x=np.nan).iloc[:1].assign(**{"class": 0})
    results = evaluate_pointing(model, pd.concat([boxes, outside]), INDEX, PIXELS, FINDINGS, 0.95)
    sentences = pointing_game.describe_results(results)
    assert sentences[0].startswith(
        "Pointing game with hand-drawn boxes (Zhang et al. 2018): 41 findings in 40 test images."
    )
    (cam,) = [sentence for sentence in sentences if sentence.startswith("Grad-CAM hits in ")]
    assert " % of 40 cases (95 % interval " in cam
    assert cam.endswith("the chance level is 2 %: above chance.")
    table = tables.pointing_game(results)
    assert table.head == ("Finding", "Cases", "Chance level", "Grad-CAM", "Attention part", "Laplacian part")
    assert [row[:3] for row in table.rows] == [("all", "40", "2"), ("a", "0", "undefined"), ("c", "40", "2")]
    assert table.rows[1][3:] == ("undefined",) * 3


def test_stage_writes_pointing_results_to_explanations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(write_model(tmp_path, "findings", **SMALL))
    boxes, _ = boxes_at_maximum(model, 2)
    paths.PROCESSED.mkdir(parents=True)
    labels = np.random.default_rng(1).integers(0, 2, (40, 5))
    test = predictions.build_predictions(
        INDEX.assign(split="test"), labels, model.predict_proba(PIXELS, 8), model.task, FINDINGS
    )
    predictions.write(test, paths.PREDICTIONS)
    monkeypatch.setattr(evaluate, "load_classifier", lambda: model)
    monkeypatch.setattr(evaluate.arrays, "load_split", lambda folder, split: SplitArrays(PIXELS, labels, INDEX))
    maps, seconds = evaluate.explain.fn(3, 0, 0.95)
    assert {heatmaps.shape for heatmaps in maps.values()} == {(3, *PIXELS.shape[1:3])}
    assert read_json(paths.EXPLANATIONS)["pointing"] is None
    assert seconds is None
    boxes.assign(split="test").to_parquet(paths.PROCESSED / "boxes.parquet")
    _, seconds = evaluate.explain.fn(3, 0, 0.95)
    written = read_json(paths.EXPLANATIONS)
    assert written["pointing"]["methods"]["grad_cam"]["per_class"]["c"]["cases"] == 40
    assert sum(" hits in " in sentence for sentence in written["sentences"]) == 3
    assert set(written["randomization"]) == set(written["pointing"]["methods"])
    assert seconds > 0


def test_cases_are_sampled_evenly_above_the_maximum(tmp_path, monkeypatch):
    monkeypatch.setattr(pointing_game, "MAX_CASES", 7)
    model = load(write_model(tmp_path, "findings", fade=None, **SMALL))
    boxes = pd.DataFrame({"id": INDEX["id"], "class": 0, "x": 0.0, "y": 0.0, "w": 9.0, "h": 9.0})
    results = evaluate_pointing(model, boxes, INDEX, PIXELS, FINDINGS, 0.95)
    assert (results["total_cases"], results["cases"], results["images"]) == (40, 7, 7)
    assert list(results["methods"]) == ["grad_cam"]
    assert "7 findings in 7 test images, an evenly spaced sample of 40." in pointing_game.describe_results(results)[0]
    assert evaluate_pointing(model, boxes.iloc[:0], INDEX, PIXELS, FINDINGS, 0.95) is None
