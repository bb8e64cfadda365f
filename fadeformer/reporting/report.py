"""HTML report: a self-contained page from the key findings to instructions for reproducing the run."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO
from ruamel.yaml.nodes import ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

from fadeformer.io.formatting import format_with_interval
from fadeformer.reporting import rendering, subgroup_tables, tables
from fadeformer.reporting.model_card import INTENDED_USE
from fadeformer.reporting.tables import ReportInputs

GOOD, BAD, PLAIN = "good", "bad", "plain"
TRAINING_FIGURES = ("training_curves",)
FIGURES = {
    "training_curves": ("Training", "Train and validation loss, accuracy and AUC by epoch, with the selected epoch."),
    "confusion_matrix": ("Confusion matrix", "Number of test images by true and predicted class."),
    "roc_curves": ("ROC curves", "Sensitivity against 1 - specificity of each class, with a confidence band."),
    "pr_curves": ("Precision-recall curves", "Precision against recall of each class; dotted: its prevalence."),
    "reliability": ("Reliability diagram", "Observed frequency against the score, before and after calibration."),
    "score_histograms": ("Scores", "Scores of the images with and without each class."),
    "decision_curves": ("Decision curves", "Net benefit by threshold probability: model, treat all, treat none."),
    "auc_forest": ("AUC by class", "AUC of each class with confidence interval and number of images, best first."),
    "subgroup_forest": ("Subgroups", "AUC and balanced accuracy of each subgroup with intervals, and of all images."),
    "embedding": ("Feature embedding", "PCA of the penultimate features of the test images, by label."),
}  # fmt: skip
MAX_PAIRED_CLASSES = 5  # with more classes, figures are too wide for two columns
GALLERY_CAPTION = (
    "Most confident errors", "The misclassified test images with the highest scores, and their predicted classes."
)  # fmt: skip


class _ParamsRepresenter(RoundTripRepresenter):
    """YAML in the style of params.yaml: explicit null, lists on one line."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_list(self, data: list[Any]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_ParamsRepresenter.add_representer(type(None), _ParamsRepresenter.represent_none)
_ParamsRepresenter.add_representer(list, _ParamsRepresenter.represent_list)


@dataclass(frozen=True)
class EmbeddedFigure:
    """Figure in the page: anchor, title, caption and the PNG in base64."""

    name: str
    title: str
    caption: str
    png: str


def render_report(
    results: ReportInputs,
    uncalibrated: Mapping[str, Any],
    published: pd.DataFrame,
    explanations: Mapping[str, Any],
    figures: Mapping[str, bytes],
    run_id: str,
) -> str:
    """Render the HTML report.

    Args:
        results: the results, as for the model card.
        uncalibrated: test metrics of the uncalibrated scores, from `fadeformer.evaluation.summary.summarize`.
        published: published scores, from `fadeformer.evaluation.published.comparison_table`.
        explanations: content of `reports/explanations.json`: `sentences`, and `pointing` or None.
        figures: PNG bytes by figure name; `subgroup_forest` is optional.
        run_id: MLflow run id of the training.
    """
    embedded = {
        name: EmbeddedFigure(name, *FIGURES.get(name, GALLERY_CAPTION), base64.b64encode(png).decode())
        for name, png in figures.items()
    }
    stream, yaml = StringIO(), YAML()
    yaml.Representer = _ParamsRepresenter
    yaml.dump(results.model_metadata["params"], stream)
    subgroup_summary, underperforming = subgroup_tables.describe_findings(results) if results.subgroups else ("", [])
    return rendering.load_template("report.html").render(
        title=f"{results.model_metadata['model']['backbone']} on {results.meta.dataset['name']}",
        note=results.meta.dataset["note"],
        intended=INTENDED_USE,
        findings=key_findings(results, uncalibrated, published),
        data=tables.data(results),
        model=tables.model(results),
        metrics=tables.metrics(results),
        per_class=tables.per_class(results),
        class_calibration=tables.class_calibration(results),
        operating_points=tables.operating_points(results),
        predictive_values_note=tables.PREDICTIVE_VALUES_NOTE,
        predictive_values=tables.predictive_values(results),
        subgroups=subgroup_tables.metrics(results) if results.subgroups else None,
        subgroup_summary=subgroup_summary,
        subgroup_comparisons=subgroup_tables.comparisons(results),
        underperforming=underperforming,
        comparable=tables.published(published, comparable=True),
        not_comparable=tables.published(published, comparable=False),
        limitations=tables.limitations(results),
        explanations=explanations["sentences"],
        pointing=tables.pointing_game(explanations["pointing"]) if explanations["pointing"] else None,
        training=[embedded[name] for name in TRAINING_FIGURES],
        no_subgroups=subgroup_tables.NO_SUBGROUPS,
        has_many_classes=len(results.meta.classes) > MAX_PAIRED_CLASSES,
        figures=[embedded[name] for name in FIGURES if name not in TRAINING_FIGURES and name in embedded],
        gallery=embedded["gallery"],
        images=results.summary["test"]["images"],
        split=results.meta.split,
        params=stream.getvalue(),
        run_id=run_id,
    )


def key_findings(
    results: ReportInputs, uncalibrated: Mapping[str, Any], published: pd.DataFrame
) -> list[tuple[str, str]]:
    """Return the key findings as (`good`, `bad` or `plain`, sentence); arguments as for `render_report`."""
    meta, test, intervals = results.meta, results.summary["test"], results.intervals
    confidence = results.operating_points["confidence"]
    overall, bounds = test["overall"], intervals["overall"]
    auc = format_with_interval(overall["auc"], bounds["auc"])
    balanced_accuracy = format_with_interval(overall["balanced_accuracy"], bounds["balanced_accuracy"])
    groups = intervals["groups"]
    group_text = f" of {groups:,} patients or lesions" if groups < test["images"] else ""
    is_chance = bounds["auc"] is None or bounds["auc"][0] <= 0.5
    findings = [
        (
            BAD if is_chance else PLAIN,
            f"AUC {auc}, balanced accuracy {balanced_accuracy} on {test['images']:,} test images{group_text}"
            f" ({100 * confidence:g} % intervals)" + ("; not significantly better than chance." if is_chance else "."),
        )
    ]
    before, after = (summary["overall"]["calibration_error"] for summary in (uncalibrated, test))
    if before is not None and after is not None:
        sentence = f"Calibration error {after:.3f}, {before:.3f} before calibration on validation."
        if not meta.task.multi_label and len(meta.classes) > 2:  # of findings and two classes it is the same number
            error = overall["class_calibration_error"]
            sentence = f"{sentence[:-1]}; of the scores of all classes {error:.3f} on average."
        findings.append((GOOD if after <= before else PLAIN, sentence))
    if results.subgroups:
        sentence, worse = subgroup_tables.describe_findings(results)
        is_compared = any(group["comparisons"] for values in results.subgroups.values() for group in values.values())
        if worse:
            sentence = f"{len(worse)} subgroup metrics are significantly worse than on the other images."
        findings.append((BAD if worse else GOOD if is_compared else PLAIN, sentence))
    else:
        findings.append((PLAIN, subgroup_tables.NO_SUBGROUPS))
    findings.append(_compare_with_published(overall["auc"], bounds["auc"], published))
    if test["not_evaluated"]:
        names = ", ".join(test["not_evaluated"])
        findings.append((BAD, f"Left out of means, fewer than two patients with or without it: {names}."))
    if count := meta.cross_split_duplicates:
        findings.append((BAD, f"{count} images are in two splits, so the metrics may be optimistic."))
    findings += [(BAD, f"Data validation warned of {warning}.") for warning in results.data_warnings]
    return findings


def _compare_with_published(
    auc: float | None, interval: tuple[float, float] | None, published: pd.DataFrame
) -> tuple[str, str]:
    rows = published[published["comparable"] & published["auc"].notna()]
    if published.empty:
        return PLAIN, "There are no published scores for this data set."
    if rows.empty or auc is None or interval is None:
        return PLAIN, f"None of the {len(published)} published scores for this data set is comparable with this model."
    low, high = interval
    above, below = int((rows["auc"] > high).sum()), int((rows["auc"] < low).sum())
    return (
        BAD if above == len(rows) else GOOD if below > above else PLAIN,
        f"Comparable published AUCs: {below} below this model's confidence interval, {above} above it and"
        f" {len(rows) - below - above} inside it.",
    )
