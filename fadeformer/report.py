"""The report: one page that needs nothing but itself, with the verdict first and how to repeat it last."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from fadeformer import evidence_tables
from fadeformer.arrays import Meta
from fadeformer.card import INTENDED
from fadeformer.summary import told

GOOD, BAD, PLAIN = "good", "bad", "plain"
TRAINING = ("training_curves",)
FIGURES = {
    "training_curves": ("Training", "Loss, accuracy and AUC by epoch, on train and validation; marked: the one kept."),
    "confusion_matrix": ("Confusion matrix", "How many images of each class were called what, on test."),
    "roc_curves": ("ROC curves", "Sensitivity against 1 - specificity of each class, with the interval as a band."),
    "pr_curves": ("Precision-recall curves", "Precision against sensitivity of each class; dotted: its prevalence."),
    "auc_forest": ("AUC of each class", "AUC of each class with its interval and number of images, the best first."),
    "reliability": ("Reliability", "Share that came true against the score, before and after calibration."),
    "score_histograms": ("Scores", "Scores of the images with and without each class."),
    "decision_curves": ("Decision curves", "Net benefit of the model by threshold probability, beside all and none."),
    "subgroup_forest": ("Subgroups", "AUC and balanced accuracy of each subgroup with intervals, beside all images."),
    "embedding": ("Map of the features", "Where test images lie by what the classifier sees of them, by label."),
}  # fmt: skip
GALLERY = (
    "Most confident mistakes", "The test images that were called wrongly with the highest score, with what was called."
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A picture in the page: an anchor, title, caption, and the PNG as base64."""

    name: str
    title: str
    caption: str
    png: str


def report(
    meta: Meta,
    described: Mapping[str, Any],
    summary: Mapping[str, Any],
    uncalibrated: Mapping[str, Any],
    intervals: Mapping[str, Any],
    operating: Mapping[str, Any],
    subgroups: Mapping[str, Any],
    published: pd.DataFrame,
    explained: Sequence[str],
    figures: Mapping[str, bytes],
    run_id: str,
) -> str:
    """Writes the page.

    Args:
        meta: of the arrays the model was trained and judged on.
        described: what `models/model.json` holds.
        summary: of `fadeformer.summary.summarise`, by split.
        uncalibrated: likewise of test, by the scores before calibration.
        intervals: of `fadeformer.summary.intervals`, of test.
        operating: what `reports/operating_points.json` holds.
        subgroups: of `fadeformer.subgroups.compare`, of test.
        published: of `fadeformer.published.beside`.
        explained: what the maps of the gallery are and how far they can be trusted, sentences.
        figures: PNG by name.
        run_id: MLflow's, of the training.
    """
    pages = Environment(loader=PackageLoader("fadeformer", "."), autoescape=True, undefined=StrictUndefined)
    drawn = {
        name: Figure(name, *FIGURES.get(name, GALLERY), base64.b64encode(png).decode()) for name, png in figures.items()
    }
    stream = StringIO()
    YAML().dump(described["params"], stream)
    test = summary["test"]
    verdict, worse = evidence_tables.subgroups_verdict(subgroups) if subgroups else ("", [])
    return pages.get_template("report.html").render(
        title=f"{described['model']['backbone']} on {meta.dataset['name']}",
        note=meta.dataset["note"],
        intended=INTENDED,
        verdicts=verdicts(meta, test, uncalibrated, intervals, operating["confidence"], subgroups, published),
        data=evidence_tables.data(meta),
        model=evidence_tables.model(meta, described),
        numbers=evidence_tables.numbers(summary, intervals, operating["confidence"]),
        classes=evidence_tables.classes(meta, test, intervals),
        operating=evidence_tables.operating_points(operating),
        subgroups=evidence_tables.subgroups(subgroups) if subgroups else None,
        subgroups_verdict=verdict,
        worse=worse,
        comparable=evidence_tables.published(published, comparable=True),
        not_comparable=evidence_tables.published(published, comparable=False),
        limits=evidence_tables.limits(meta, test, intervals["groups"]),
        explained=explained,
        training=[drawn[name] for name in TRAINING],
        figures=[drawn[name] for name in FIGURES if name not in TRAINING],
        gallery=drawn["gallery"],
        images=test["images"],
        split=meta.split,
        params=stream.getvalue(),
        run_id=run_id,
    )


def verdicts(
    meta: Meta,
    test: Mapping[str, Any],
    uncalibrated: Mapping[str, Any],
    intervals: Mapping[str, Any],
    confidence: float,
    subgroups: Mapping[str, Any],
    published: pd.DataFrame,
) -> list[tuple[str, str]]:
    """What a reader should know first: sentences, each `good`, `bad` or `plain`. Arguments are those of `report`."""
    overall, bounds = test["overall"], intervals["overall"]
    area = told(overall["auc"], bounds["auc"])
    balanced = told(overall["balanced_accuracy"], bounds["balanced_accuracy"])
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
    if subgroups:
        verdict, worse = evidence_tables.subgroups_verdict(subgroups)
        compared = any(of["compared"] for values in subgroups.values() for of in values.values())
        told_of = f"{len(worse)} measures of subgroups are worse than the whole beyond chance." if worse else verdict
        found.append((BAD if worse else GOOD if compared else PLAIN, told_of))
    else:
        found.append((PLAIN, "Nothing is known of these images by which they could be divided into subgroups."))
    found.append(_beside(overall["auc"], bounds["auc"], published))
    if test["not_judged"]:
        found.append((BAD, f"Not judged, for want of images with or without: {', '.join(test['not_judged'])}."))
    if meta.cross_split_duplicates:
        found.append((BAD, f"{meta.cross_split_duplicates} images stand in two splits, so the numbers may flatter."))
    return found


def _beside(area: float | None, bound: tuple[float, float] | None, published: pd.DataFrame) -> tuple[str, str]:
    rows = published[published["comparable"] & published["auc"].notna()]
    if published.empty:
        return PLAIN, "No scores are published of this data set."
    if rows.empty or area is None or bound is None:
        return PLAIN, f"None of the {len(published)} published scores known of this data set may be compared with ours."
    low, high = bound
    above, below = int((rows["auc"] > high).sum()), int((rows["auc"] < low).sum())
    return (
        BAD if above == len(rows) else GOOD if below > above else PLAIN,
        f"Of {len(rows)} published AUCs that may be compared, {below} lie below the interval of ours, {above} above it"
        f" and {len(rows) - below - above} in it.",
    )
