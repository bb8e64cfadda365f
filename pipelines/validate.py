"""Stage validate: reads data/raw, writes data/manifest.parquet and reports/validation, or stops: the data gate."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from fadeformer import params
from fadeformer.datasets import facts as cards
from fadeformer.datasets import manifest, splits
from fadeformer.datasets.facts import SPLITS, Facts
from fadeformer.datasets.manifest import Manifest
from fadeformer.errors import UserError
from fadeformer.files import whole_file, whole_folder, write_json
from fadeformer.params import Params
from pipelines import expectations, page, paths, stage

SHOWN = 20  # offending rows in the message; all of them stand in offending_rows.csv
LEAKS = ("image_in_two_splits", "near_duplicate_in_two_splits", "group_in_two_splits")


def main() -> str:
    """Builds the manifest and holds it against the expectations."""
    wanted = params.load(paths.PARAMS)
    allowed = wanted.validate_.max_cross_split_duplicates
    facts = cards.read(paths.RAW)
    found = read(facts, wanted)
    crossing = manifest.across_splits(found.rows)
    leaks = crossing["sha256"].nunique()
    with whole_folder(paths.VALIDATION) as folder:
        checks = expectations.check(
            found,
            facts,
            severity=wanted.validate_.severity.model_dump(),
            allowed_duplicates=allowed,
            min_per_class=wanted.validate_.min_per_class,
            max_label_shift=wanted.validate_.max_label_shift,
            folder=folder / "data_docs",
        )
        text = page.page(facts, found, checks, "data_docs/index.html")
        (folder / "index.html").write_text(text, encoding="utf-8")
        offending = pd.concat([check.rows for check in checks], ignore_index=True)
        offending.to_csv(folder / "offending_rows.csv", index=False)
        near = manifest.near_across_splits(found.rows, found.near)
        near.to_csv(folder / "near_duplicates.csv", index=False)
        write_json(folder / "validation.json", _summary(found, checks, leaks, allowed, len(near)))
    stopped = [check for check in checks if check.stops]
    warned = [check for check in checks if not check.passed and not check.stops]
    if warned:
        print("\n".join(["validate: WARNING", *_told(warned, near)]))
    if stopped:
        raise UserError(_message(stopped, near, leaks, allowed))
    usable = found.rows["problem"].isna() & found.rows[facts.kind.label_columns(len(facts.classes))].notna().all(axis=1)
    if not usable.all():
        print(f"validate: {int((~usable).sum())} images that cannot be read or have no label are left out")
    with whole_file(paths.MANIFEST) as path:
        rows = found.rows[usable]
        rows.attrs["split"] = found.split  # pandas writes it into the file
        rows.to_parquet(path, index=False)
    if found.rows["group"].isna().any():
        print(f"validate: {manifest.without_group(found.rows)}")
    if leaks:
        print(
            f"validate: RELAXED by validate.max_cross_split_duplicates: {allowed}: {leaks} images stand in two splits"
        )
        print(_listed(crossing))
    held = sum(check.passed for check in checks)
    return f"{held} expectations hold for {len(found.rows)} images; {paths.VALIDATION / 'index.html'}"


def propose() -> str:
    """Writes a split without leaks for the user to adopt; nothing else is changed."""
    wanted = params.load(paths.PARAMS)
    facts = cards.read(paths.RAW)
    rows, cluster = (found := read(facts, wanted)).rows, found.cluster
    repaired = splits.repaired(rows["split"].to_numpy(dtype=object), cluster)
    splits.write(paths.PROPOSED, rows["id"], repaired)
    moved = rows["split"] != repaired
    ways = rows[moved].groupby(["split", repaired[moved]]).size()
    told = [f"    {count} from {before} to {after}" for (before, after), count in ways.items()]
    return "\n".join([
        f"{paths.PROPOSED} moves {int(moved.sum())} of {len(rows)} images, so that no image, near duplicate or group"
        " stands in two splits:",
        *told,
        f"to adopt it, set split.adopted: {paths.PROPOSED}",
    ])  # fmt: skip


def read(facts: Facts, wanted: Params) -> Manifest:
    """The manifest of what lies in data/raw."""
    adopted = Path(wanted.split.adopted)
    paths.SPLITS.mkdir(parents=True, exist_ok=True)
    return manifest.build(
        facts,
        paths.RAW,
        near_duplicate_similarity=wanted.validate_.near_duplicate_similarity,
        anew=wanted.split.anew,
        shares=wanted.split.shares,
        seed=wanted.split.seed,
        adopted=None if adopted == paths.NO_SPLIT else adopted,
        kept=paths.SPLITS,
    )


def _summary(
    found: Manifest, checks: list[expectations.Check], leaks: int, allowed: int, near: int
) -> dict[str, object]:
    return {
        "passed": not any(check.stops for check in checks),
        "images": len(found.rows),
        "images_of_split": {split: int((found.rows["split"] == split).sum()) for split in SPLITS},
        "split": found.split,
        "cross_split_duplicates": {"found": leaks, "allowed": allowed},
        "near_duplicates": {"pairs": len(found.near), "in_two_splits": near},
        "images_without_group": int(found.rows["group"].isna().sum()),
        "duplicates_within_a_split": manifest.within_splits(found.rows),
        "expectations": [
            {"check": c.name, "severity": c.severity, "sentence": c.sentence, "passed": c.passed, "rows": len(c.rows)}
            for c in checks
        ],
    }


def _message(stopped: list[expectations.Check], near: pd.DataFrame, leaks: int, allowed: int) -> str:
    lines = [f"the data gate is shut: {len(stopped)} expectation(s) do not hold", *_told(stopped, near)]
    if leaks > allowed:
        lines.append(
            f"{leaks} images stand in two splits; remove them, or allow them in params.yaml with"
            f" validate.max_cross_split_duplicates: {leaks}"
        )
    if any(check.name in LEAKS for check in stopped):
        lines.append(
            f"`python -m pipelines.validate --fix` proposes a split without leaks; whoever knows better sets"
            f" {' or '.join(f'validate.severity.{check.name}' for check in stopped if check.name in LEAKS)}: warn"
        )
    lines.append(
        f"the whole report: {paths.VALIDATION / 'index.html'}, all rows: {paths.VALIDATION / 'offending_rows.csv'}"
    )
    return "\n".join(lines)


def _told(checks: list[expectations.Check], near: pd.DataFrame) -> list[str]:
    lines = []
    for check in checks:
        lines.append(f"- {check.sentence}")
        if check.name == "near_duplicate_in_two_splits":
            pairs = [f"    {p.first} and {p.second}  (similarity {p.similarity:.3f})" for p in near.itertuples()]
            lines += [*pairs[:SHOWN], *([f"    ... and {len(pairs) - SHOWN} more"] if len(pairs) > SHOWN else [])]
        elif len(check.rows):
            lines.append(_listed(check.rows))
    return lines


def _listed(rows: pd.DataFrame) -> str:
    lines = [f"    {row.id}  ({row.problem or f'sha256 {row.sha256[:12]}'})" for row in rows.head(SHOWN).itertuples()]
    if len(rows) > SHOWN:
        lines.append(f"    ... and {len(rows) - SHOWN} more")
    return "\n".join(lines)


if __name__ == "__main__":
    stage.run("validate", propose if sys.argv[1:] == ["--fix"] else main)
