"""The model card says what a reader must know, and is Markdown that holds together."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.evaluation import predictions, subgroups
from fadeformer.evaluation.intervals.proportions import predictive_value_interval, wilson_interval
from fadeformer.evaluation.operating_points import select_operating_points
from fadeformer.evaluation.summary import confidence_intervals, summarize
from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting.model_card import render_model_card
from fadeformer.reporting.tables import NO_SUBGROUPS, ReportInputs
from fadeformer.tasks import TASKS

FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 4, "dropout": 0.1, "K": 3, "alpha": 0.5}


def card(
    task: str,
    note: str = "",
    labels: np.ndarray | None = None,
    leaks: int = 0,
    fade: dict | None = FADE,
    weights: dict | None = None,
    sexes: bool = True,
) -> str:
    multi_label = TASKS[task].multi_label
    classes = ("mass", "nodule | small") if multi_label else ("normal", "pneumonia")
    if labels is None:
        labels = np.array([[1, 0], [0, 1], [1, 1]]) if multi_label else np.array([[0], [1], [1]])
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    index = pd.DataFrame({"split": "test", "id": ["a", "b", "c"], "group": None})
    known = pd.DataFrame({"sex": ["F", "M", "F"]}) if sexes else None
    table = predictions.build_predictions(index, labels, scores, TASKS[task], classes, subgroups=known)
    wanted = {"youden": None, "sensitivity": 0.8}
    points = select_operating_points(table, table, wanted, 0.9)
    operating = {"targets": wanted, "confidence": 0.9, "points": points}
    summary, bounds = summarize(table), confidence_intervals(table, n_resamples=100, seed=0, confidence=0.9)
    dataset = {
        "name": "own", "file": "own.npz", "sha256": "5e1f", "task": task, "classes": list(classes),
        "license": "CC BY 4.0", "note": note,
    }  # fmt: skip
    described = {
        "model": {"backbone": "fadevit_nano", "pretrained": False, "fade": fade},
        "best_epoch": 4,
        "weights": weights,
        "calibration": {"slope": [0.5], "offset": [0.0]},
        "params": {"seed": 42, "train": {"epochs": 20, "monitor": "auc"}},
    }
    meta = ArrayMetadata(
        dataset, 28, 1, {"train": 1234, "val": 3, "test": 3}, "published", leaks, [0.5], [0.2], "squash"
    )
    _, groups = subgroups.evaluate_subgroups(table, [0, 40], n_resamples=100, seed=0, confidence=0.9)
    return render_model_card(
        ReportInputs(meta, described, {"val": summary, "test": summary}, bounds, operating, groups)
    )


@pytest.mark.parametrize("task", ["binary-class", "multi-label, binary-class"])
def test_it_names_data_model_and_numbers(task):
    text = card(task)
    assert "# fadevit_nano on own" in text
    assert "train 1,234, val 3, test 3" in text
    assert "| Seed | 42 |" in text
    assert "epoch 4" in text
    assert "## Results on 3 test images" in text
    assert ("| Finding |" in text) == TASKS[task].multi_label
    calibrated = "vector scaling per finding" if TASKS[task].multi_label else "temperature 2"
    assert f"| Calibration | {calibrated}, fitted on validation |" in text
    assert "| sex | F | 2 | 2 |" in text
    assert NO_SUBGROUPS not in text
    assert "Too few patients to compare subgroups with the overall metrics." in text  # of three images


def test_without_subgroups_a_sentence_stands_in_their_place():
    text = card("binary-class", sexes=False)
    assert NO_SUBGROUPS in text
    assert "Subgroups" not in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    tables = [block for block in card("multi-label, binary-class").split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_a_note_stands_before_everything_else():
    assert card("binary-class", note="Synthetic.").splitlines()[2] == "> **Synthetic.**"
    assert ">" not in card("binary-class")


def test_it_tells_the_layers_and_where_the_weights_came_from():
    assert "| Backbone | fadevit_nano, from random weights |" in card("binary-class")
    assert "| Fade layers | variant published, num_heads 4, dropout 0.1, K 3, alpha 0.5 |" in card("binary-class")
    diffusion = {**FADE, "variant": "diffusion", "after_blocks": [1, "last"]}
    text = card("binary-class", fade=diffusion, weights={"file": "start.pth", "sha256": "ab12"})
    assert "| Fade layers | variant diffusion, after_blocks 1, last, num_heads 4, dropout 0.1 |" in text
    assert "from the weights of start.pth (SHA-256 `ab12`)" in text
    assert "| Fade layers | none: the plain backbone |" in card("binary-class", fade=None)


def test_leaks_that_were_allowed_are_told():
    assert "**8 images are in two splits**" in card("binary-class", leaks=8)
    assert "two splits" not in card("binary-class")


def test_what_cannot_be_judged_is_named():
    text = card("binary-class", labels=np.ones((3, 1), int))
    assert "Not evaluated, without positive or without negative images: normal, pneumonia." in text
    assert "| AUC | undefined | undefined |" in text


def test_it_tells_the_operating_points_with_their_intervals():
    text = card("binary-class")
    truth = np.array([True, True, False])  # of scores 0.6, 0.3 and 0.1
    predictive = [predictive_value_interval(of, of, np.arange(3), 0.9) for of in (truth, ~truth)]
    shares = " | ".join(
        format_with_interval(1.0, of) for of in (wilson_interval(2, 2, 0.9), wilson_interval(1, 1, 0.9), *predictive)
    )
    assert f"| largest sensitivity + specificity | pneumonia | 0.2000 | {shares} |" in text
    assert "| sensitivity at least 0.8 | pneumonia |" in text
    assert "Test (90 % interval)" in text
    assert "| mass | not evaluated | " in card("multi-label, binary-class", labels=np.array([[1, 0], [1, 1], [1, 1]]))
