"""The page about drift, and its figure."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fadeformer.io.formatting import told
from fadeformer.monitoring import drift
from fadeformer.monitoring.drift import Drift
from fadeformer.reporting import rendering
from fadeformer.reporting.plots.base import COLOURS, panels, short
from fadeformer.reporting.tables import Table

SHOWN = 12  # columns in the figure
DPI = 110
RULE = (
    "A column drifts where the Kolmogorov-Smirnov test says so (p below {alpha:g}, corrected for all columns) and the"
    " largest distance of the two distribution functions is at least {large:g}: among many images the smallest"
    " difference is beyond chance."
)


def page(found: Drift, known: pd.DataFrame, new: pd.DataFrame, *, model: str, images: str, unreadable: int) -> str:
    """Writes the page.

    Args:
        found: what has moved.
        known: of `fadeformer.monitoring.reference.table`.
        new: the same columns of the new images.
        model: how it was named.
        images: likewise.
        unreadable: images that were left out.
    """
    png = BytesIO()
    distributions(found, known, new).savefig(png, dpi=DPI, format="png", metadata={"Software": None})
    what = ", ".join(found.found)
    area = told(found.auc, found.interval)
    apart = "can be told apart from" if found.features_drifted else "are like"
    return rendering.template("drift.html").render(
        title=f"Drift of {images}",
        good=not found.found,
        verdict="Drift." if found.found else "No drift.",
        outcome=(f"These have moved: {what}." if found.found else "Scores, features and pixels are like those of val."),
        unreadable=unreadable,
        compared=_compared(found, len(known), model),
        rule=RULE.format(alpha=drift.ALPHA, large=drift.LARGE),
        columns=_columns(found),
        features=(
            f"A logistic regression tells new images from known ones by what the classifier sees with an AUC of {area}"
            f" (0.5: not at all). The new images {apart} the known ones: they count as others from"
            f" {drift.TOLD_APART:g}, where the interval lies above 0.5."
        ),
        png=base64.b64encode(png.getvalue()).decode(),
    )


def _compared(found: Drift, known: int, model: str) -> Table:
    of_val = f"{known:,} of val, whose numbers are kept with the model"
    return Table(("", ""), [("Model", model), ("Known images", of_val), ("New images", f"{found.images:,}")])


def _columns(found: Drift) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            c.name, f"{c.known:.4g}", f"{c.new:.4g}", f"{c.distance:.3f}", f"{c.p:.2g}",
            "**drifted**" if c.drifted else "",
        )
        for c in found.columns
    ]  # fmt: skip
    return Table(("Column", "Median known", "Median new", "Distance", "p", "Verdict"), rows)


def distributions(found: Drift, known: pd.DataFrame, new: pd.DataFrame) -> Figure:
    """Distribution functions of the columns that moved furthest; arguments are those of `page`."""
    shown = found.columns[:SHOWN]
    figure, plots = panels(len(shown), side=2.1, alone=4.2, share_x=False)
    for axes, column in zip(plots, shown, strict=True):
        for rows, colour, style in ((known, COLOURS[0], "-"), (new, COLOURS[1], "--")):
            values = np.sort(rows[column.name].dropna().to_numpy())
            axes.plot(values, np.arange(1, len(values) + 1) / len(values), color=colour, linestyle=style)
        axes.set_title(short(column.name), fontsize=8, fontweight="bold" if column.drifted else "normal")
        axes.set(ylim=(0, 1))
        axes.locator_params(axis="x", nbins=3)
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLOURS[0], label="known"),
        Line2D([], [], color=COLOURS[1], linestyle="--", label="new"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supylabel("Share of the images", fontsize=10)
    return figure
