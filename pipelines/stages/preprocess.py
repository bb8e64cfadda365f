"""Stage preprocess: reads data/raw and data/manifest.parquet, writes data/processed (arrays, index, boxes, meta)."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from fadeformer.config import schema
from fadeformer.config.schema import PreprocessParams
from fadeformer.data import arrays, dataset_card, manifest, preprocess
from fadeformer.data.boxes import map_boxes_to_arrays
from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.sources import lesion_boxes
from fadeformer.errors import UserError
from fadeformer.io.atomic import atomic_write, checksum
from pipelines import paths, runner


def main() -> str:
    """Writes the arrays that training maps into memory."""
    wanted = schema.load_params(paths.PARAMS).preprocess
    found = dataset_card.read_card(paths.RAW)
    side = wanted.image_size or found.size
    if side is None:
        raise UserError(f"{paths.PARAMS}: the images of {found.name} differ in size; set preprocess.image_size, pixels")
    try:
        with FileLock(paths.PROCESSED.with_name(f".{paths.PROCESSED.name}.lock"), timeout=0):
            return _write_arrays(found, side, wanted)
    except Timeout as error:
        raise UserError(f"{paths.PROCESSED}: another process is making the arrays; wait until it has ended") from error


def _write_arrays(found: DatasetCard, side: int, wanted: PreprocessParams) -> str:
    rows = pd.read_parquet(paths.MANIFEST)
    settings: dict[str, Any] = {"image_size": side, "channels": wanted.channels, "aspect": wanted.aspect}
    begun = _partial_folder(json.dumps([settings, asdict(found), checksum(paths.MANIFEST, "sha256")]))
    drawn = lesion_boxes.box_table(found, paths.RAW)
    if drawn is not None:  # first, for what is begun counts as whole once the arrays are
        with atomic_write(begun / arrays.BOXES_FILE) as path:
            map_boxes_to_arrays(drawn, rows, side, wanted.aspect).to_parquet(path, index=False)
    meta = preprocess.write_arrays(
        asdict(found),
        rows,
        paths.RAW,
        **settings,
        threads=wanted.threads,
        split=rows.attrs["split"],
        cross_split_duplicates=manifest.cross_split_duplicates(rows)["sha256"].nunique(),
        folder=begun,
    )
    shutil.rmtree(paths.PROCESSED, ignore_errors=True)
    begun.rename(paths.PROCESSED)
    counts = ", ".join(f"{split} {count}" for split, count in meta.counts.items())
    return f"{counts} images of {meta.image_size}x{meta.image_size}x{meta.channels}"


def _partial_folder(told: str) -> Path:
    """The folder where these arrays are made; what was begun of others is removed."""
    key = hashlib.sha256(told.encode()).hexdigest()[:12]
    folder = paths.PROCESSED.with_name(f".{paths.PROCESSED.name}-{key}")
    for other in folder.parent.glob(f".{paths.PROCESSED.name}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    runner.run("preprocess", main)
