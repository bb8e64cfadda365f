"""Tables 1 to 3 of a grid as Markdown; the first two are computed from the predictions only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from fadeformer.evaluation import model_comparison
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.formatting import format_with_interval
from fadeformer.models.complexity import ModelCost
from pipelines.experiments.grid import Grid

PUBLISHED_COLUMNS = ("dataset", "resolution", "method", "auc", "accuracy", "balanced_accuracy", "comparable", "reason")
# Test predictions by (dataset, model) and by seed.
PredictionsByModel = Mapping[tuple[str, str], Mapping[int, Predictions]]
MIB = 2**20


def render_tables(
    grid: Grid, trained: PredictionsByModel, costs: Mapping[tuple[int, str], ModelCost], published: pd.DataFrame
) -> list[str]:
    """Render the three tables as Markdown, each with its heading and explanation.

    Args:
        grid: Definition of the grid.
        trained: Test predictions of the finished cells.
        costs: Costs for Table 3, by side of the images and model.
        published: Rows with `PUBLISHED_COLUMNS`; `dataset` is a key of `grid.datasets`, scores are in [0, 1] or NaN.
    """
    return [_metrics_table(grid, trained, published), _differences_table(grid, trained), _costs_table(grid, costs)]


def _metrics_table(grid: Grid, trained: PredictionsByModel, published: pd.DataFrame) -> str:
    rows = []
    for name, dataset in grid.datasets.items():
        accuracy: model_comparison.MetricName = dataset.accuracy
        for key, model in grid.models.items():
            by_seed = list(trained.get((name, key), {}).values())
            if by_seed:
                means = [model_comparison.mean_over_seeds(by_seed, metric) for metric in ("auc", accuracy)]
                rows.append([dataset.title, model.title, str(len(by_seed)), *map(_format_mean, means), ""])
        for row in published[published["dataset"] == name].to_dict("records"):
            note = "comparable" if row["comparable"] else f"not comparable: {row['reason']}"
            method = f"published: {row['method']}, {row['resolution']}"
            scores = [_format_number(row["auc"]), _format_number(row[accuracy])]
            rows.append([dataset.title, method, "", *scores, note])
    balanced = [dataset.title for dataset in grid.datasets.values() if dataset.accuracy == "balanced_accuracy"]
    balanced_note = f"Accuracy is balanced accuracy on: {'; '.join(balanced)}. " if balanced else ""
    return _render_section(
        "Table 1: AUC and accuracy on test",
        "Mean over seeds (95 % confidence interval for new test images and the given trained models) ± standard"
        f" deviation between seeds. {balanced_note}Intervals of AUCs are DeLong's, for the mean AUC of all trained"
        " models; those of accuracies are Wilson's, at the effective sample size. Images of one patient or lesion count"
        " as one cluster.",
        ["dataset", "model", "seeds", "AUC", "accuracy", "published numbers"], rows,
    )  # fmt: skip


def _differences_table(grid: Grid, trained: PredictionsByModel) -> str:
    rows = []
    for name, dataset in grid.datasets.items():
        first = trained.get((name, grid.reference), {})
        accuracy: model_comparison.MetricName = dataset.accuracy
        for key, model in grid.models.items():
            second = trained.get((name, key), {})
            seeds = first.keys() & second.keys()
            if key != grid.reference and seeds:
                title = f"{grid.models[grid.reference].title} - {model.title}"
                cells = [
                    cell
                    for metric in ("auc", accuracy)
                    for cell in _format_difference(model_comparison.metric_difference(first, second, metric))
                ]
                rows.append([dataset.title, title, str(len(seeds)), *cells])
    return _render_section(
        "Table 2: paired differences on the same test images",
        "Difference between one trained model of the first kind and one of the second, mean over seeds (no ensemble),"
        " with a 95 % confidence interval for new test images **and** new training runs: the variance between images"
        " (for AUCs DeLong's, paired) and the variance between seeds are added, and Student's t uses the degrees of"
        " freedom of the sum. With a single seed the interval is for new test images only. The standard errors of both"
        " parts are in the next column. In simulations the coverage was 93 to 99 % with three seeds and 89 to 98 % with"
        f" two. There is no correction for the {2 * len(rows)} comparisons: about one interval in twenty excludes zero"
        " by chance.",
        [
            "dataset", "difference", "seeds", "AUC", "standard error: images, seeds", "accuracy",
            "standard error: images, seeds",
        ],
        rows,
    )  # fmt: skip


def _costs_table(grid: Grid, costs: Mapping[tuple[int, str], ModelCost]) -> str:
    rows = [
        [
            f"{side} x {side}", grid.models[model].title, f"{cost.num_parameters / 1e6:.2f}",
            f"{cost.flops / 2e9:.4g}", f"{cost.peak_memory_bytes / MIB:.0f}", f"{cost.images_per_second:.0f}",
        ]
        for (side, model), cost in costs.items()
    ]  # fmt: skip
    batches = ""
    for cost in list(costs.values())[:1]:  # all costs have the same batch sizes
        batches = (
            f" MACs and memory are for batches of {cost.batch_size} images, throughput for {cost.timed_batch_size}."
        )
    return _render_section(
        "Table 3: computational cost of the models",
        "Parameters in millions and multiply-adds (half of torch's FLOPs, attention included) of the forward pass in"
        f" float32, with the number of classes of the first dataset of that image size.{batches} Memory is the peak in"
        " addition to weights and input; throughput is the median of interleaved rounds.",
        ["images", "model", "M parameters", "G MACs", "memory, MiB", "images/s"], rows,
    )  # fmt: skip


def _render_section(title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"## {title}", "", text, "", *lines])


def _format_mean(mean: model_comparison.SeedMean | None) -> str:
    if mean is None:
        return "undefined"
    std = "" if mean.std is None else f" ± {mean.std:.4f}"
    return format_with_interval(mean.value, mean.interval) + std


def _format_difference(difference: model_comparison.MetricDifference | None) -> list[str]:
    if difference is None:
        return ["undefined", ""]
    bounds = difference.interval
    interval = "" if bounds is None else f" ({bounds[0]:+.4f} to {bounds[1]:+.4f})"
    seed_se = "one seed" if difference.seed_se is None else f"{difference.seed_se:.4f}"
    return [f"{difference.value:+.4f}{interval}", f"{difference.image_se:.4f}, {seed_se}"]


def _format_number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"
