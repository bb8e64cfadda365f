"""Stage download: reads `dataset:` of params.yaml, writes data/raw (the archive as published, and its card)."""

import argparse
from pathlib import Path

from fadeformer import params
from fadeformer.datasets import folder as own
from fadeformer.datasets import sources
from fadeformer.files import whole_folder
from pipelines import paths, places, stage


def main() -> str:
    """Brings the data set."""
    wanted = params.load(paths.PARAMS).dataset
    with whole_folder(paths.RAW) as folder:
        facts = sources.fetch(
            **wanted.model_dump(), downloads=places.project() / paths.DOWNLOADS, lock=paths.PINS, salt=paths.SALT,
            into=folder,
        )  # fmt: skip  # experiments share the project's downloads
    return f"{facts.file}, {facts.task}, {len(facts.classes)} classes, sha256 {facts.sha256[:16]}. {facts.note}".strip()


def names() -> str:
    """Which DICOM file each hashed name stands for: printed, and written nowhere."""
    wanted = params.load(paths.PARAMS).dataset
    known = [f"{hidden}\t{name}" for hidden, name in own.scans(Path(wanted.root), paths.SALT)]
    return "\n".join([f"{len(known):,} DICOM files in {wanted.root}", *known])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipelines.download", description=__doc__)
    parser.add_argument("--names", action="store_true", help="tell which DICOM file each hashed name stands for")
    stage.run("download", names if parser.parse_args().names else main)
