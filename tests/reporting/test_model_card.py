"""Model card: complete content and valid Markdown tables."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.evaluation import predictions, subgroups
from fadeformer.evaluation.intervals.proportions import wilson_interval
from fadeformer.evaluation.operating_points import resolve_prevalences, select_operating_points
from fadeformer.evaluation.summary import confidence_intervals, summarize
from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting.model_card import render_model_card
from fadeformer.reporting.subgroup_tables import NO_SUBGROUPS
from fadeformer.reporting.tables import ReportInputs, class_calibration
from fadeformer.tasks import TASKS

FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 4, "dropout": 0.1, "K": 3, "alpha": 0.5}


def render_card(
    task: str,
    note: str = "",
    labels: np.ndarray | None = None,
    leaks: int = 0,
    fade: dict | None = FADE,
    weights: dict | None = None,
    has_subgroups: bool = True,
    prevalence: list[float] | None = None,
    copies: int = 1,
    calibration: dict | None = None,
) -> str:
    multi_label = TASKS[task].multi_label
    classes = ("mass", "nodule | small") if multi_label else ("normal", "pneumonia")
    if labels is None:
        labels = np.array([[1, 0], [0, 1], [1, 1]]) if multi_label else np.array([[0], [1], [1]])
    scores = np.tile([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]], (copies, 1))
    labels = np.tile(labels, (copies, 1))
    index = pd.DataFrame({"split": "test", "id": np.arange(3 * copies).astype(str), "group": None})
    subgroup_columns = (
        pd.DataFrame({"sex": np.resize(["F", "M", "F", "M", "F"], 3 * copies)}) if has_subgroups else None
    )
    table = predictions.build_predictions(index, labels, scores, TASKS[task], classes, subgroups=subgroup_columns)
    targets = {"youden": None, "sensitivity": 0.8}
    points = select_operating_points(table, table, targets, 0.9, resolve_prevalences(prevalence, table))
    operating_points = {"targets": targets, "confidence": 0.9, "points": points}
    summary, bounds = summarize(table), confidence_intervals(table, n_resamples=100, seed=0, confidence=0.9)
    dataset = {
        "name": "own", "file": "own.npz", "sha256": "5e1f", "task": task, "classes": list(classes),
        "license": "CC BY 4.0", "note": note,
    }  # fmt: skip
    metadata = {
        "model": {"backbone": "fadevit_nano", "pretrained": False, "fade": fade},
        "best_epoch": 4,
        "weights": weights,
        "calibration": calibration
        or {"slope": [0.5] * (1 + multi_label), "offset": [0.1, 0.0] if multi_label else [0.0]},
        "params": {"seed": 42, "train": {"epochs": 20, "monitor": "auc"}},
    }
    meta = ArrayMetadata(
        dataset, 28, 1, {"train": 1234, "val": 3, "test": 3}, "published", leaks, [0.5], [0.2], "squash"
    )
    _, groups = subgroups.evaluate_subgroups(table, [0, 40], n_resamples=100, seed=0, confidence=0.9)
    return render_model_card(
        ReportInputs(meta, metadata, {"val": summary, "test": summary}, bounds, operating_points, groups)
    )


@pytest.mark.parametrize("task", ["binary-class", "multi-label, binary-class"])
def test_card_has_data_model_and_metrics(task):
    text = render_card(task)
    assert "# fadevit_nano on own" in text
    assert "train 1,234, val 3, test 3" in text
    assert "| Seed | 42 |" in text
    assert "epoch 4" in text
    assert "## Results on 3 test images" in text
    assert ("| Finding |" in text) == TASKS[task].multi_label
    calibrated = "Platt scaling per finding" if TASKS[task].multi_label else "temperature 2"
    assert f"| Calibration | {calibrated}, fitted on validation |" in text
    decision = "findings with a score above 0.5" if TASKS[task].multi_label else "most probable class"
    assert f"| Decision | {decision} |" in text
    assert "Training weighted the classes" not in text
    assert "| sex | F | 2 | 2 |" in text
    assert NO_SUBGROUPS not in text
    assert "Too few patients to compare subgroups with the other images." in text  # of three images


def test_missing_subgroups_are_stated():
    text = render_card("binary-class", has_subgroups=False)
    assert NO_SUBGROUPS in text
    assert "Subgroups" not in text


def test_table_rows_have_equal_numbers_of_cells():
    tables = [block for block in render_card("multi-label, binary-class").split("\n\n") if block.startswith("|")]
    assert len(tables) == 7
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_note_comes_first():
    assert render_card("binary-class", note="Synthetic.").splitlines()[2] == "> **Synthetic.**"
    assert ">" not in render_card("binary-class")


def test_card_states_fade_layers_and_weight_origin():
    assert "| Backbone | fadevit_nano, from random weights |" in render_card("binary-class")
    assert "| Fade layers | variant published, num_heads 4, dropout 0.1, K 3, alpha 0.5 |" in render_card(
        "binary-class"
    )
    diffusion = {**FADE, "variant": "diffusion", "after_blocks": [1, "last"]}
    text = render_card("binary-class", fade=diffusion, weights={"file": "start.pth", "sha256": "ab12"})
    assert "| Fade layers | variant diffusion, after_blocks 1, last, num_heads 4, dropout 0.1 |" in text
    assert "from the weights of start.pth (SHA-256 `ab12`)" in text
    assert "| Fade layers | none: the plain backbone |" in render_card("binary-class", fade=None)


def test_allowed_leakage_is_stated():
    assert "**8 images are in two splits**" in render_card("binary-class", leaks=8)
    assert "images are in two splits" not in render_card("binary-class")


def test_unevaluated_classes_are_stated():
    text = render_card("binary-class", labels=np.ones((3, 1), int))
    assert "Left out of means, fewer than two patients with or without it: normal, pneumonia." in text
    assert "| AUC | undefined | undefined |" in text


def test_card_has_operating_points_with_intervals():
    text = render_card("binary-class")
    truth = np.array([True, True, False])  # of scores 0.6, 0.3 and 0.1
    rates = [wilson_interval(count, count, 0.9) for count in (truth.sum(), (~truth).sum())]
    shares = " | ".join(format_with_interval(1.0, interval) for interval in (*rates, *rates))
    assert f"| largest sensitivity + specificity | pneumonia | 0.2000 | {shares} |" in text
    assert "| sensitivity at least 0.8 | pneumonia |" in text
    assert "Test (90 % interval)" in text
    assert "| mass | not evaluated | " in render_card(
        "multi-label, binary-class", labels=np.array([[1, 0], [1, 1], [1, 1]])
    )


def test_predictive_values_state_their_prevalence():
    text = render_card("binary-class", prevalence=[0.02])
    assert "at the case mix of the test set, as a random sample" in text
    assert "## Predictive values at stated prevalences" in text
    assert "| largest sensitivity + specificity | pneumonia | 2 % | 1.00 (" in text
    assert "## Predictive values" not in render_card("binary-class")


def test_card_states_detectable_shortfall_of_each_comparison():
    text = render_card("binary-class", copies=60)
    assert (
        "6 comparisons of subgroups with the other images, corrected for multiple testing (smallest detectable" in text
    )
    rows = [line for line in text.splitlines() if line.startswith("| sex |") and "sensitivity of pneumonia" in line]
    assert len(rows) == 2
    assert all(0 < float(row.split(" | ")[-1].removesuffix(" |")) < 1 for row in rows)
    assert text.index("## Limitations") < text.index("## Comparisons of subgroups with the other images")


def test_card_states_calibration_and_decision_weights():
    corrected = {"slope": [0.5], "offset": [1.0, -1.0], "method": "prior correction", "decision_weights": [0.12, 0.88]}
    text = render_card("binary-class", calibration=corrected)
    method = "temperature 2, fitted on validation, and correction of the class weights in training to the class"
    assert f"| Calibration | {method} frequencies |" in text
    weights = "largest product of probability and decision weight (normal 0.12, pneumonia 0.88)"
    assert f"| Decision | {weights} |" in text
    assert "Training weighted the classes, and so do the decisions" in text
    offsets = render_card("binary-class", calibration={**corrected, "method": "offsets", "decision_weights": []})
    assert "| Calibration | temperature 2 and one offset per class, fitted on validation |" in offsets
    assert "| Decision | most probable class |" in offsets


def test_card_has_calibration_of_each_class():
    rng = np.random.default_rng(0)
    score = rng.random(300)
    labels = (rng.random(300) < score)[:, None].astype(int)
    index = pd.DataFrame({"split": "test", "id": np.arange(300).astype(str), "group": None})
    scores = np.stack([1 - score, score], axis=1)
    table = predictions.build_predictions(index, labels, scores, TASKS["binary-class"], ("normal", "pneumonia"))
    summary, bounds = summarize(table), confidence_intervals(table, n_resamples=100, seed=0, confidence=0.9)
    meta = ArrayMetadata({"task": "binary-class", "classes": list(table.classes)}, 28, 1, {}, "x", 0, [], [], "squash")
    inputs = ReportInputs(meta, {}, {"test": summary, "val": summary}, bounds, {}, {})
    head, (_, row) = class_calibration(inputs).head, class_calibration(inputs).rows
    assert head[1:3] == ("Mean score", "Observed frequency")
    assert row[:3] == ("pneumonia", f"{score.mean():.4f}", f"{labels.mean():.4f}")
    values, limits = summary["per_class"]["pneumonia"], bounds["per_class"]["pneumonia"]
    assert row[3:] == tuple(
        format_with_interval(values[key], limits[key])
        for key in ("class_calibration_error", "calibration_slope", "calibration_intercept")
    )
    assert " to " in row[4]
