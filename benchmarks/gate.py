"""Time and memory of data validation for many rows, without decoding.

    python benchmarks/gate.py [--rows 100000]

Generates random thumbnails with groups, duplicates, near-duplicates and leaks, and times the steps of `validate`:
hashes, near-duplicate search, split, the great-expectations suite and the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fadeformer.config import schema
from fadeformer.data import manifest, near_duplicates, splits
from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.manifest import Manifest
from pipelines.validation import page, suite

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64
CLASSES = ("a", "b", "c", "d", "e")


@contextlib.contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
    print(f"{step:28}{seconds[step]:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    config = schema.load_params(ROOT / "params.yaml").validate_
    random = np.random.default_rng(0)
    seconds: dict[str, float] = {}
    coarse = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for pixels in coarse]
    for row in range(0, count - 50, 1000):  # one image in a thousand has a near-duplicate fifty rows later
        images[row + 50] = Image.fromarray(np.roll(np.asarray(images[row]), 1, axis=1))
    initial_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with timed("hashes", seconds):
        signatures = [near_duplicates.compute_signature(image) for image in images]
    with timed("near-duplicates", seconds):
        pairs = near_duplicates.find_near_duplicates(signatures, config.near_duplicate_similarity)
    names = [f"{row:06}.png" for row in range(count)]
    rows = pd.DataFrame({
        "path": "images.zip", "member": names, "id": names, "group": [f"patient {row // 3}" for row in range(count)],
        "label": random.integers(0, len(CLASSES), count), "age": random.integers(1, 90, count),
        "sha256": [f"{row:064x}" for row in range(count)], "height": SIDE, "width": SIDE, "mode": "L",
        "brightness": random.uniform(60, 190, count), "contrast": 40.0, "problem": None,
    })  # fmt: skip
    with timed("split", seconds):
        clusters = splits.connected_clusters(count, rows["group"], pairs[["first", "second"]].to_numpy())
        indicators = splits.label_indicators(rows[["label"]], len(CLASSES), False)
        split = splits.assign(indicators, clusters, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=0)
    split[::5000] = "test"  # leaks of patients and near-duplicates
    rows.insert(2, "split", split)
    rows.loc[count - 1, "sha256"] = rows.loc[0, "sha256"]
    near_duplicate_table = pd.DataFrame({
        "first": rows["id"].to_numpy()[pairs["first"]], "second": rows["id"].to_numpy()[pairs["second"]],
        "similarity": pairs["similarity"],
    })  # fmt: skip
    thumbnails = [signature.thumbnail for signature in signatures]
    card = DatasetCard("many", "images.zip", "0" * 64, "multi-class", CLASSES, SIDE, 1, None, "", "")
    checked_manifest = Manifest(rows, near_duplicate_table, thumbnails, {}, "made")
    with timed("great-expectations", seconds), tempfile.TemporaryDirectory() as folder:
        checks = suite.validate_manifest(
            checked_manifest, card, severity=config.severity.model_dump(), allowed_duplicates=0, min_per_class=1,
            max_label_shift=config.max_label_shift, folder=Path(folder),
        )  # fmt: skip
    with timed("page and table", seconds):
        page.render_validation_page(card, checked_manifest, checks, "")
        rows.to_parquet(io.BytesIO())
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{'total':28}{sum(seconds.values()):8.1f} s, peak {peak_rss / 2**20:.2f} GiB, {initial_rss / 2**20:.2f} before"
    )
    leaks = manifest.cross_split_near_duplicates(rows, near_duplicate_table)
    print(f"{len(near_duplicate_table)} near-duplicates, {len(leaks)} of them across splits;", end=" ")
    print(f"failed expectations: {', '.join(check.name for check in checks if not check.passed)}")


if __name__ == "__main__":
    main()
