"""`fadeformer predict`: write a table with scores, decisions and out-of-distribution flags of images.

An interrupted prediction resumes from the chunks that `fadeformer.io.chunked_table` stored.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from functools import partial
from pathlib import Path

import torch

from fadeformer.errors import UserError
from fadeformer.explain import overlays
from fadeformer.inference import batch, inputs, ood
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.model_files import ModelFiles
from fadeformer.inference.operating_point import OPERATING_POINT_NAMES
from fadeformer.io import chunked_table
from fadeformer.io.chunked_table import ChunkedTable
from pipelines.registry import resolve
from pipelines.runner import CommandResult

EXIT_UNREADABLE = 3  # exit status if some files could not be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add images, model, output file and options."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=resolve.MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="table to write: .csv or .parquet")
    parser.add_argument(
        "--operating-point", choices=OPERATING_POINT_NAMES, default="youden", help="for decisions (default: youden)"
    )
    parser.add_argument(
        "--operating-points", type=Path, metavar="FILE", help="thresholds that replace those of the model"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="folder for PNG files with the attribution maps of each image"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of decoding threads (default: one per core)")


def run(arguments: argparse.Namespace) -> CommandResult:
    """Predict the images, or resume an interrupted prediction."""
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}; it must be 1 or more")
    chunked_table.check_table_path(arguments.out)
    images, skipped = inputs.list_inputs(arguments.paths)
    model = resolve.find_model_files(arguments.model, arguments.operating_points)
    return _predict(arguments, images, skipped, model)


def _predict(
    arguments: argparse.Namespace, images: list[inputs.InputImage], skipped: int, model: ModelFiles
) -> CommandResult:
    classifier = resolve.load_classifier(model)
    point = classifier.operating_point(arguments.operating_point)
    detector = ood.read(model.ood, model.metadata["ood"]["threshold"])
    table = ChunkedTable(arguments.out, _fingerprint(arguments, images, model, classifier))
    if table.had_stale_chunks:
        print(f"{table.folder} is from other images, another model or other options; starting again")
    elif table.num_chunks:
        print(f"{table.folder} has {min(len(images), table.num_chunks * batch.CHUNK_SIZE):,} rows; resuming")
    explain = arguments.explain and partial(overlays.write_overlays, classifier, arguments.explain)
    for rows in batch.predict_chunks(
        classifier, detector, point, images, threads=arguments.threads, start_row=table.num_chunks * batch.CHUNK_SIZE,
        explain=explain,
    ):  # fmt: skip
        table.add_chunk(rows)
    unreadable = ood_count = 0
    for rows in table:
        unreadable += int(rows["error"].notna().sum())
        ood_count += int(rows["is_ood"].sum())
    table.finish()
    summary = [
        f"{len(images):,} images, {unreadable:,} of them unreadable",
        f"{ood_count:,} out-of-distribution (distance above {detector.threshold:.1f})"
        if math.isfinite(detector.threshold)
        else f"out-of-distribution not assessed (the model's val has fewer than {ood.MIN_VAL_IMAGES} images)",
        *([f"{skipped:,} other files skipped"] if skipped else []),
        point.description,
        f"written to {arguments.out}",
    ]
    return CommandResult("; ".join(summary), EXIT_UNREADABLE if unreadable else 0)


def _fingerprint(
    arguments: argparse.Namespace, images: list[inputs.InputImage], model: ModelFiles, classifier: Classifier
) -> str:
    """Fingerprint of all inputs of the table: model, images (by size and time), operating point, device, torch."""
    digest = hashlib.sha256(model.fingerprint().encode())
    options = [arguments.operating_point, arguments.explain, classifier.device, torch.__version__]
    digest.update(repr([str(value) for value in options]).encode())
    for image in images:
        digest.update(repr((image.name, str(image.path.resolve()), image.size, image.mtime_ns)).encode())
    return digest.hexdigest()
