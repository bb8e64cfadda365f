"""`fadeformer drift`: whether new images are like those that a model was made with."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.orchestration import drift_check
from pipelines.registry import resolve
from pipelines.runner import CommandResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, which model, and where to write."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=resolve.MODEL_HELP)
    parser.add_argument(
        "--out", type=Path, default=Path("reports/drift"), metavar="DIR", help="folder (default: reports/drift)"
    )
    parser.add_argument(
        "--most", type=int, default=5000, metavar="N", help="images that are looked at, drawn from more (default: 5000)"
    )


def run(arguments: argparse.Namespace) -> CommandResult:
    """Compares, and writes a page and the same as JSON."""
    return drift_check.check_drift(arguments.paths, arguments.model, arguments.out, arguments.most)
