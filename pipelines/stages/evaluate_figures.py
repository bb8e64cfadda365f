"""The figures of stage evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.data import arrays
from fadeformer.evaluation import error_gallery, operating_points, predictions
from fadeformer.evaluation.intervals import curve_bands
from fadeformer.evaluation.summary import summarize
from fadeformer.io.atomic import read_json
from fadeformer.reporting.plots import base, cases, uncertainty
from fadeformer.reporting.plots import curves as curve_plots
from pipelines import paths


def draw_figures(count: int, maps: Mapping[str, NDArray[np.float64]], folder: Path, dpi: int) -> None:
    """Write every figure as PNG and SVG; without subgroups there is no figure of them.

    Args:
        count: mistakes in the gallery.
        maps: of these mistakes, by name, (mistakes, side, side).
        folder: for the files.
        dpi: resolution of the PNG files.
    """
    test = predictions.read(paths.PREDICTIONS).select_split("test")
    found, intervals = summarize(test), read_json(paths.INTERVALS)
    curves, confidence = curve_bands.read(paths.CURVES / "bands.csv"), intervals["confidence"]
    before = read_json(paths.METRICS)["test"]["before_calibration"]["calibration_error"]
    errors = (before, found["overall"]["calibration_error"])
    wrong, pixels = error_gallery.most_confident_errors(test, count), arrays.load_split(paths.PROCESSED, "test").images
    places, subgroups = pd.read_parquet(paths.EMBEDDING), read_json(paths.SUBGROUPS)["test"]
    best_epoch = read_json(paths.ARCHITECTURE)["best_epoch"]
    figures = {
        "training_curves": base.training_curves(pd.read_csv(paths.HISTORY), best_epoch),
        "confusion_matrix": base.confusion_matrix(test),
        "roc_curves": curve_plots.roc_curves(test, found, intervals["test"], curves),
        "pr_curves": curve_plots.pr_curves(test, found, intervals["test"], curves),
        "auc_forest": uncertainty.auc_forest(test, found, intervals["test"], confidence),
        "reliability": uncertainty.reliability_diagram(test, errors, confidence),
        "score_histograms": uncertainty.score_histograms(test),
        "decision_curves": uncertainty.decision_curves(operating_points.net_benefit(test)),
        "gallery": cases.case_gallery(wrong, pixels[wrong["row"].to_numpy()], maps),
        "embedding": cases.embedding_scatter(test, places, places.attrs["explained"]),
    }
    if subgroups:
        forest = uncertainty.subgroup_forest(found, intervals["test"], subgroups, confidence)
        figures["subgroup_forest"] = forest
    for name, figure in figures.items():
        base.save_figure(figure, folder / f"{name}.png", dpi)
