"""`fadeformer export`: export a packaged model as one graph, from uint8 images to calibrated scores."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fadeformer.errors import UserError
from fadeformer.inference import export, model_files
from fadeformer.inference.classifier import Classifier
from pipelines.registry import package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add model, format and output file."""
    parser.add_argument("model", help="models:/NAME@champion, models:/NAME/VERSION, or the folder of a package")
    parser.add_argument(
        "--format", required=True, choices=["onnx", "program"], help="program: file for torch.export.load"
    )
    parser.add_argument("--out", required=True, type=Path, help="output file: .onnx or .pt2")


def run(arguments: argparse.Namespace) -> str:
    """Export the model; return a summary with the largest difference between the scores of both."""
    suffix = {"onnx": ".onnx", "program": ".pt2"}[arguments.format]
    if arguments.out.suffix != suffix:  # torch rejects or changes other suffixes
        raise UserError(f"--out {arguments.out}: the file name of this format must end with {suffix}")
    folder = package.find_data_folder(package.fetch_package(arguments.model))
    files = model_files.find_model_files(folder, arguments.model)
    difference = export.export_model(Classifier.load(files, torch.device("cpu")), arguments.format, arguments.out)
    return (
        f"{arguments.out}: scores of {arguments.model}, with a difference of at most {difference:.1g} on random images"
    )
