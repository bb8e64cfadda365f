"""Rewrite the artifact URIs of an MLflow store that was moved or copied, since MLflow stores absolute paths.

Stages and commands do this automatically. Each mlruns/ has a copy of this file, which needs only Python, for moving
that folder without the project: `python mlruns/relocate.py`.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

EXPERIMENT = "fadeformer"
ARTIFACT_COLUMNS = {
    "experiments": ["artifact_location"], "runs": ["artifact_uri"], "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}  # fmt: skip


def rewrite_artifact_uris(database: Path, old: str, new: str) -> None:
    """Replace the prefix `old` of all artifact URIs in the database by `new`, in one transaction."""
    if old == new:
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, columns in ARTIFACT_COLUMNS.items():
            for column in columns:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",  # noqa: S608  constant names
                    (new, len(old) + 1, len(old), old),
                )


def main() -> None:
    """Fix the store in the folder of this file."""
    folder = Path(__file__).resolve().parent
    database, new = folder / "mlflow.db", (folder / "artifacts").as_uri()
    if not database.is_file():
        raise SystemExit(f"{database} not found; run the relocate.py that is in mlruns/")
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        row = connection.execute("select artifact_location from experiments where name = ?", (EXPERIMENT,)).fetchone()
    if row is None or not row[0].startswith("file:"):
        raise SystemExit(f"{database} has no experiment {EXPERIMENT} with artifacts in a local folder")
    rewrite_artifact_uris(database, row[0], new)
    print(f"artifact paths now point to {folder / 'artifacts'}")


if __name__ == "__main__":
    main()
