"""Stage validate: read or compute the split, check the data, and write data/manifest.parquet and reports/validation."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.data import dataset_card, exclusions, manifest, splits
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import LEAKAGE_CHECKS, Manifest
from fadeformer.data.sources.user_table import UNPARSED_LABEL
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_folder, atomic_write, write_json
from pipelines import paths, runner
from pipelines.environment import configure_environment
from pipelines.validation import page, remedies, suite

MAX_LINES = 20  # per check in a message; offending_rows.csv has all rows
MAX_NAMES = 3  # images per group and split in a message
LOW_CONTRAST = 3  # standard deviation of the pixels, which are 0 to 255


def main() -> str:
    """Build the manifest, run the expectation suite, and write manifest and report.

    Raises:
        UserError: a check of severity `stop` failed, or a split has no usable image.
    """
    config = schema.load_params(paths.PARAMS)
    allowed = config.validate_.max_cross_split_duplicates
    card = dataset_card.read_card(paths.RAW)
    data = build_manifest(card, config)
    crossing = manifest.cross_split_duplicates(data.rows)
    leaks = crossing["sha256"].nunique()
    near = manifest.cross_split_near_duplicates(data.rows, data.near_duplicates)
    with atomic_folder(paths.VALIDATION) as folder:
        checks = _run_checks(data, card, config, folder / "data_docs")
        text = page.render_validation_page(card, data, checks, "data_docs/index.html")
        (folder / "index.html").write_text(text, encoding="utf-8")
        offending = pd.concat([data.rows.head(0), *(check.rows for check in checks)], ignore_index=True)
        offending.to_csv(folder / "offending_rows.csv", index=False)
        _add_splits_and_labels(data.near_duplicates, data.rows, card).to_csv(
            folder / "near_duplicates.csv", index=False
        )
        write_json(folder / paths.VALIDATION_RESULT.name, _summary(data, checks, leaks, allowed, len(near)))
    blocking = [check for check in checks if check.is_blocking]
    warnings = [check for check in checks if not check.passed and not check.is_blocking]
    if warnings:
        lines = [
            f"  remedy for {name}: {remedies.remedy(name, data)}" for name in dict.fromkeys(c.name for c in warnings)
        ]
        print("\n".join(["validate: WARNING", *_describe_checks(warnings, data, card), *lines]))
    if blocking:
        raise UserError(_failure_message(blocking, data, card, leaks, allowed))
    usable = manifest.is_usable(data.rows, card)
    if not usable.all():
        print(f"validate: {int((~usable).sum())} images are excluded: they cannot be read or have no label")
    rows = data.rows[usable]
    empty = [split for split in SPLITS if split not in set(rows["split"])]
    if empty:
        raise UserError(f"no usable image in {' and '.join(empty)}; see {paths.VALIDATION / 'index.html'}")
    with atomic_write(paths.MANIFEST) as path:
        rows.attrs["split"] = data.split  # pandas writes attrs into the file
        rows.to_parquet(path, index=False)
    for message in (
        f"{data.excluded:,} images are excluded by split.exclude"
        if config.split.exclude != str(paths.NO_EXCLUSION)
        else "",
        _describe_unmatched_names(rows, config.split.group_from),
        manifest.describe_ungrouped(rows) if config.split.group_from is None else "",
        manifest.describe_uncompared(data),
        _low_contrast_warning(rows),
    ):
        if message:
            print(f"validate: {message}")
    if 0 < leaks <= allowed:
        print(f"validate: RELAXED by validate.max_cross_split_duplicates: {allowed}: {leaks} images are in two splits")
        print("\n".join(_indent_lines(_describe_groups(crossing, "sha256", card))))
    passed = sum(check.passed for check in checks)
    return f"{passed} expectations passed for {len(data.rows)} images; {paths.VALIDATION / 'index.html'}"


def propose_split() -> str:
    """Write a split file without leakage, which the user may adopt, and return a summary of the changes."""
    config = schema.load_params(paths.PARAMS)
    card = dataset_card.read_card(paths.RAW)
    data = build_manifest(card, config)
    rows, count = data.rows, len(card.classes)
    severity = config.validate_.severity.model_dump()
    cluster = manifest.leakage_clusters(
        rows, data.near_duplicates, [name for name in LEAKAGE_CHECKS if severity[name] != "off"]
    )
    present = splits.label_indicators(rows[card.task_spec.label_columns(count)], count, card.task_spec.multi_label)
    before = rows["split"].to_numpy(dtype=object)
    after = splits.repair(before, present, cluster)
    moved = before != after
    uncured = _describe_uncured(data, card, config)
    if not moved.any():
        return "\n".join(["no image, near-duplicate or group is in two splits; there is nothing to propose", *uncured])
    path = paths.ADOPTED_SPLITS / f"proposed-{splits.content_digest(rows['id'], after)}.csv"
    splits.write_split_file(path, rows["id"], after)
    moves = rows[moved].groupby(["split", after[moved]]).size()
    usable = manifest.is_usable(rows, card).to_numpy()
    lost = [
        f"    {split} would have no image {'with' if card.task_spec.multi_label else 'of'} {card.classes[label]}"
        for split in SPLITS
        for label in range(count)
        if present[usable & (before == split), label].any() and not present[usable & (after == split), label].any()
    ]
    return "\n".join([
        f"{path} moves {int(moved.sum())} of {len(rows)} images, so that no image, near-duplicate or group is in two"
        " splits:",
        *[f"    {number} from {source} to {target}" for (source, target), number in moves.items()],
        *(["these classes have too few groups for three splits:", *lost] if lost else []),
        f"to adopt it, set split.adopted: {path}",
        *uncured,
    ])  # fmt: skip


def _run_checks(data: Manifest, card: DatasetCard, config: Params, folder: Path) -> list[suite.Check]:
    """Run the checks with the settings of params.yaml, and write Data Docs to a folder."""
    return suite.validate_manifest(
        data,
        card,
        severity=config.validate_.severity.model_dump(),
        allowed_duplicates=config.validate_.max_cross_split_duplicates,
        min_per_class=config.validate_.min_per_class,
        max_label_shift=config.validate_.max_label_shift,
        folder=folder,
    )


def _describe_uncured(data: Manifest, card: DatasetCard, config: Params) -> list[str]:
    """Describe the failed checks that a new split does not correct, and write the list of images to leave out."""
    with TemporaryDirectory() as folder:
        checks = _run_checks(data, card, config, Path(folder))
    failed = [check for check in checks if check.is_blocking and check.name not in LEAKAGE_CHECKS]
    lines = ["a new split does not correct:"] if failed else []
    for check in failed:
        lines += [*_describe_checks([check], data, card), f"    remedy: {remedies.remedy(check.name, data)}"]
    rows = [check.rows for check in failed if check.name in remedies.EXCLUDABLE_CHECKS]
    if rows:
        listed = pd.concat(rows)
        path = paths.EXCLUDED / f"proposed-{splits.content_digest(listed['id'], listed['expectation'].to_numpy())}.csv"
        exclusions.write_excluded(path, listed)
        lines.append(f"to leave these {listed['id'].nunique():,} images out, set split.exclude: {path}")
    return lines


def _describe_unmatched_names(rows: pd.DataFrame, pattern: str | None) -> str:
    if pattern is None:
        return ""
    known = rows["group"].notna()
    return (
        f"split.group_from: {int(known.sum()):,} images of {rows['group'].nunique():,} patients or originals;"
        f" {int((~known).sum()):,} file names do not match, and each of these images is its own group"
    )


def build_manifest(card: DatasetCard, config: Params) -> Manifest:
    """Build the manifest of data/raw with the split settings of params.yaml."""
    adopted = Path(config.split.adopted)
    if not (readme := paths.SPLITS / "README.txt").exists():  # DVC warns of an empty folder
        paths.SPLITS.mkdir(parents=True, exist_ok=True)
        readme.write_text(
            "Generated splits, kept so that later runs reuse them: docs/reference/data.md\n", encoding="utf-8"
        )
    return manifest.build_manifest(
        card,
        paths.RAW,
        near_duplicate_similarity=config.validate_.near_duplicate_similarity,
        resplit=config.split.resplit,
        fractions=config.split.fractions,
        seed=config.split.seed,
        split_file=None if adopted == paths.NO_SPLIT else adopted,
        split_folder=paths.SPLITS,
        exclude=None if config.split.exclude == str(paths.NO_EXCLUSION) else Path(config.split.exclude),
        group_from=config.split.group_from,
    )


def _summary(data: Manifest, checks: list[suite.Check], leaks: int, allowed: int, near: int) -> dict[str, object]:
    return {
        "passed": not any(check.is_blocking for check in checks),
        "images": len(data.rows),
        "images_of_split": {split: int((data.rows["split"] == split).sum()) for split in SPLITS},
        "split": data.split,
        "excluded_images": data.excluded,
        "cross_split_duplicates": {"count": leaks, "allowed": allowed},
        "near_duplicates": {"pairs": len(data.near_duplicates), "in_two_splits": near},
        "images_without_group": int(data.rows["group"].isna().sum()),
        "duplicates_within_a_split": manifest.count_within_split_duplicates(data.rows),
        "expectations": [
            {
                "check": c.name,
                "severity": c.severity,
                "description": c.description,
                "passed": c.passed,
                "rows": len(c.rows),
            }
            for c in checks
        ],
    }


def _failure_message(blocking: list[suite.Check], data: Manifest, card: DatasetCard, leaks: int, allowed: int) -> str:
    lines = [
        f"data validation failed: {len(blocking)} expectation(s) not met",
        *_describe_checks(blocking, data, card),
    ]
    if leaks > allowed:
        lines.append(
            f"{leaks} images are in two splits; remove them, or allow them in params.yaml with"
            f" validate.max_cross_split_duplicates: {leaks}"
        )
    lines += [f"remedy for {name}: {remedies.remedy(name, data)}" for name in dict.fromkeys(c.name for c in blocking)]
    leakage_keys = [f"validate.severity.{check.name}: warn" for check in blocking if check.name in LEAKAGE_CHECKS]
    if leakage_keys:
        lines.append(f"to continue with this split, set {' and '.join(leakage_keys)}")
    lines.append(f"report: {paths.VALIDATION / 'index.html'}, all rows: {paths.VALIDATION / 'offending_rows.csv'}")
    return "\n".join(lines)


def _describe_checks(checks: list[suite.Check], data: Manifest, card: DatasetCard) -> list[str]:
    """Return a line for each check, followed by its offending items."""
    lines = []
    for check in checks:
        lines += [f"- {check.description}", *_indent_lines(_offending_items(check, data, card))]
    return lines


def _indent_lines(lines: list[str]) -> list[str]:
    more = [f"    ... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return [f"    {line}" for line in lines[:MAX_LINES]] + more


def _offending_items(check: suite.Check, data: Manifest, card: DatasetCard) -> list[str]:
    """Return a line for each pair, group, image content, class or image that fails a check."""
    if check.name == "near_duplicate_in_two_splits":
        return _describe_pairs(manifest.cross_split_near_duplicates(data.rows, data.near_duplicates), data.rows, card)
    if check.name == "near_duplicate_two_labels":
        return _describe_pairs(
            manifest.conflicting_near_duplicates(data.rows, data.near_duplicates, card), data.rows, card
        )
    if check.name == "patients_in_file_names" and data.name_pattern is not None:
        return data.name_pattern.examples
    if check.name == "group_in_two_splits":
        return _describe_groups(check.rows, "group", card)
    if check.name in ("image_in_two_splits", "same_image_two_labels"):
        return _describe_groups(check.rows, "sha256", card)
    if check.name == "class_too_small":
        counts = check.rows.groupby(["split", "label"]).size().reset_index(name="images").itertuples(index=False)
        return [f"{split} has {number:,} of {card.classes[int(label)]}" for split, label, number in counts]
    return [f"{row.id}  ({_failure_reason(check.name, row)})" for row in check.rows.itertuples()]


def _describe_pairs(pairs: pd.DataFrame, rows: pd.DataFrame, card: DatasetCard) -> list[str]:
    return [
        f"{p.first} ({p.first_split}, {p.first_label}) and {p.second} ({p.second_split}, {p.second_label}), similarity"
        f" {p.similarity:.3f}"
        for p in _add_splits_and_labels(pairs, rows, card).itertuples()
    ]


def _add_splits_and_labels(pairs: pd.DataFrame, rows: pd.DataFrame, card: DatasetCard) -> pd.DataFrame:
    """Add the split and the label of both images to a table of pairs."""
    images = rows[rows["id"].isin({*pairs["first"], *pairs["second"]})]
    columns = pd.DataFrame({"split": images["split"], "label": manifest.label_names(images, card)})
    columns.index = pd.Index(images["id"])
    return pairs.join(columns.add_prefix("first_"), on="first").join(columns.add_prefix("second_"), on="second")


def _describe_groups(rows: pd.DataFrame, column: str, card: DatasetCard) -> list[str]:
    """Return a line for each group (or SHA-256) with the first images of each split and the number of further ones."""
    lines = []
    labels = manifest.label_names(rows, card)
    for name, images in rows.groupby(column, sort=False):
        parts = []
        for split, split_images in images.groupby("split", sort=False):
            first = split_images.head(MAX_NAMES)
            named = [f"{name} ({label})" for name, label in zip(first["id"], labels[first.index], strict=True)]
            parts.append(
                f"{split}: {', '.join(named)}"
                + (f" and {len(split_images) - MAX_NAMES:,} more" if len(split_images) > MAX_NAMES else "")
            )
        lines.append(("" if column == "sha256" else f"{name}: ") + "; ".join(parts))
    return lines


def _failure_reason(check: str, row: Any) -> str:
    if isinstance(row.problem, str):
        return row.problem.removeprefix(f"{row.id}: ")
    if check == "unexpected_size":
        return f"{row.height} x {row.width}"
    if check == "unexpected_mode":
        return str(row.mode)
    if check == "label_out_of_range":
        unparsed = getattr(row, UNPARSED_LABEL, None)
        label = getattr(row, "label", None)
        return f"{row.split}; " + (
            unparsed if isinstance(unparsed, str) else f"label {'none' if pd.isna(label) else label}"
        )
    return str(row.split)


def _low_contrast_warning(rows: pd.DataFrame) -> str:
    count = int((rows["contrast"] < LOW_CONTRAST).sum())
    return (
        f"{count:,} images have almost no contrast: if your images of more than 8 bits use a small part of their"
        " range, set dataset.pixel_range"
        if count
        else ""
    )


if __name__ == "__main__":
    configure_environment()
    parser = argparse.ArgumentParser(prog="python -m pipelines.stages.validate", description=__doc__)
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write a proposed split without leakage, and a list of images that no split corrects",
    )
    runner.run("validate", propose_split if parser.parse_args().fix else main)
