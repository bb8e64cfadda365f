"""`fadeformer export`: a packaged model as one graph, from uint8 images to calibrated scores."""

from __future__ import annotations

import argparse
from pathlib import Path

from fadeformer import exporting
from fadeformer.errors import UserError
from fadeformer.scoring import Scorer
from pipelines import packaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and what to make of it."""
    parser.add_argument("model", help="models:/NAME@champion, models:/NAME/VERSION, or the folder of a package")
    parser.add_argument(
        "--format", required=True, choices=["onnx", "program"], help="program: what torch.export.load reads"
    )
    parser.add_argument("--out", required=True, type=Path, help="the file: .onnx or .pt2")


def run(arguments: argparse.Namespace) -> str:
    """Writes the file and tells how near its scores are."""
    suffix = {"onnx": ".onnx", "program": ".pt2"}[arguments.format]
    if arguments.out.suffix != suffix:  # torch refuses or changes others
        raise UserError(f"--out {arguments.out}: the name of a file of this format ends with {suffix}")
    scorer = Scorer(packaged.data(packaged.fetch(arguments.model)))
    difference = exporting.export(scorer, arguments.format, arguments.out)
    return f"{arguments.out} gives the scores of {arguments.model}, to {difference:.1g} on random images"
