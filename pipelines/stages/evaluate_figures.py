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
    """Write every figure as PNG and SVG; the forest plot of subgroups only if there are subgroups.

    Args:
        count: Number of errors in the gallery.
        maps: Attribution maps of these errors for each method, (errors, side, side).
        folder: Folder for the files.
        dpi: Resolution of the PNG files.
    """
    test = predictions.read(paths.PREDICTIONS).select_split("test")
    summary, intervals = summarize(test), read_json(paths.INTERVALS)
    curves, confidence = curve_bands.read(paths.CURVES / "bands.csv"), intervals["confidence"]
    before = read_json(paths.METRICS)["test"]["before_calibration"]["calibration_error"]
    calibration_errors = (before, summary["overall"]["calibration_error"])
    errors, images = error_gallery.most_confident_errors(test, count), arrays.load_split(paths.PROCESSED, "test").images
    projection, subgroups = pd.read_parquet(paths.EMBEDDING), read_json(paths.SUBGROUPS)["test"]
    best_epoch = read_json(paths.ARCHITECTURE)["best_epoch"]
    figures = {
        "training_curves": base.training_curves(pd.read_csv(paths.HISTORY), best_epoch),
        "confusion_matrix": base.confusion_matrix(test),
        "roc_curves": curve_plots.roc_curves(test, summary, intervals["test"], curves),
        "pr_curves": curve_plots.pr_curves(test, summary, intervals["test"], curves),
        "auc_forest": uncertainty.auc_forest(test, summary, intervals["test"], confidence),
        "reliability": uncertainty.reliability_diagram(test, calibration_errors, confidence),
        "score_histograms": uncertainty.score_histograms(test),
        "decision_curves": uncertainty.decision_curves(operating_points.net_benefit(test)),
        "gallery": cases.case_gallery(errors, images[errors["row"].to_numpy()], maps),
        "embedding": cases.embedding_scatter(test, projection, projection.attrs["explained"]),
    }
    if subgroups:
        forest = uncertainty.subgroup_forest(summary, intervals["test"], subgroups, confidence)
        figures["subgroup_forest"] = forest
    for name, figure in figures.items():
        base.save_figure(figure, folder / f"{name}.png", dpi)
