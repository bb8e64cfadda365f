"""`fadeformer predict`: scores, decisions and what is unfamiliar of images on the disk, as a table."""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path

import torch

from fadeformer.errors import UserError
from fadeformer.explain import overlays
from fadeformer.inference import batch, inputs, ood
from fadeformer.inference.classifier import OPERATING_POINT_NAMES, Classifier
from fadeformer.inference.model_files import ModelFiles
from fadeformer.io import chunked_table
from fadeformer.io.chunked_table import ChunkedTable
from pipelines.registry import resolve
from pipelines.runner import CommandResult

EXIT_UNREADABLE = 3  # exit status where some files could not be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to predict, by which model, and where to write it."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=resolve.MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="table to write: .csv or .parquet")
    parser.add_argument(
        "--point", choices=OPERATING_POINT_NAMES, default="youden", help="operating point (default: youden)"
    )
    parser.add_argument(
        "--operating-points", type=Path, metavar="FILE", help="thresholds in place of those that the model carries"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="folder for a PNG of each image: what was looked at"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="that decode (default: one on each core)")


def run(arguments: argparse.Namespace) -> CommandResult:
    """Predicts, or goes on with what was begun."""
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}; it must be 1 or more")
    chunked_table.check_table_path(arguments.out)
    images, left_out = inputs.list_inputs(arguments.paths)
    model = resolve.find_model_files(arguments.model, arguments.operating_points)
    return _predict(arguments, images, left_out, model)


def _predict(
    arguments: argparse.Namespace, images: list[inputs.InputImage], left_out: int, model: ModelFiles
) -> CommandResult:
    classifier = resolve.load_classifier(model)
    point = classifier.operating_point(arguments.point)
    familiar = ood.read(model.ood, model.metadata["ood"]["threshold"])
    table = ChunkedTable(arguments.out, _fingerprint(arguments, images, model, classifier))
    if table.had_stale_chunks:
        print(f"{table.folder} was begun with other images, model or options, and is begun afresh")
    elif table.num_chunks:
        print(f"{table.folder} has {min(len(images), table.num_chunks * batch.CHUNK_SIZE):,} rows, and is gone on with")
    explain = arguments.explain and partial(overlays.write_overlays, classifier, arguments.explain)
    for rows in batch.predict_chunks(
        classifier, familiar, point, images, threads=arguments.threads, start_row=table.num_chunks * batch.CHUNK_SIZE,
        explain=explain,
    ):  # fmt: skip
        table.add_chunk(rows)
    unreadable = far = 0
    for rows in table:
        unreadable += int(rows["error"].notna().sum())
        far += int(rows["is_ood"].sum())
    table.finish()
    told = [
        f"{len(images):,} images, {unreadable:,} of them unreadable",
        f"{far:,} unfamiliar (further than {familiar.threshold:.1f})",
        *([f"{left_out:,} other files left out"] if left_out else []),
        point.description,
        f"written to {arguments.out}",
    ]
    return CommandResult("; ".join(told), EXIT_UNREADABLE if unreadable else 0)


def _fingerprint(
    arguments: argparse.Namespace, images: list[inputs.InputImage], model: ModelFiles, classifier: Classifier
) -> str:
    """Of all that decides the table: model, images by size and time, point, device, libraries."""
    digest = hashlib.sha256(model.fingerprint().encode())
    decides = [arguments.point, arguments.explain, classifier.device, torch.__version__]
    digest.update(repr([str(value) for value in decides]).encode())
    for image in images:
        digest.update(repr((image.name, str(image.path.resolve()), image.size, image.mtime_ns)).encode())
    return digest.hexdigest()
