"""Stage preprocess: reads data/raw and data/manifest.parquet, writes data/processed (arrays, index, meta)."""

from dataclasses import asdict

import pandas as pd

from fadeformer import arrays, params
from fadeformer.datasets import facts, manifest, npz
from fadeformer.files import whole_folder
from pipelines import paths, stage


def main() -> str:
    """Writes the arrays that training maps into memory."""
    wanted = params.load(paths.PARAMS).preprocess
    found = facts.read(paths.RAW)
    rows = pd.read_parquet(paths.MANIFEST)
    with whole_folder(paths.PROCESSED) as folder:
        meta = arrays.write(
            asdict(found),
            rows[["split", "id", "group", *found.kind.label_columns(len(found.classes))]],
            {split: npz.images(paths.RAW / found.file, split) for split in facts.SPLITS},
            image_size=wanted.image_size or found.size,
            channels=wanted.channels,
            cross_split_duplicates=manifest.across_splits(rows)["sha256"].nunique(),
            folder=folder,
        )
    counts = ", ".join(f"{split} {count}" for split, count in meta.counts.items())
    return f"{counts} images of {meta.image_size}x{meta.image_size}x{meta.channels}"


if __name__ == "__main__":
    stage.run("preprocess", main)
