"""Drift check: predict new images and compare them with reference data of the model (`fadeformer.monitoring.drift`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from fadeformer.errors import UserError
from fadeformer.inference import batch, inputs, ood
from fadeformer.inference.model_files import ModelFiles
from fadeformer.inference.operating_point import OPERATING_POINT_NAMES
from fadeformer.io.atomic import atomic_folder, write_json
from fadeformer.monitoring import drift, reference
from fadeformer.reporting import drift_page
from pipelines.registry import resolve
from pipelines.runner import CommandResult

EXIT_DRIFT = 4  # exit status
EXIT_NOT_ASSESSED = 5  # no drift was found, but not everything could be assessed
SAMPLING_SEED = 0  # for the sample of images, if there are more than `max_images`


def check_drift(
    names: list[str], model: str, out: Path, max_images: int, groups: Path | None = None, *, independent: bool = False
) -> CommandResult:
    """Compare new images with the reference data of a model; write a page and `drift.json`.

    Args:
        names: Paths and patterns of the images.
        model: Name or folder of the model, in one of the forms of `resolve.MODEL_HELP`.
        out: Output folder; an existing one is replaced.
        max_images: Number of images to sample if there are more.
        groups: CSV file with the group of each image, see `inputs.read_groups`.
        independent: Whether each image is of another group.

    Raises:
        UserError: `max_images` is too small, or the images, their groups or the model cannot be read.
    """
    if max_images < drift.MIN_IMAGES:
        raise UserError(f"--max-images is {max_images}; at least {drift.MIN_IMAGES} images are needed")
    if groups is not None and independent:
        raise UserError("--groups and --independent exclude each other; give one of them")
    images, _ = inputs.list_inputs(names)
    if len(images) > max_images:
        chosen = np.random.default_rng(SAMPLING_SEED).permutation(len(images))[:max_images]
        images = [images[index] for index in np.sort(chosen)]
    image_groups = [image.name for image in images] if independent else inputs.read_groups(images, groups)
    files = resolve.find_model_files(model)
    reference_table = reference.read(files.reference, model)
    new_table, unreadable = _compute_features(files, images)
    new_table[reference.GROUP] = pd.Series(image_groups, dtype="string")
    has_groups = bool(new_table.loc[new_table["error"].isna(), reference.GROUP].notna().all())
    result = drift.detect_drift(reference_table, new_table, has_groups=has_groups)
    source = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    with atomic_folder(out) as folder:
        page = drift_page.render_drift_page(
            result, reference_table, new_table, model=model, images=source, unreadable=unreadable
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
        write_json(
            folder / "drift.json",
            {
                "model": model, "unreadable": unreadable, "drifted": result.drifted,
                "not_assessed": result.not_assessed, **asdict(result),
            },
        )  # fmt: skip
    return CommandResult(f"{_summarize(result, unreadable)}; {out / 'index.html'}", _status(result))


def _summarize(result: drift.DriftResult, unreadable: int) -> str:
    """Summarize the result in one line; columns that were not assessed come first."""
    outcomes = []
    if result.drifted:
        outcomes.append(f"DRIFT of {', '.join(result.drifted)}")
    if result.not_assessed:
        outcomes.append(f"NOT ASSESSED: {'; '.join(result.not_assessed)}")
    if not result.drifted and result.unchanged:
        outcomes.append("no drift of the rest" if result.not_assessed else "no drift")
    groups = f"{result.groups:,} groups" if result.has_groups else "unknown groups, see --groups"
    skipped = f", {unreadable:,} unreadable" if unreadable else ""
    return f"{'; '.join(outcomes)} in {result.images:,} images of {groups}{skipped}"


def _status(result: drift.DriftResult) -> int:
    if result.drifted:
        return EXIT_DRIFT
    return EXIT_NOT_ASSESSED if result.not_assessed else 0


def _compute_features(files: ModelFiles, images: list[inputs.InputImage]) -> tuple[pd.DataFrame, int]:
    """Compute the columns of `fadeformer.monitoring.reference` for new images, and count the unreadable images."""
    classifier = resolve.load_classifier(files)
    detector = ood.read(files.ood, files.metadata["ood"]["threshold"])
    point = classifier.operating_point(OPERATING_POINT_NAMES[0])  # any: decisions are not compared
    chunks = batch.predict_chunks(
        classifier, detector, point, images, threads=None, extra_columns=reference.image_statistics
    )
    rows = pd.concat(chunks, ignore_index=True)
    names = {name: f"{reference.SCORE_PREFIX}{name}" for name in classifier.classes}
    return rows.rename(columns={**names, "ood_distance": reference.OOD_DISTANCE}), int(rows["error"].notna().sum())
