"""Stage validate: reads data/raw, writes data/manifest.parquet and reports/validation, or stops: the data gate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.data import dataset_card as cards
from fadeformer.data import manifest, splits
from fadeformer.data.dataset_card import SPLITS, DatasetCard
from fadeformer.data.manifest import LEAKAGE_CHECKS, Manifest
from fadeformer.data.sources.user_table import UNPARSED_LABEL
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_folder, atomic_write, write_json
from pipelines import paths, runner
from pipelines.validation import page, suite

MAX_LINES = 20  # lines of one check in the message; all rows stand in offending_rows.csv
MAX_NAMES = 3  # of a group in one split, in the message
LOW_CONTRAST = 3  # standard deviation of the pixels, of 255


def main() -> str:
    """Builds the manifest and holds it against the expectations."""
    wanted = schema.load_params(paths.PARAMS)
    allowed = wanted.validate_.max_cross_split_duplicates
    facts = cards.read_card(paths.RAW)
    found = build_manifest(facts, wanted)
    crossing = manifest.cross_split_duplicates(found.rows)
    leaks = crossing["sha256"].nunique()
    near = manifest.cross_split_near_duplicates(found.rows, found.near_duplicates)
    with atomic_folder(paths.VALIDATION) as folder:
        checks = suite.validate_manifest(
            found,
            facts,
            severity=wanted.validate_.severity.model_dump(),
            allowed_duplicates=allowed,
            min_per_class=wanted.validate_.min_per_class,
            max_label_shift=wanted.validate_.max_label_shift,
            folder=folder / "data_docs",
        )
        text = page.render_validation_page(facts, found, checks, "data_docs/index.html")
        (folder / "index.html").write_text(text, encoding="utf-8")
        offending = pd.concat([found.rows.head(0), *(check.rows for check in checks)], ignore_index=True)
        offending.to_csv(folder / "offending_rows.csv", index=False)
        _add_splits_and_labels(found.near_duplicates, found.rows, facts).to_csv(
            folder / "near_duplicates.csv", index=False
        )
        write_json(folder / paths.VALIDATION_RESULT.name, _summary(found, checks, leaks, allowed, len(near)))
    stopped = [check for check in checks if check.is_blocking]
    warned = [check for check in checks if not check.passed and not check.is_blocking]
    if warned:
        print("\n".join(["validate: WARNING", *_describe_checks(warned, found, facts)]))
    if stopped:
        raise UserError(_failure_message(stopped, found, facts, leaks, allowed))
    usable = manifest.is_usable(found.rows, facts)
    if not usable.all():
        print(f"validate: {int((~usable).sum())} images that cannot be read or have no label are left out")
    rows = found.rows[usable]
    bare = [split for split in SPLITS if split not in set(rows["split"])]
    if bare:
        raise UserError(
            f"no image that can be used is left in {' and '.join(bare)}; see {paths.VALIDATION / 'index.html'}"
        )
    with atomic_write(paths.MANIFEST) as path:
        rows.attrs["split"] = found.split  # pandas writes it into the file
        rows.to_parquet(path, index=False)
    for sentence in (
        manifest.describe_ungrouped(rows),
        manifest.describe_uncompared(found),
        _low_contrast_warning(rows),
    ):
        if sentence:
            print(f"validate: {sentence}")
    if 0 < leaks <= allowed:
        print(
            f"validate: RELAXED by validate.max_cross_split_duplicates: {allowed}: {leaks} images stand in two splits"
        )
        print("\n".join(_indent_lines(_describe_groups(crossing, "sha256", facts))))
    held = sum(check.passed for check in checks)
    return f"{held} expectations hold for {len(found.rows)} images; {paths.VALIDATION / 'index.html'}"


def propose_split() -> str:
    """Writes a split without leaks for the user to adopt; nothing else is changed."""
    wanted = schema.load_params(paths.PARAMS)
    facts = cards.read_card(paths.RAW)
    found = build_manifest(facts, wanted)
    rows, count = found.rows, len(facts.classes)
    severity = wanted.validate_.severity.model_dump()
    cluster = manifest.leakage_clusters(
        rows, found.near_duplicates, [name for name in LEAKAGE_CHECKS if severity[name] != "off"]
    )
    present = splits.label_indicators(rows[facts.task_spec.label_columns(count)], count, facts.task_spec.multi_label)
    before = rows["split"].to_numpy(dtype=object)
    after = splits.repair(before, present, cluster)
    moved = before != after
    if not moved.any():
        return "no image, near duplicate or group stands in two splits; there is nothing to propose"
    path = paths.ADOPTED_SPLITS / f"proposed-{splits.content_digest(rows['id'], after)}.csv"
    splits.write_split_file(path, rows["id"], after)
    ways = rows[moved].groupby(["split", after[moved]]).size()
    usable = manifest.is_usable(rows, facts).to_numpy()
    lost = [
        f"    {split} would have no image {'with' if facts.task_spec.multi_label else 'of'} {facts.classes[label]}"
        for split in SPLITS
        for label in range(count)
        if present[usable & (before == split), label].any() and not present[usable & (after == split), label].any()
    ]
    return "\n".join([
        f"{path} moves {int(moved.sum())} of {len(rows)} images, so that no image, near duplicate or group stands in"
        " two splits:",
        *[f"    {number} from {one} to {other}" for (one, other), number in ways.items()],
        *(["their groups are too few to go round:", *lost] if lost else []),
        f"to adopt it, set split.adopted: {path}",
    ])  # fmt: skip


def build_manifest(facts: DatasetCard, wanted: Params) -> Manifest:
    """The manifest of what lies in data/raw."""
    adopted = Path(wanted.split.adopted)
    if not (told := paths.SPLITS / "README.txt").exists():  # DVC warns of an empty folder
        paths.SPLITS.mkdir(parents=True, exist_ok=True)
        told.write_text("Splits that were made, which are kept and used again: docs/reference/data.md\n", encoding="utf-8")
    return manifest.build_manifest(
        facts,
        paths.RAW,
        near_duplicate_similarity=wanted.validate_.near_duplicate_similarity,
        resplit=wanted.split.anew,
        fractions=wanted.split.shares,
        seed=wanted.split.seed,
        split_file=None if adopted == paths.NO_SPLIT else adopted,
        split_folder=paths.SPLITS,
    )


def _summary(found: Manifest, checks: list[suite.Check], leaks: int, allowed: int, near: int) -> dict[str, object]:
    return {
        "passed": not any(check.is_blocking for check in checks),
        "images": len(found.rows),
        "images_of_split": {split: int((found.rows["split"] == split).sum()) for split in SPLITS},
        "split": found.split,
        "cross_split_duplicates": {"found": leaks, "allowed": allowed},
        "near_duplicates": {"pairs": len(found.near_duplicates), "in_two_splits": near},
        "images_without_group": int(found.rows["group"].isna().sum()),
        "duplicates_within_a_split": manifest.count_within_split_duplicates(found.rows),
        "expectations": [
            {
                "check": c.name,
                "severity": c.severity,
                "sentence": c.description,
                "passed": c.passed,
                "rows": len(c.rows),
            }
            for c in checks
        ],
    }


def _failure_message(stopped: list[suite.Check], found: Manifest, facts: DatasetCard, leaks: int, allowed: int) -> str:
    lines = [
        f"the data gate is shut: {len(stopped)} expectation(s) do not hold",
        *_describe_checks(stopped, found, facts),
    ]
    if leaks > allowed:
        lines.append(
            f"{leaks} images stand in two splits; remove them, or allow them in params.yaml with"
            f" validate.max_cross_split_duplicates: {leaks}"
        )
    if any(check.name in LEAKAGE_CHECKS for check in stopped):
        lines.append(
            f"`python -m pipelines.stages.validate --fix` proposes a split without leaks; whoever knows better sets"
            f" {' or '.join(f'validate.severity.{check.name}' for check in stopped if check.name in LEAKAGE_CHECKS)}: warn"
        )
    lines.append(
        f"the whole report: {paths.VALIDATION / 'index.html'}, all rows: {paths.VALIDATION / 'offending_rows.csv'}"
    )
    return "\n".join(lines)


def _describe_checks(checks: list[suite.Check], found: Manifest, facts: DatasetCard) -> list[str]:
    lines = []
    for check in checks:
        lines += [f"- {check.description}", *_indent_lines(_offending_items(check, found, facts))]
    return lines


def _indent_lines(lines: list[str]) -> list[str]:
    more = [f"    ... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return [f"    {line}" for line in lines[:MAX_LINES]] + more


def _offending_items(check: suite.Check, found: Manifest, facts: DatasetCard) -> list[str]:
    """What offends a check: a line for each pair, group, content, class or image."""
    if check.name == "near_duplicate_in_two_splits":
        return _describe_pairs(
            manifest.cross_split_near_duplicates(found.rows, found.near_duplicates), found.rows, facts
        )
    if check.name == "near_duplicate_two_labels":
        return _describe_pairs(
            manifest.conflicting_near_duplicates(found.rows, found.near_duplicates, facts), found.rows, facts
        )
    if check.name == "group_in_two_splits":
        return _describe_groups(check.rows, "group", facts)
    if check.name in ("image_in_two_splits", "same_image_two_labels"):
        return _describe_groups(check.rows, "sha256", facts)
    if check.name == "class_too_small":
        counts = check.rows.groupby(["split", "label"]).size().reset_index(name="images").itertuples(index=False)
        return [f"{split} has {number:,} of {facts.classes[int(label)]}" for split, label, number in counts]
    return [f"{row.id}  ({_failure_reason(check.name, row)})" for row in check.rows.itertuples()]


def _describe_pairs(pairs: pd.DataFrame, rows: pd.DataFrame, facts: DatasetCard) -> list[str]:
    of = _add_splits_and_labels(pairs, rows, facts).itertuples()
    return [
        f"{p.first} ({p.first_split}, {p.first_label}) and {p.second} ({p.second_split}, {p.second_label}), similarity"
        f" {p.similarity:.3f}"
        for p in of
    ]


def _add_splits_and_labels(pairs: pd.DataFrame, rows: pd.DataFrame, facts: DatasetCard) -> pd.DataFrame:
    """Pairs with the split and the label of both images."""
    chosen = rows[rows["id"].isin({*pairs["first"], *pairs["second"]})]
    known = pd.DataFrame({"split": chosen["split"], "label": manifest.label_names(chosen, facts)})
    known.index = pd.Index(chosen["id"])
    return pairs.join(known.add_prefix("first_"), on="first").join(known.add_prefix("second_"), on="second")


def _describe_groups(rows: pd.DataFrame, column: str, facts: DatasetCard) -> list[str]:
    """A line for each group, or each content: how many of its images stand in which split, and some of their names."""
    lines = []
    labels = manifest.label_names(rows, facts)
    for name, images in rows.groupby(column, sort=False):
        parts = []
        for split, some in images.groupby("split", sort=False):
            first = some.head(MAX_NAMES)
            named = [f"{name} ({label})" for name, label in zip(first["id"], labels[first.index], strict=True)]
            parts.append(
                f"{split}: {', '.join(named)}"
                + (f" and {len(some) - MAX_NAMES:,} more" if len(some) > MAX_NAMES else "")
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
        told = getattr(row, UNPARSED_LABEL, None)
        label = getattr(row, "label", None)
        return f"{row.split}; " + (told if isinstance(told, str) else f"label {'none' if pd.isna(label) else label}")
    return str(row.split)


def _low_contrast_warning(rows: pd.DataFrame) -> str:
    count = int((rows["contrast"] < LOW_CONTRAST).sum())
    return (
        f"{count:,} images are almost of one value: 16-bit grey is read by its full range; if yours uses little of it,"
        " rescale it first, for a model sees black"
        if count
        else ""
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipelines.stages.validate", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="write a proposed split without leaks; nothing is changed")
    runner.run("validate", propose_split if parser.parse_args().fix else main)
