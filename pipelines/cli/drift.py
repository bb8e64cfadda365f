"""`fadeformer drift`: whether new images are like those that a model was made with."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fadeformer import drift, drift_page, inputs, predicting, reference, unfamiliar
from fadeformer.classifier import POINTS
from fadeformer.errors import UserError
from fadeformer.files import whole_folder, write_json
from fadeformer.model_files import ModelFiles
from pipelines import named_model
from pipelines.stage import Ended

DRIFTED = 4  # exit status
SEED = 0  # of the choice among too many images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, which model, and where to write."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, DICOM file, folder, zip or pattern")
    parser.add_argument("--model", required=True, help=named_model.HELP)
    parser.add_argument(
        "--out", type=Path, default=Path("reports/drift"), metavar="DIR", help="folder (default: reports/drift)"
    )
    parser.add_argument(
        "--most", type=int, default=5000, metavar="N", help="images that are looked at, drawn from more (default: 5000)"
    )


def run(arguments: argparse.Namespace) -> Ended:
    """Compares, and writes a page and the same as JSON."""
    return compare(arguments.paths, arguments.model, arguments.out, arguments.most)


def compare(named: list[str], model: str, out: Path, most: int) -> Ended:
    """Likewise.

    Args:
        named: paths and patterns.
        model: as `named_model.HELP` tells.
        out: folder, which is made anew.
        most: images that are looked at.
    """
    if most < drift.FEWEST:
        raise UserError(f"--most is {most}; at least {drift.FEWEST} images are needed")
    images, _ = inputs.find(named)
    if len(images) > most:
        images = [images[place] for place in np.sort(np.random.default_rng(SEED).permutation(len(images))[:most])]
    files = named_model.find(model)
    known = reference.read(files.reference, model)
    new, unreadable = _seen(files, images)
    found = drift.compare(known, new)
    called = named[0] if len(named) == 1 else f"{named[0]} and {len(named) - 1} more"
    with whole_folder(out) as folder:
        text = drift_page.page(found, known, new, model=model, images=called, unreadable=unreadable)
        (folder / "index.html").write_text(text, encoding="utf-8")
        write_json(
            folder / "drift.json", {"model": model, "unreadable": unreadable, "drifted": found.found, **asdict(found)}
        )
    left = f", {unreadable:,} unreadable" if unreadable else ""
    what = f"DRIFT of {', '.join(found.found)}" if found.found else "no drift"
    return Ended(f"{what} in {found.images:,} images{left}; {out / 'index.html'}", DRIFTED if found.found else 0)


def _seen(files: ModelFiles, images: list[inputs.Input]) -> tuple[pd.DataFrame, int]:
    """The columns of `fadeformer.reference` of new images, and how many could not be read."""
    classifier = named_model.load(files)
    familiar = unfamiliar.read(files.familiar, files.described["unfamiliar"]["limit"])
    point = classifier.operating_point(POINTS[0])  # decisions are not compared
    parts = predicting.predict(classifier, familiar, point, images, threads=None, more=reference.seen)
    rows = pd.concat(parts, ignore_index=True)
    names = {name: f"{reference.SCORE}{name}" for name in classifier.classes}
    return rows.rename(columns={**names, "unfamiliar": reference.DISTANCE}), int(rows["problem"].notna().sum())
