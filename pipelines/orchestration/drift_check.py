"""Drift of new images: predict them and compare them with what a model was made with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fadeformer.errors import UserError
from fadeformer.inference import batch, inputs, ood
from fadeformer.inference.classifier import OPERATING_POINT_NAMES
from fadeformer.inference.model_files import ModelFiles
from fadeformer.io.atomic import atomic_folder, write_json
from fadeformer.monitoring import drift, reference
from fadeformer.reporting import drift_page
from pipelines.registry import resolve
from pipelines.runner import CommandResult

EXIT_DRIFT = 4  # exit status
SAMPLING_SEED = 0  # of the choice among too many images


def check_drift(named: list[str], model: str, out: Path, most: int) -> CommandResult:
    """Likewise.

    Args:
        named: paths and patterns.
        model: as `named_model.HELP` tells.
        out: folder, which is made anew.
        most: images that are looked at.
    """
    if most < drift.MIN_IMAGES:
        raise UserError(f"--most is {most}; at least {drift.MIN_IMAGES} images are needed")
    images, _ = inputs.list_inputs(named)
    if len(images) > most:
        images = [
            images[place] for place in np.sort(np.random.default_rng(SAMPLING_SEED).permutation(len(images))[:most])
        ]
    files = resolve.find_model_files(model)
    known = reference.read(files.reference, model)
    new, unreadable = _compute_features(files, images)
    found = drift.detect_drift(known, new)
    called = named[0] if len(named) == 1 else f"{named[0]} and {len(named) - 1} more"
    with atomic_folder(out) as folder:
        text = drift_page.render_drift_page(found, known, new, model=model, images=called, unreadable=unreadable)
        (folder / "index.html").write_text(text, encoding="utf-8")
        write_json(
            folder / "drift.json", {"model": model, "unreadable": unreadable, "drifted": found.drifted, **asdict(found)}
        )
    left = f", {unreadable:,} unreadable" if unreadable else ""
    what = f"DRIFT of {', '.join(found.drifted)}" if found.drifted else "no drift"
    return CommandResult(
        f"{what} in {found.images:,} images{left}; {out / 'index.html'}", EXIT_DRIFT if found.drifted else 0
    )


def _compute_features(files: ModelFiles, images: list[inputs.InputImage]) -> tuple[pd.DataFrame, int]:
    """The columns of `fadeformer.monitoring.reference` of new images, and how many could not be read."""
    classifier = resolve.load_classifier(files)
    familiar = ood.read(files.ood, files.metadata["ood"]["threshold"])
    point = classifier.operating_point(OPERATING_POINT_NAMES[0])  # decisions are not compared
    parts = batch.predict_chunks(
        classifier, familiar, point, images, threads=None, extra_columns=reference.image_statistics
    )
    rows = pd.concat(parts, ignore_index=True)
    names = {name: f"{reference.SCORE_PREFIX}{name}" for name in classifier.classes}
    return rows.rename(columns={**names, "ood_distance": reference.OOD_DISTANCE}), int(rows["error"].notna().sum())
