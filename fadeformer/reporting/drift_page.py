"""HTML page of a drift check, with a figure of the distributions."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fadeformer.monitoring import drift, group_tests
from fadeformer.monitoring.drift import DriftResult, FeatureDrift
from fadeformer.monitoring.reference import IMAGES_PER_GROUP
from fadeformer.reporting import rendering
from fadeformer.reporting.plots.base import COLORS, panel_grid, wrap_name
from fadeformer.reporting.tables import Table

MAX_COLUMNS = 12  # columns in the figure
DPI = 110
RULE = (
    "A column counts as drifted if its Kolmogorov-Smirnov distance is significant (p below {alpha:g}, corrected for all"
    " comparisons) and at least {min_distance:g}, because with many images even negligible differences are significant."
    " The p-values are from {permutations:,} permutations of whole groups (patients, lesions or slides), because images"
    " of a group are correlated; each group counts the same."
)
UNKNOWN_GROUPS = (
    "The groups (patients, lesions or slides) of the new images are unknown: each image was counted as its own group."
    " The reference has {images_per_group:.1f} images per group. Give the groups with --groups FILE, or --independent"
    " if each image is of another patient."
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
    return rendering.load_template("drift.html").render(
        title=f"Drift of {images}",
        good=_status(result) == "No drift.",
        status=_status(result),
        outcome=_outcome(result),
        warning="" if result.has_groups else UNKNOWN_GROUPS.format(images_per_group=reference.attrs[IMAGES_PER_GROUP]),
        not_assessed=result.not_assessed if result.drifted else [],
        unreadable=unreadable,
        comparison=_comparison_table(result, model),
        rule=RULE.format(
            alpha=drift.ALPHA, min_distance=drift.MIN_KS_DISTANCE, permutations=group_tests.NUM_PERMUTATIONS
        ),
        columns=_column_table(result),
        features=_describe_features(result.features),
        png=base64.b64encode(png.getvalue()).decode(),
    )


def _status(result: DriftResult) -> str:
    if result.drifted:
        return "Drift."
    return "Not assessed." if result.not_assessed else "No drift."


def _outcome(result: DriftResult) -> str:
    if result.drifted:
        return f"Drifted: {', '.join(result.drifted)}."
    if not result.not_assessed:
        return "Pixels are distributed as those of train and val, scores and features as those of val."
    unchanged = f" No drift of {', '.join(result.unchanged)}." if result.unchanged else ""
    return f"{'; '.join(result.not_assessed)}.{unchanged}"


def _describe_features(features: FeatureDrift) -> str:
    if features.auc is None or features.p is None:
        return "The penultimate features were not assessed."
    return (
        f"A linear classifier on the penultimate features separates new images from reference images with a"
        f" cross-validated AUC of {features.auc:.2f} (0.5: not at all; p {features.p:.2g}): {features.status}. The"
        f" features count as drifted if the AUC is at least {drift.MIN_CLASSIFIER_AUC:g} and p, from the same"
        f" permutations, is below {drift.ALPHA:g}."
    )


def _comparison_table(result: DriftResult, model: str) -> Table:
    families = [
        (f"Reference for {family.name}", f"{family.images:,} images of {family.groups:,} groups")
        for family in result.families
    ]
    new = f"{result.images:,} images of {f'{result.groups:,}' if result.has_groups else 'unknown'} groups"
    return Table(("", ""), [("Model", model), *families, ("New", new)])


def _column_table(result: DriftResult) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            column.name, f"{column.reference:.4g}", f"{column.new:.4g}",
            "" if column.distance is None else f"{column.distance:.3f}", "" if column.p is None else f"{column.p:.2g}",
            f"**{column.status}**" if column.status == "drifted" else column.status,
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
        axes.set_title(
            wrap_name(column.name), fontsize=8, fontweight="bold" if column.status == "drifted" else "normal"
        )
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
