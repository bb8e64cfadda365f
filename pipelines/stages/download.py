"""Stage download: reads `dataset:` of params.yaml, writes data/raw (the archive as published, and its card)."""

import argparse
from pathlib import Path

from fadeformer.config import schema
from fadeformer.data.sources import folder as own
from fadeformer.data.sources import registry
from fadeformer.io.atomic import atomic_folder
from pipelines import paths, runner
from pipelines.tracking import locations


def main() -> str:
    """Brings the data set."""
    wanted = schema.load_params(paths.PARAMS).dataset
    with atomic_folder(paths.RAW) as folder:
        facts = registry.fetch_dataset(
            **wanted.model_dump(), downloads=locations.project_folder() / paths.DOWNLOADS, lock=paths.DATASET_LOCK, salt=paths.HASH_SALT,
            destination=folder,
        )  # fmt: skip  # experiments share the project's downloads
    return f"{facts.file}, {facts.task}, {len(facts.classes)} classes, sha256 {facts.sha256[:16]}. {facts.note}".strip()


def list_hashed_names() -> str:
    """Which DICOM file each hashed name stands for: printed, and written nowhere."""
    wanted = schema.load_params(paths.PARAMS).dataset
    known = [f"{hidden}\t{name}" for hidden, name in own.iter_dicom_names(Path(wanted.root), paths.HASH_SALT)]
    return "\n".join([f"{len(known):,} DICOM files in {wanted.root}", *known])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipelines.stages.download", description=__doc__)
    parser.add_argument("--names", action="store_true", help="tell which DICOM file each hashed name stands for")
    runner.run("download", list_hashed_names if parser.parse_args().names else main)
