"""Stage validate: reads data/raw, writes data/manifest.parquet and reports/validation, or stops: the data gate."""

from __future__ import annotations

import pandas as pd

from fadeformer import params
from fadeformer.datasets import facts as cards
from fadeformer.datasets import manifest
from fadeformer.errors import UserError
from fadeformer.files import whole_file, whole_folder, write_json
from pipelines import expectations, page, paths, stage

SHOWN = 20  # offending rows in the message; all of them stand in offending_rows.csv


def main() -> str:
    """Builds the manifest and holds it against the expectations."""
    allowed = params.load(paths.PARAMS).validate_.max_cross_split_duplicates
    facts = cards.read(paths.RAW)
    rows = manifest.build(facts, paths.RAW)
    crossing = manifest.across_splits(rows)
    found = crossing["sha256"].nunique()
    with whole_folder(paths.VALIDATION) as folder:
        checks = expectations.check(rows, facts, allowed, folder / "data_docs")
        text = page.page(facts, rows, checks, "data_docs/index.html")
        (folder / "index.html").write_text(text, encoding="utf-8")
        offending = pd.concat([check.rows for check in checks], ignore_index=True)
        offending.to_csv(folder / "offending_rows.csv", index=False)
        summary = {
            "passed": all(check.passed for check in checks),
            "images": len(rows),
            "cross_split_duplicates": {"found": found, "allowed": allowed},
            "images_without_group": int(rows["group"].isna().sum()),
            "duplicates_within_a_split": manifest.within_splits(rows),
            "expectations": [{"sentence": c.sentence, "passed": c.passed, "rows": len(c.rows)} for c in checks],
        }
        write_json(folder / "validation.json", summary)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UserError(_message(failed, found, allowed))
    with whole_file(paths.MANIFEST) as path:
        rows.to_parquet(path, index=False)
    if rows["group"].isna().any():
        print(f"validate: {manifest.without_group(rows)}")
    if found:
        print(
            f"validate: RELAXED by validate.max_cross_split_duplicates: {allowed}: {found} images stand in two splits"
        )
        print(_listed(crossing))
    return f"{len(checks)} expectations hold for {len(rows)} images; {paths.VALIDATION / 'index.html'}"


def _message(failed: list[expectations.Check], found: int, allowed: int) -> str:
    lines = [f"the data gate is shut: {len(failed)} expectation(s) do not hold"]
    for check in failed:
        lines.append(f"- {check.sentence}")
        if len(check.rows):
            lines.append(_listed(check.rows))
    if found > allowed:
        lines.append(
            f"{found} images stand in two splits; remove them, or allow them in params.yaml with"
            f" validate.max_cross_split_duplicates: {found}"
        )
    lines.append(
        f"the whole report: {paths.VALIDATION / 'index.html'}, all rows: {paths.VALIDATION / 'offending_rows.csv'}"
    )
    return "\n".join(lines)


def _listed(rows: pd.DataFrame) -> str:
    lines = [f"    {row.id}  (sha256 {str(row.sha256)[:12]})" for row in rows.head(SHOWN).itertuples()]
    if len(rows) > SHOWN:
        lines.append(f"    ... and {len(rows) - SHOWN} more")
    return "\n".join(lines)


if __name__ == "__main__":
    stage.run("validate", main)
