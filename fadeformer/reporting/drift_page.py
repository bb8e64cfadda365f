"""HTML page of a drift check, with a figure of the distributions."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fadeformer.io.formatting import format_with_interval
from fadeformer.monitoring import drift
from fadeformer.monitoring.drift import DriftResult
from fadeformer.reporting import rendering
from fadeformer.reporting.plots.base import COLORS, panel_grid, wrap_name
from fadeformer.reporting.tables import Table

MAX_COLUMNS = 12  # columns in the figure
DPI = 110
RULE = (
    "A column counts as drifted if the Kolmogorov-Smirnov test is significant (p below {alpha:g} after correction for"
    " multiple testing) and the KS distance is at least {min_distance:g}, because with many images even negligible"
    " differences are significant."
)


def render_drift_page(
    result: DriftResult, reference: pd.DataFrame, new: pd.DataFrame, *, model: str, images: str, unreadable: int
) -> str:
    """Render the drift page.

    Args:
        result: the result of the drift check.
        reference: reference statistics, from `fadeformer.monitoring.reference.build_reference`.
        new: the same columns for the new images.
        model: name of the model as given by the user.
        images: path of the new images as given by the user.
        unreadable: number of images that could not be read.
    """
    png = BytesIO()
    plot_distributions(result, reference, new).savefig(png, dpi=DPI, format="png", metadata={"Software": None})
    drifted = ", ".join(result.drifted)
    auc = format_with_interval(result.auc, result.interval)
    feature_status = "drifted" if result.features_drifted else "no drift"
    return rendering.load_template("drift.html").render(
        title=f"Drift of {images}",
        good=not result.drifted,
        status="Drift." if result.drifted else "No drift.",
        outcome=(
            f"Drifted: {drifted}." if result.drifted else "Scores, features and pixels are distributed as those of val."
        ),
        unreadable=unreadable,
        comparison=_comparison_table(result, len(reference), model),
        rule=RULE.format(alpha=drift.ALPHA, min_distance=drift.MIN_KS_DISTANCE),
        columns=_column_table(result),
        features=(
            f"A logistic regression on the penultimate features separates new images from reference images with an AUC"
            f" of {auc} (0.5: not at all): {feature_status}. The features count as drifted if the AUC is at least"
            f" {drift.MIN_CLASSIFIER_AUC:g} and its confidence interval is above 0.5."
        ),
        png=base64.b64encode(png.getvalue()).decode(),
    )


def _comparison_table(result: DriftResult, num_reference: int, model: str) -> Table:
    reference = f"{num_reference:,} from val; their statistics are stored with the model"
    return Table(("", ""), [("Model", model), ("Reference images", reference), ("New images", f"{result.images:,}")])


def _column_table(result: DriftResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            column.name, f"{column.reference:.4g}", f"{column.new:.4g}", f"{column.distance:.3f}", f"{column.p:.2g}",
            "**drifted**" if column.drifted else "",
        )
        for column in result.columns
    ]  # fmt: skip
    return Table(("Column", "Median reference", "Median new", "KS distance", "p", "Status"), rows)


def plot_distributions(result: DriftResult, reference: pd.DataFrame, new: pd.DataFrame) -> Figure:
    """Plot the empirical distribution functions of the columns with the largest drift."""
    shown = result.columns[:MAX_COLUMNS]
    figure, plots = panel_grid(len(shown), panel_inches=2.1, single_panel_inches=4.2, share_x=False)
    for axes, column in zip(plots, shown, strict=True):
        for rows, color, style in ((reference, COLORS[0], "-"), (new, COLORS[1], "--")):
            values = np.sort(rows[column.name].dropna().to_numpy())
            axes.plot(values, np.arange(1, len(values) + 1) / len(values), color=color, linestyle=style)
        axes.set_title(wrap_name(column.name), fontsize=8, fontweight="bold" if column.drifted else "normal")
        axes.set(ylim=(0, 1))
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLORS[0], label="reference"),
        Line2D([], [], color=COLORS[1], linestyle="--", label="new"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supylabel("Share of the images", fontsize=10)
    return figure
