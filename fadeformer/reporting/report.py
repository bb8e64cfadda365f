"""The report: one page that needs nothing but itself, with the verdict first and how to repeat it last."""

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
from fadeformer.reporting import rendering, tables
from fadeformer.reporting.model_card import INTENDED_USE
from fadeformer.reporting.tables import ReportInputs

GOOD, BAD, PLAIN = "good", "bad", "plain"
TRAINING_FIGURES = ("training_curves",)
FIGURES = {
    "training_curves": ("Training", "Loss, accuracy and AUC by epoch, on train and validation; marked: the one kept."),
    "confusion_matrix": ("Confusion matrix", "How many images of each class were called what, on test."),
    "roc_curves": ("ROC curves", "Sensitivity against 1 - specificity of each class, with the interval as a band."),
    "pr_curves": ("Precision-recall curves", "Precision against sensitivity of each class; dotted: its prevalence."),
    "reliability": ("Reliability", "Share that came true against the score, before and after calibration."),
    "score_histograms": ("Scores", "Scores of the images with and without each class."),
    "decision_curves": ("Decision curves", "Net benefit of the model by threshold probability, beside all and none."),
    "auc_forest": ("AUC of each class", "AUC of each class with its interval and number of images, the best first."),
    "subgroup_forest": ("Subgroups", "AUC and balanced accuracy of each subgroup with intervals, beside all images."),
    "embedding": ("Map of the features", "Where test images lie by what the classifier sees of them, by label."),
}  # fmt: skip
MAX_PAIRED_CLASSES = 5  # classes up to which two figures beside each other can be read
GALLERY_CAPTION = (
    "Most confident mistakes", "The test images that were called wrongly with the highest score, with what was called."
)  # fmt: skip


class _ParamsRepresenter(RoundTripRepresenter):
    """YAML as params.yaml has it: null where there is nothing, lists in one line."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_list(self, data: list[Any]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_ParamsRepresenter.add_representer(type(None), _ParamsRepresenter.represent_none)
_ParamsRepresenter.add_representer(list, _ParamsRepresenter.represent_list)


@dataclass(frozen=True)
class EmbeddedFigure:
    """A picture in the page: an anchor, title, caption, and the PNG as base64."""

    name: str
    title: str
    caption: str
    png: str


def render_report(
    of: ReportInputs,
    uncalibrated: Mapping[str, Any],
    published: pd.DataFrame,
    explained: Mapping[str, Any],
    figures: Mapping[str, bytes],
    run_id: str,
) -> str:
    """Writes the page.

    Args:
        of: what the model card is made of too.
        uncalibrated: of `fadeformer.evaluation.summary.summarize`, of test, by the scores before calibration.
        published: of `fadeformer.evaluation.published.comparison_table`.
        explained: what `reports/explanations.json` holds: `sentences`, and `pointing` where boxes are known.
        figures: PNG by name; that of the subgroups may be missing.
        run_id: MLflow's, of the training.
    """
    drawn = {
        name: EmbeddedFigure(name, *FIGURES.get(name, GALLERY_CAPTION), base64.b64encode(png).decode())
        for name, png in figures.items()
    }
    stream, yaml = StringIO(), YAML()
    yaml.Representer = _ParamsRepresenter
    yaml.dump(of.model_metadata["params"], stream)
    verdict, worse = tables.subgroup_findings(of) if of.subgroups else ("", [])
    return rendering.load_template("report.html").render(
        title=f"{of.model_metadata['model']['backbone']} on {of.meta.dataset['name']}",
        note=of.meta.dataset["note"],
        intended=INTENDED_USE,
        verdicts=key_findings(of, uncalibrated, published),
        data=tables.data(of),
        model=tables.model(of),
        numbers=tables.metrics(of),
        classes=tables.per_class(of),
        operating=tables.operating_points(of),
        subgroups=tables.subgroups(of) if of.subgroups else None,
        subgroups_verdict=verdict,
        worse=worse,
        comparable=tables.published(published, comparable=True),
        not_comparable=tables.published(published, comparable=False),
        limits=tables.limitations(of),
        explained=explained["sentences"],
        pointing=tables.pointing_game(explained["pointing"]) if explained["pointing"] else None,
        training=[drawn[name] for name in TRAINING_FIGURES],
        undivided=tables.NO_SUBGROUPS,
        many=len(of.meta.classes) > MAX_PAIRED_CLASSES,
        figures=[drawn[name] for name in FIGURES if name not in TRAINING_FIGURES and name in drawn],
        gallery=drawn["gallery"],
        images=of.summary["test"]["images"],
        split=of.meta.split,
        params=stream.getvalue(),
        run_id=run_id,
    )


def key_findings(of: ReportInputs, uncalibrated: Mapping[str, Any], published: pd.DataFrame) -> list[tuple[str, str]]:
    """What a reader should know first: sentences, each `good`, `bad` or `plain`. Arguments are those of `report`."""
    meta, test, intervals, confidence = of.meta, of.summary["test"], of.intervals, of.operating_points["confidence"]
    overall, bounds = test["overall"], intervals["overall"]
    area = format_with_interval(overall["auc"], bounds["auc"])
    balanced = format_with_interval(overall["balanced_accuracy"], bounds["balanced_accuracy"])
    groups = intervals["groups"]
    of_groups = f" of {groups:,} patients or lesions" if groups < test["images"] else ""
    chance = bounds["auc"] is None or bounds["auc"][0] <= 0.5
    found = [
        (
            BAD if chance else PLAIN,
            f"AUC {area}, balanced accuracy {balanced} on {test['images']:,} test images{of_groups}"
            f" ({100 * confidence:g} % intervals)" + ("; chance alone is not ruled out." if chance else "."),
        )
    ]
    before, after = (part["overall"]["calibration_error"] for part in (uncalibrated, test))
    if before is not None and after is not None:
        changed = f"calibration error {after:.3f}, {before:.3f} before calibration on validation."
        found.append((GOOD if after <= before else PLAIN, changed[0].upper() + changed[1:]))
    if of.subgroups:
        verdict, worse = tables.subgroup_findings(of)
        compared = any(one["comparisons"] for values in of.subgroups.values() for one in values.values())
        told_of = f"{len(worse)} measures of subgroups are worse than the whole beyond chance." if worse else verdict
        found.append((BAD if worse else GOOD if compared else PLAIN, told_of))
    else:
        found.append((PLAIN, tables.NO_SUBGROUPS))
    found.append(_compare_with_published(overall["auc"], bounds["auc"], published))
    if test["not_evaluated"]:
        found.append((BAD, f"Not evaluated, for want of images with or without: {', '.join(test['not_evaluated'])}."))
    if meta.cross_split_duplicates:
        found.append((BAD, f"{meta.cross_split_duplicates} images stand in two splits, so the numbers may flatter."))
    return found


def _compare_with_published(
    area: float | None, bound: tuple[float, float] | None, published: pd.DataFrame
) -> tuple[str, str]:
    rows = published[published["comparable"] & published["auc"].notna()]
    if published.empty:
        return PLAIN, "No scores are published of this data set."
    if rows.empty or area is None or bound is None:
        return PLAIN, f"None of the {len(published)} published scores known of this data set may be compared with ours."
    low, high = bound
    above, below = int((rows["auc"] > high).sum()), int((rows["auc"] < low).sum())
    return (
        BAD if above == len(rows) else GOOD if below > above else PLAIN,
        f"Published AUCs that may be compared: {below} below the interval of ours, {above} above it and"
        f" {len(rows) - below - above} in it.",
    )
