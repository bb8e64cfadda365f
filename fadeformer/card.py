"""The model card (Mitchell et al. 2019, arXiv:1810.03993): what a model is, of which data, how good, and for what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fadeformer.arrays import Meta
from fadeformer.calibration import NONE, of_description
from fadeformer.subgroups import worse
from fadeformer.summary import told
from fadeformer.tasks import Task

NUMBERS = {
    "auc": "AUC", "auc_micro": "AUC (micro)", "accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy",
    "precision": "Precision (macro)", "recall": "Sensitivity (macro)", "specificity": "Specificity (macro)",
    "f1": "F1 (macro)", "average_precision": "Average precision", "kappa": "Cohen's kappa",
    "quadratic_kappa": "Kappa, quadratic weights", "calibration_error": "Calibration error (15 bins)",
    "brier": "Brier score", "loss": "Loss, nats",
}  # fmt: skip
OF_CLASS = {
    "support": "Images", "auc": "AUC", "recall": "Sensitivity", "specificity": "Specificity", "precision": "Precision",
    "f1": "F1",
}  # fmt: skip
OF_SUBGROUP = ("auc", "balanced_accuracy", "recall", "specificity", "calibration_error")
MEASURES = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
SHARES = ("Sensitivity", "Specificity", "Positive predictive value", "Negative predictive value")
CHOSEN = {
    "loss": "of the lowest validation loss", "accuracy": "of the highest validation accuracy",
    "auc": "of the highest validation AUC",
}  # fmt: skip
BAR = "\\|"  # in a cell


def model_card(
    meta: Meta,
    described: Mapping[str, Any],
    summary: Mapping[str, Any],
    intervals: Mapping[str, Any],
    operating: Mapping[str, Any],
    subgroups: Mapping[str, Any],
) -> str:
    """Writes the card in Markdown.

    Args:
        meta: of the arrays the model was trained and judged on.
        described: what `models/model.json` holds.
        summary: of `fadeformer.summary.summarise`, by split.
        intervals: of `fadeformer.summary.intervals`, of test.
        operating: what `reports/operating_points.json` holds: `wanted`, `confidence` and `points`.
        subgroups: of `fadeformer.subgroups.compare`, of test.
    """
    data, model, settings = meta.dataset, described["model"], described["params"]
    fade = model["fade"]
    network = "none: the plain backbone" if fade is None else _fade(fade)
    names = {"classes" if not meta.task.multi_label else "findings": ", ".join(meta.classes)}
    test = summary["test"]
    lines = [
        f"# {model['backbone']} on {data['name']}",
        "",
        *([f"> **{data['note']}**", ""] if data["note"] else []),
        "For research. Not a medical device: no decision about a patient may rest on it.",
        "",
        "## Data",
        "",
        *_table(
            ("", ""),
            [
                ("Data set", f"{data['name']} ({data['file']})"),
                ("SHA-256", f"`{data['sha256']}`"),
                ("Licence", data["licence"]),
                ("Task", data["task"]),
                *((key.capitalize(), value) for key, value in names.items()),
                ("Images", ", ".join(f"{split} {count:,}" for split, count in meta.counts.items())),
                ("Split", meta.split),
                ("Input", f"{meta.image_size} x {meta.image_size} pixels, {meta.channels} channel(s), uint8"),
            ],
        ),
        "",
        "## Model",
        "",
        *_table(
            ("", ""),
            [
                ("Backbone", f"{model['backbone']}, {_origin(described)}"),
                ("Fade layers", network),
                ("Training", ", ".join(f"{key} {value}" for key, value in settings["train"].items())),
                ("Seed", settings["seed"]),
                ("Calibration", _calibration(described, meta.task)),
                ("Weights kept", f"epoch {described['best_epoch']}, {CHOSEN[settings['train']['monitor']]}"),
            ],
        ),
        "",
        f"## Results on {test['images']:,} test images of the split {meta.split}",
        "",
        *_table(
            ("", f"Test ({100 * operating['confidence']:g} % interval)", "Validation"),
            [
                (label, told(test["overall"][key], intervals["overall"][key]), _shown(summary["val"]["overall"][key]))
                for key, label in NUMBERS.items()
                if key in test["overall"]
            ],
        ),
        "",
        *_table(
            ("Class" if not meta.task.multi_label else "Finding", *OF_CLASS.values()),
            [
                (
                    name,
                    f"{values['support']:,}",
                    *(told(values[key], of_class[key]) for key in OF_CLASS if key in of_class),
                )
                for (name, values), of_class in zip(
                    test["per_class"].items(), intervals["per_class"].values(), strict=True
                )
            ],
        ),
        "",
        *_operating_points(operating),
        *_subgroups(subgroups),
        *_limits(meta, test, intervals["groups"]),
    ]
    return "\n".join(lines)


def _fade(fade: Mapping[str, Any]) -> str:
    """What decides the layers: `K` and `alpha` are the published variant's alone, `after_blocks` the other's."""
    unused = ("after_blocks",) if fade["variant"] == "published" else ("K", "alpha")
    told = {key: value for key, value in fade.items() if key not in unused}
    return ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in told.items()
    )


def _origin(described: Mapping[str, Any]) -> str:
    weights = described["weights"]
    if weights is not None:
        return f"from the weights of {weights['file']} (SHA-256 `{weights['sha256']}`)"
    return "pretrained" if described["model"]["pretrained"] else "from random weights"


def _calibration(described: Mapping[str, Any], task: Task) -> str:
    found = of_description(described["calibration"])
    if found == NONE:
        return "none: scores as the network gives them"
    if task.multi_label:
        return "vector scaling of each finding, fitted on validation"
    return f"temperature {1 / found.slope[0]:.3g}, fitted on validation"


def _subgroups(subgroups: Mapping[str, Any]) -> list[str]:
    """Numbers of each subgroup, and where one is worse than the whole."""
    if not subgroups:
        return []
    rows = [
        (
            column, value, f"{of['images']:,}", f"{of['groups']:,}",
            *(told(of["overall"][key], of["intervals"]["overall"][key]) for key in OF_SUBGROUP),
        )
        for column, values in subgroups.items()
        for value, of in values.items()
    ]  # fmt: skip
    tests = sum(len(of["compared"]) for values in subgroups.values() for of in values.values())
    verdicts = [
        f"- {one['column']} {one['subgroup']}: {MEASURES[one['measure']]} of {one['class']} {one['value']:.3f}, in the"
        f" whole {one['whole']:.3f} (adjusted p {one['p']:.2g})"
        for one in worse(subgroups)
    ]
    told_of = f"Compared with the whole in {tests:,} measures, and adjusted for that many:"
    return [
        "## Subgroups of the test images",
        "",
        *_table(("", "", "Images", "Patients or lesions", *(NUMBERS[key] for key in OF_SUBGROUP)), rows),
        "",
        *(
            [f"{told_of} worse beyond chance", "", *verdicts]
            if verdicts
            else [f"{told_of} none is worse beyond chance."]
        ),
        "",
    ]


def _operating_points(operating: Mapping[str, Any]) -> list[str]:
    rules = {"youden": "largest sensitivity + specificity"}
    rules |= {name: f"{name} at least {least:g}" for name, least in operating["wanted"].items() if least is not None}
    rows = []
    for rule, of_classes in operating["points"].items():
        for name, point in of_classes.items():
            shares = [] if point is None else list(point["on_test"].values())
            cells = [told(s["value"], None if s["low"] is None else (s["low"], s["high"])) for s in shares]
            limit = "not judged" if point is None else f"{point['threshold']:.4f}"
            rows.append((rules[rule], name, limit, *(cells or [""] * len(SHARES))))
    return [
        "## Operating points, chosen on validation and judged on test",
        "",
        *_table(("Rule on validation", "Positive", "Score from", *SHARES), rows),
        "",
    ]


def _limits(meta: Meta, test: Mapping[str, Any], groups: int) -> list[str]:
    limits = [
        "The validation images chose the epoch, so their numbers flatter.",
        "Intervals tell what other test images would do, not another training.",
    ]
    if groups < test["images"]:
        limits.append(
            f"The test images come from {groups:,} patients or lesions, and so few are the intervals made of."
        )
    if test["not_judged"]:
        limits.append(f"Not judged, for want of positives or negatives: {', '.join(test['not_judged'])}.")
    if meta.cross_split_duplicates:
        limits.append(
            f"**{meta.cross_split_duplicates} images stand in two splits**, as validate.max_cross_split_duplicates"
            " allowed: the numbers may flatter."
        )
    return [" ".join(limits), ""]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(str(value).replace('|', BAR) for value in row)} |" for row in (head, *rows)]
    return [lines[0], f"|{' --- |' * len(head)}", *lines[1:]]


def _shown(value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
