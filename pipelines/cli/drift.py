"""`fadeformer drift`: detect drift of new images from the reference data of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.orchestration import drift_check
from pipelines.registry import resolve
from pipelines.runner import CommandResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add images, their groups, model and output folder."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=resolve.MODEL_HELP)
    parser.add_argument(
        "--out", type=Path, default=Path("reports/drift"), metavar="DIR", help="output folder (default: reports/drift)"
    )
    parser.add_argument(
        "--max-images", type=int, default=5000, metavar="N", help="sample size if there are more images (default: 5000)"
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="CSV file with the columns path and group (patient, lesion or slide) of each image; without it, patients"
        " are read from DICOM headers",
    )
    parser.add_argument("--independent", action="store_true", help="each image is of another patient")  # fmt: skip


def run(arguments: argparse.Namespace) -> CommandResult:
    """Compare the images with the reference data; write a page and a JSON file."""
    return drift_check.check_drift(
        arguments.paths, arguments.model, arguments.out, arguments.max_images, arguments.groups,
        independent=arguments.independent,
    )  # fmt: skip
