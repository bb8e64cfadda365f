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
from fadeformer.inference.classifier import POINTS, Classifier
from fadeformer.inference.model_files import ModelFiles
from fadeformer.io import chunked_table
from fadeformer.io.chunked_table import Parts
from pipelines.registry import resolve
from pipelines.runner import Ended

PROBLEMS = 3  # exit status where some files could not be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to predict, by which model, and where to write it."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=resolve.HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="table to write: .csv or .parquet")
    parser.add_argument("--point", choices=POINTS, default="youden", help="operating point (default: youden)")
    parser.add_argument(
        "--operating-points", type=Path, metavar="FILE", help="thresholds in place of those that the model carries"
    )
    parser.add_argument(
        "--explain", type=Path, metavar="DIR", help="folder for a PNG of each image: what was looked at"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="that decode (default: one on each core)")


def run(arguments: argparse.Namespace) -> Ended:
    """Predicts, or goes on with what was begun."""
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}; it must be 1 or more")
    chunked_table.check(arguments.out)
    images, left_out = inputs.find(arguments.paths)
    model = resolve.find(arguments.model, arguments.operating_points)
    return _predict(arguments, images, left_out, model)


def _predict(arguments: argparse.Namespace, images: list[inputs.Input], left_out: int, model: ModelFiles) -> Ended:
    classifier = resolve.load(model)
    point = classifier.operating_point(arguments.point)
    familiar = ood.read(model.familiar, model.described["unfamiliar"]["limit"])
    table = Parts(arguments.out, _key(arguments, images, model, classifier))
    if table.stale:
        print(f"{table.folder} was begun with other images, model or options, and is begun afresh")
    elif table.done:
        print(f"{table.folder} has {min(len(images), table.done * batch.PART):,} rows, and is gone on with")
    explain = arguments.explain and partial(overlays.write, classifier, arguments.explain)
    for rows in batch.predict(
        classifier, familiar, point, images, threads=arguments.threads, first=table.done * batch.PART,
        explain=explain,
    ):  # fmt: skip
        table.add(rows)
    unreadable = far = 0
    for rows in table:
        unreadable += int(rows["problem"].notna().sum())
        far += int(rows["is_unfamiliar"].sum())
    table.finish()
    told = [
        f"{len(images):,} images, {unreadable:,} of them unreadable",
        f"{far:,} unfamiliar (further than {familiar.limit:.1f})",
        *([f"{left_out:,} other files left out"] if left_out else []),
        point.summary,
        f"written to {arguments.out}",
    ]
    return Ended("; ".join(told), PROBLEMS if unreadable else 0)


def _key(arguments: argparse.Namespace, images: list[inputs.Input], model: ModelFiles, classifier: Classifier) -> str:
    """Of all that decides the table: model, images by size and time, point, device, libraries."""
    digest = hashlib.sha256(model.identity().encode())
    decides = [arguments.point, arguments.explain, classifier.device, torch.__version__]
    digest.update(repr([str(value) for value in decides]).encode())
    for image in images:
        digest.update(repr((image.name, str(image.path.resolve()), image.size, image.changed)).encode())
    return digest.hexdigest()
