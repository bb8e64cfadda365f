"""`fadeformer export`: a packaged model as one graph, from uint8 images to calibrated scores."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fadeformer.errors import UserError
from fadeformer.inference import export, model_files
from fadeformer.inference.classifier import Classifier
from pipelines.registry import package


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
    files = model_files.find_model_files(
        package.find_data_folder(package.fetch_package(arguments.model)), arguments.model
    )
    difference = export.export_model(Classifier.load(files, torch.device("cpu")), arguments.format, arguments.out)
    return f"{arguments.out} gives the scores of {arguments.model}, to {difference:.1g} on random images"
