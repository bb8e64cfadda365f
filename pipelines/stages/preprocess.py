"""Stage preprocess: read data/raw and data/manifest.parquet, write data/processed (arrays, index, boxes, metadata)."""

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
    """Decode and resize all images into arrays that training maps into memory."""
    config = schema.load_params(paths.PARAMS).preprocess
    card = dataset_card.read_card(paths.RAW)
    side = config.image_size or card.size
    if side is None:
        raise UserError(f"{paths.PARAMS}: the images of {card.name} differ in size; set preprocess.image_size, pixels")
    try:
        with FileLock(paths.PROCESSED.with_name(f".{paths.PROCESSED.name}.lock"), timeout=0):
            return _write_arrays(card, side, config)
    except Timeout as error:
        raise UserError(
            f"{paths.PROCESSED}: another process is writing the arrays; wait until it has finished"
        ) from error


def _write_arrays(card: DatasetCard, side: int, config: PreprocessParams) -> str:
    rows = pd.read_parquet(paths.MANIFEST)
    settings: dict[str, Any] = {"image_size": side, "channels": config.channels, "aspect": config.aspect}
    partial = _partial_folder(json.dumps([settings, asdict(card), checksum(paths.MANIFEST, "sha256")]))
    boxes = lesion_boxes.box_table(card, paths.RAW)
    if boxes is not None:  # before the arrays: a folder with arrays counts as complete
        with atomic_write(partial / arrays.BOXES_FILE) as path:
            map_boxes_to_arrays(boxes, rows, side, config.aspect).to_parquet(path, index=False)
    meta = preprocess.write_arrays(
        asdict(card),
        rows,
        paths.RAW,
        **settings,
        threads=config.threads,
        split=rows.attrs["split"],
        cross_split_duplicates=manifest.cross_split_duplicates(rows)["sha256"].nunique(),
        folder=partial,
    )
    shutil.rmtree(paths.PROCESSED, ignore_errors=True)
    partial.rename(paths.PROCESSED)
    counts = ", ".join(f"{split} {count}" for split, count in meta.counts.items())
    return f"{counts} images of {meta.image_size}x{meta.image_size}x{meta.channels}"


def _partial_folder(fingerprint: str) -> Path:
    """Return the folder for unfinished arrays of this fingerprint, and remove those of others."""
    key = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    folder = paths.PROCESSED.with_name(f".{paths.PROCESSED.name}-{key}")
    for other in folder.parent.glob(f".{paths.PROCESSED.name}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    runner.run("preprocess", main)
