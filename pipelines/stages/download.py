"""Stage download: read `dataset:` of params.yaml, write data/raw (the published archive and its dataset card)."""

import argparse
from pathlib import Path

from fadeformer.config import schema
from fadeformer.data.sources import fetch
from fadeformer.data.sources.folder import iter_dicom_names
from fadeformer.io.atomic import atomic_folder
from fadeformer.tasks import ORDINAL
from pipelines import paths, runner
from pipelines.environment import configure_environment
from pipelines.tracking import locations


def main() -> str:
    """Download the data set, or import the user's own files."""
    config = schema.load_params(paths.PARAMS).dataset
    with atomic_folder(paths.RAW) as folder:
        card = fetch.fetch_dataset(
            **config.model_dump(),
            downloads=locations.project_folder() / paths.DOWNLOADS,  # DVC experiments share the project's downloads
            lock=paths.DATASET_LOCK,
            salt=paths.HASH_SALT,
            destination=folder,
        )
    order = f" ({' < '.join(card.classes)})" if card.task == ORDINAL else ""
    return (
        f"{card.file}, {card.task}, {len(card.classes)} classes{order}, sha256 {card.sha256[:16]}. {card.note}".strip()
    )


def list_hashed_names() -> str:
    """Return a table of hashed names and DICOM file names, to be printed; it is not saved, since names may identify."""
    config = schema.load_params(paths.PARAMS).dataset
    rows = [f"{pseudonym}\t{name}" for pseudonym, name in iter_dicom_names(Path(config.root), paths.HASH_SALT)]
    return "\n".join([f"{len(rows):,} DICOM files in {config.root}", *rows])


if __name__ == "__main__":
    configure_environment()
    parser = argparse.ArgumentParser(prog="python -m pipelines.stages.download", description=__doc__)
    parser.add_argument("--names", action="store_true", help="print which DICOM file each hashed name belongs to")
    runner.run("download", list_hashed_names if parser.parse_args().names else main)
