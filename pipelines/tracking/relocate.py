"""Lets an MLflow store of this project's that was moved or copied find its artifacts: MLflow keeps absolute addresses.

Stages and commands do this by themselves. A copy of this file, which needs nothing but Python, lies in each mlruns/ for
those who take that folder alone to where the project is not: `python mlruns/relocate.py`.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

EXPERIMENT = "fadeformer"
ARTIFACT_COLUMNS = {
    "experiments": ["artifact_location"], "runs": ["artifact_uri"], "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}  # fmt: skip


def rewrite_artifact_uris(database: Path, before: str, now: str) -> None:
    """Changes the beginning of every address of artifacts, in one transaction."""
    if before == now:
        return
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, columns in ARTIFACT_COLUMNS.items():
            for column in columns:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",  # noqa: S608  names of ours
                    (now, len(before) + 1, len(before), before),
                )


def main() -> None:
    """Mends the store in whose folder this file lies."""
    folder = Path(__file__).resolve().parent
    database, now = folder / "mlflow.db", (folder / "artifacts").as_uri()
    if not database.is_file():
        raise SystemExit(f"{database} is not there; run the relocate.py that lies in mlruns/")
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        found = connection.execute("select artifact_location from experiments where name = ?", (EXPERIMENT,)).fetchone()
    if found is None or not found[0].startswith("file:"):
        raise SystemExit(f"{database} has no experiment {EXPERIMENT} whose artifacts lie in a folder")
    rewrite_artifact_uris(database, found[0], now)
    print(f"artifacts are found in {folder / 'artifacts'}")


if __name__ == "__main__":
    main()
