"""What the data gate costs apart from decoding: seconds and memory for many rows.

    python benchmarks/gate.py [--rows 100000]

Draws as many thumbnails, with groups, copies, near copies and leaks among them, and times what `validate` does with
them: hashes, the search for near duplicates, a split, the great-expectations suite and the page.
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
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
    print(f"{what:28}{seconds[what]:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    count = parser.parse_args().rows
    wanted = schema.load_params(ROOT / "params.yaml").validate_
    random = np.random.default_rng(0)
    seconds: dict[str, float] = {}
    coarse = random.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    images = [Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in coarse]
    for copied in range(0, count - 50, 1000):  # one in a thousand has a near copy fifty rows on
        images[copied + 50] = Image.fromarray(np.roll(np.asarray(images[copied]), 1, axis=1))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with timed("hashes", seconds):
        sketches = [near_duplicates.compute_signature(image) for image in images]
    with timed("near duplicates", seconds):
        pairs = near_duplicates.find_near_duplicates(sketches, wanted.near_duplicate_similarity)
    names = [f"{row:06}.png" for row in range(count)]
    rows = pd.DataFrame({
        "path": "images.zip", "member": names, "id": names, "group": [f"patient {row // 3}" for row in range(count)],
        "label": random.integers(0, len(CLASSES), count), "age": random.integers(1, 90, count),
        "sha256": [f"{row:064x}" for row in range(count)], "height": SIDE, "width": SIDE, "mode": "L",
        "brightness": random.uniform(60, 190, count), "contrast": 40.0, "problem": None,
    })  # fmt: skip
    with timed("split", seconds):
        cluster = splits.connected_clusters(count, rows["group"], pairs[["first", "second"]].to_numpy())
        present = splits.label_indicators(rows[["label"]], len(CLASSES), False)
        split = splits.assign(present, cluster, {"train": 0.7, "val": 0.1, "test": 0.2}, seed=0)
    split[::5000] = "test"  # leaks of patients and near copies
    rows.insert(2, "split", split)
    rows.loc[count - 1, "sha256"] = rows.loc[0, "sha256"]
    near = pd.DataFrame({
        "first": rows["id"].to_numpy()[pairs["first"]], "second": rows["id"].to_numpy()[pairs["second"]],
        "similarity": pairs["similarity"],
    })  # fmt: skip
    thumbnails = [one.thumbnail for one in sketches]
    facts = DatasetCard("many", "images.zip", "0" * 64, "multi-class", CLASSES, SIDE, 1, None, "", "")
    found = Manifest(rows, near, thumbnails, {}, "made")
    with timed("great-expectations", seconds), tempfile.TemporaryDirectory() as folder:
        checks = suite.validate_manifest(
            found, facts, severity=wanted.severity.model_dump(), allowed_duplicates=0, min_per_class=1,
            max_label_shift=wanted.max_label_shift, folder=Path(folder),
        )  # fmt: skip
    with timed("page and table", seconds):
        page.render_validation_page(facts, found, checks, "")
        rows.to_parquet(io.BytesIO())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{'in all':28}{sum(seconds.values()):8.1f} s, peak {peak / 2**20:.2f} GiB, {began / 2**20:.2f} before")
    print(
        f"{len(near)} near duplicates, {len(manifest.cross_split_near_duplicates(rows, near))} of them in two splits;",
        end=" ",
    )
    print(f"expectations that do not hold: {', '.join(check.name for check in checks if not check.passed)}")


if __name__ == "__main__":
    main()
