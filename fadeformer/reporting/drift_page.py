"""The page about drift, and its figure."""

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
    "A column drifts where the Kolmogorov-Smirnov test says so (p below {alpha:g}, corrected for all columns) and the"
    " largest distance of the two distribution functions is at least {large:g}: among many images the smallest"
    " difference is beyond chance."
)


def render_drift_page(
    found: DriftResult, known: pd.DataFrame, new: pd.DataFrame, *, model: str, images: str, unreadable: int
) -> str:
    """Writes the page.

    Args:
        found: what has moved.
        known: of `fadeformer.monitoring.reference.build_reference`.
        new: the same columns of the new images.
        model: how it was named.
        images: likewise.
        unreadable: images that were left out.
    """
    png = BytesIO()
    plot_distributions(found, known, new).savefig(png, dpi=DPI, format="png", metadata={"Software": None})
    what = ", ".join(found.drifted)
    area = format_with_interval(found.auc, found.interval)
    apart = "can be told apart from" if found.features_drifted else "are like"
    return rendering.load_template("drift.html").render(
        title=f"Drift of {images}",
        good=not found.drifted,
        verdict="Drift." if found.drifted else "No drift.",
        outcome=(
            f"These have moved: {what}." if found.drifted else "Scores, features and pixels are like those of val."
        ),
        unreadable=unreadable,
        compared=_comparison_table(found, len(known), model),
        rule=RULE.format(alpha=drift.ALPHA, large=drift.MIN_KS_DISTANCE),
        columns=_column_table(found),
        features=(
            f"A logistic regression tells new images from known ones by what the classifier sees with an AUC of {area}"
            f" (0.5: not at all). The new images {apart} the known ones: they count as others from"
            f" {drift.MIN_CLASSIFIER_AUC:g}, where the interval lies above 0.5."
        ),
        png=base64.b64encode(png.getvalue()).decode(),
    )


def _comparison_table(found: DriftResult, known: int, model: str) -> Table:
    of_val = f"{known:,} of val, whose numbers are kept with the model"
    return Table(("", ""), [("Model", model), ("Known images", of_val), ("New images", f"{found.images:,}")])


def _column_table(found: DriftResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            c.name, f"{c.reference:.4g}", f"{c.new:.4g}", f"{c.distance:.3f}", f"{c.p:.2g}",
            "**drifted**" if c.drifted else "",
        )
        for c in found.columns
    ]  # fmt: skip
    return Table(("Column", "Median known", "Median new", "Distance", "p", "Verdict"), rows)


def plot_distributions(found: DriftResult, known: pd.DataFrame, new: pd.DataFrame) -> Figure:
    """Distribution functions of the columns that moved furthest; arguments are those of `page`."""
    shown = found.columns[:MAX_COLUMNS]
    figure, plots = panel_grid(len(shown), panel_inches=2.1, single_panel_inches=4.2, share_x=False)
    for axes, column in zip(plots, shown, strict=True):
        for rows, colour, style in ((known, COLORS[0], "-"), (new, COLORS[1], "--")):
            values = np.sort(rows[column.name].dropna().to_numpy())
            axes.plot(values, np.arange(1, len(values) + 1) / len(values), color=colour, linestyle=style)
        axes.set_title(wrap_name(column.name), fontsize=8, fontweight="bold" if column.drifted else "normal")
        axes.set(ylim=(0, 1))
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLORS[0], label="known"),
        Line2D([], [], color=COLORS[1], linestyle="--", label="new"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supylabel("Share of the images", fontsize=10)
    return figure
