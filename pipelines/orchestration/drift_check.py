"""Drift of new images: predict them and compare them with what a model was made with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fadeformer.errors import UserError
from fadeformer.inference import batch, inputs, ood
from fadeformer.inference.classifier import POINTS
from fadeformer.inference.model_files import ModelFiles
from fadeformer.io.atomic import whole_folder, write_json
from fadeformer.monitoring import drift, reference
from fadeformer.reporting import drift_page
from pipelines.registry import resolve
from pipelines.runner import Ended

DRIFTED = 4  # exit status
SEED = 0  # of the choice among too many images


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
    files = resolve.find(model)
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
    """The columns of `fadeformer.monitoring.reference` of new images, and how many could not be read."""
    classifier = resolve.load(files)
    familiar = ood.read(files.familiar, files.described["unfamiliar"]["limit"])
    point = classifier.operating_point(POINTS[0])  # decisions are not compared
    parts = batch.predict(classifier, familiar, point, images, threads=None, more=reference.seen)
    rows = pd.concat(parts, ignore_index=True)
    names = {name: f"{reference.SCORE}{name}" for name in classifier.classes}
    return rows.rename(columns={**names, "unfamiliar": reference.DISTANCE}), int(rows["problem"].notna().sum())
