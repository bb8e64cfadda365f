"""The figures of stage evaluate, by name, each drawn from files and maps of the mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fadeformer import arrays, bands, case_plots, curve_plots, evidence_plots, mistakes, operating, plots, predictions
from fadeformer.files import read_json
from fadeformer.predictions import Predictions
from fadeformer.summary import summarise
from pipelines import paths

Maps = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Drawing:
    """What figures are drawn of.

    Attributes:
        mistakes: in the gallery.
        maps: of these mistakes, by name, (mistakes, side, side).
    """

    mistakes: int
    maps: Maps

    @cached_property
    def test(self) -> Predictions:
        """Predictions of test."""
        return predictions.read(paths.PREDICTIONS).of("test")

    @cached_property
    def found(self) -> dict[str, Any]:
        """Their numbers."""
        return summarise(self.test)

    @cached_property
    def told(self) -> dict[str, Any]:
        """The intervals of these numbers."""
        return read_json(paths.INTERVALS)

    @cached_property
    def bands(self) -> pd.DataFrame:
        """Bands of the curves."""
        return bands.read(paths.CURVES / "bands.csv")


def training_curves(of: Drawing) -> Figure:
    """Loss and accuracy by epoch."""
    return plots.training_curves(pd.read_csv(paths.HISTORY), read_json(paths.ARCHITECTURE)["best_epoch"])


def reliability(of: Drawing) -> Figure:
    """Scores against outcomes, before and after calibration."""
    before = read_json(paths.METRICS)["test"]["before_calibration"]["calibration_error"]
    after = of.found["overall"]["calibration_error"]
    return evidence_plots.reliability(of.test, (before, after), of.told["confidence"])


def gallery(of: Drawing) -> Figure:
    """The worst mistakes, and what the model looked at in them."""
    wrong, pixels = mistakes.most_wrong(of.test, of.mistakes), arrays.read(paths.PROCESSED, "test").pixels
    return case_plots.gallery(wrong, pixels[wrong["row"].to_numpy()], of.maps)


def embedding(of: Drawing) -> Figure:
    """Where test images lie by their features."""
    places = pd.read_parquet(paths.EMBEDDING)
    return case_plots.embedding(of.test, places, places.attrs["explained"])


def subgroup_forest(of: Drawing) -> Figure | None:
    """Subgroups against the whole; none where nothing divides the images."""
    subgroups = read_json(paths.SUBGROUPS)["test"]
    if not subgroups:
        return None
    return evidence_plots.subgroup_forest(of.found, of.told["test"], subgroups, of.told["confidence"])


FIGURES: dict[str, Callable[[Drawing], Figure | None]] = {
    "training_curves": training_curves,
    "confusion_matrix": lambda of: plots.confusion_matrix(of.test),
    "roc_curves": lambda of: curve_plots.roc_curves(of.test, of.found, of.told["test"], of.bands),
    "pr_curves": lambda of: curve_plots.pr_curves(of.test, of.found, of.told["test"], of.bands),
    "auc_forest": lambda of: evidence_plots.auc_forest(of.test, of.found, of.told["test"], of.told["confidence"]),
    "reliability": reliability,
    "score_histograms": lambda of: evidence_plots.score_histograms(of.test),
    "decision_curves": lambda of: evidence_plots.decision_curves(operating.net_benefit(of.test)),
    "gallery": gallery,
    "embedding": embedding,
    "subgroup_forest": subgroup_forest,
}


def draw(of: Drawing, folder: Path, dpi: int) -> None:
    """Write every figure as PNG and SVG; one that has nothing to show is left out."""
    for name, make in FIGURES.items():
        if (figure := make(of)) is not None:
            plots.save(figure, folder / f"{name}.png", dpi)
