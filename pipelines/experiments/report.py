"""Tables 1 to 3 as Markdown, the first two from the predictions of the cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from fadeformer.evaluation import model_comparison
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.formatting import format_with_interval
from fadeformer.models.complexity import ModelCost
from pipelines.experiments.grid import Grid

PUBLISHED_COLUMNS = ("dataset", "resolution", "method", "auc", "accuracy", "balanced_accuracy", "comparable", "reason")
PredictionsByModel = Mapping[
    tuple[str, str], Mapping[int, Predictions]
]  # predictions on test by set and network, by seed
MIB = 2**20


def render_tables(
    grid: Grid, trained: PredictionsByModel, costs: Mapping[tuple[int, str], ModelCost], published: pd.DataFrame
) -> list[str]:
    """The three tables, each with its heading and what it shows.

    Args:
        grid: what was asked for.
        trained: what is finished.
        costs: of Table 3, by side of the images and network.
        published: rows of PUBLISHED; `dataset` is the name of a set in the grid, numbers are in [0, 1] or NaN.
    """
    return [_metrics_table(grid, trained, published), _differences_table(grid, trained), _costs_table(grid, costs)]


def _metrics_table(grid: Grid, trained: PredictionsByModel, published: pd.DataFrame) -> str:
    rows = []
    for name, images in grid.sets.items():
        kind: model_comparison.MetricName = images.accuracy
        for network, described in grid.networks.items():
            found = list(trained.get((name, network), {}).values())
            if found:
                cells = [_format_mean(model_comparison.mean_over_seeds(found, measure)) for measure in ("auc", kind)]
                rows.append([images.title, described.title, str(len(found)), *cells, ""])
        for row in published[published["dataset"] == name].to_dict("records"):
            note = "comparable" if row["comparable"] else f"not comparable: {row['reason']}"
            method = f"published: {row['method']}, {row['resolution']}"
            rows.append([images.title, method, "", _format_number(row["auc"]), _format_number(row[kind]), note])
    sets = [images.title for images in grid.sets.values() if images.accuracy == "balanced_accuracy"]
    second = f"Accuracy is balanced accuracy on: {'; '.join(sets)}. " if sets else ""
    return _render_section(
        "Table 1: AUC and accuracy on test",
        "Mean over seeds (95 % interval over other test images, the trainings as they are) ± standard deviation from"
        f" seed to seed. {second}The interval of an AUC is DeLong's for the mean of all trainings' AUCs, that of an"
        " accuracy Wilson's for as many images as would be as sure; patients and lesions count whole.",
        ["set", "network", "seeds", "AUC", "accuracy", "published numbers"], rows,
    )  # fmt: skip


def _differences_table(grid: Grid, trained: PredictionsByModel) -> str:
    rows = []
    for name, images in grid.sets.items():
        first = trained.get((name, grid.reference), {})
        kind: model_comparison.MetricName = images.accuracy
        for network, described in grid.networks.items():
            second = trained.get((name, network), {})
            seeds = first.keys() & second.keys()
            if network != grid.reference and seeds:
                title = f"{grid.networks[grid.reference].title} - {described.title}"
                cells = [
                    cell
                    for measure in ("auc", kind)
                    for cell in _format_difference(model_comparison.metric_difference(first, second, measure))
                ]
                rows.append([images.title, title, str(len(seeds)), *cells])
    return _render_section(
        "Table 2: paired differences on the same test images",
        "What one training of the first is ahead of one of the second, the mean over seeds (not of an ensemble), with"
        " its 95 % interval over other test images **and** other trainings: the variance over images (DeLong's, paired,"
        " for AUCs) and that from seed to seed are added, and Student's t has the degrees of freedom of the sum; with a"
        " single seed it is over test images alone. Standard errors of either kind stand beside it. In simulations such"
        " an interval holds the truth in 93 to 99 % with three seeds, with two in 89 to 98 %. No correction for the"
        f" {2 * len(rows)} differences is made: about one in twenty leaves zero out by chance.",
        [
            "set", "difference", "seeds", "AUC", "standard error: images, seeds", "accuracy",
            "standard error: images, seeds",
        ],
        rows,
    )  # fmt: skip


def _costs_table(grid: Grid, costs: Mapping[tuple[int, str], ModelCost]) -> str:
    rows = [
        [
            f"{side} x {side}", grid.networks[network].title, f"{cost.num_parameters / 1e6:.2f}",
            f"{cost.flops / 2e9:.4g}", f"{cost.peak_memory_bytes / MIB:.0f}", f"{cost.images_per_second:.0f}",
        ]
        for (side, network), cost in costs.items()
    ]  # fmt: skip
    one = next(iter(costs.values()), None)
    batches = (
        ""
        if one is None
        else f" MACs and memory are of {one.batch_size} images, speed of {one.timed_batch_size} at once."
    )
    return _render_section(
        "Table 3: what the networks cost",
        "Parameters in millions, multiply-adds (half of torch's FLOPs, attention counted), of the forward pass in"
        f" float32 with the classes of the first set of that size.{batches} Memory is what the pass takes beyond"
        " weights and input; speed is the median of interleaved rounds.",
        ["images", "network", "M parameters", "G MACs", "memory, MiB", "images/s"], rows,
    )  # fmt: skip


def _render_section(title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"## {title}", "", text, "", *lines])


def _format_mean(found: model_comparison.SeedMean | None) -> str:
    if found is None:
        return "undefined"
    spread = "" if found.std is None else f" ± {found.std:.4f}"
    return format_with_interval(found.value, found.interval) + spread


def _format_difference(found: model_comparison.MetricDifference | None) -> list[str]:
    if found is None:
        return ["undefined", ""]
    interval = "" if found.interval is None else f" ({found.interval[0]:+.4f} to {found.interval[1]:+.4f})"
    seeds = "one seed" if found.seed_se is None else f"{found.seed_se:.4f}"
    return [f"{found.value:+.4f}{interval}", f"{found.image_se:.4f}, {seeds}"]


def _format_number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"
