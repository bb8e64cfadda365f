"""How fast and in how much memory `fadeformer predict` goes from files to a table, beside the bare model.

    python benchmarks/predict.py [--images 2000] [--side 64] [--repeats 3] [--backbone fadevit_nano] [--many 10000]

The bare model has the same images as one uint8 array in memory: in batches of 256 with all of torch's threads,
and as `predict` runs it, in batches of 32 in as many threads as there are cores. All are taken in turns, by the clock
and by the processor's time, which other programs on the machine change less. Peak memory is that of a process of its
own, for a tenth of `--many` images and for all.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fadeformer.data.sources.phantom import generate
from fadeformer.inference import batch as predicting
from fadeformer.inference import inputs, ood
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.forward import predict_logits
from fadeformer.inference.ood import OODDetector
from fadeformer.io.chunked_table import ChunkedTable
from fadeformer.models.factory import create_model

CLASSES = ("a", "b", "c", "d", "e")
FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 4, "dropout": 0.0, "K": 3, "alpha": 0.5}


def network(folder: Path, backbone: str, side: int) -> Classifier:
    """A network that has learned nothing, which costs the same."""
    made = {
        "backbone": backbone, "num_classes": len(CLASSES), "image_size": side, "in_chans": 3, "pretrained": False,
        "dropout": 0.0, "drop_path": 0.0, "fade": FADE,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.save(create_model(**made).state_dict(), folder / "weights.pth")
    described = {
        "model": made, "task": "multi-class", "head": "auto", "classes": CLASSES,
        "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}, "calibration": {"slope": [1.0], "offset": [0.0]},
        "input": {"image_size": side, "channels": 3, "aspect": "squash"},
    }  # fmt: skip
    return Classifier(described, folder / "weights.pth", device=torch.device("cpu"))


def write(folder: Path, images: int, side: int) -> np.ndarray:
    """PNGs of the phantom, of which a few are repeated."""
    drawn = generate.draw_dataset(300, side, seed=0)["train_images"]
    folder.mkdir()
    for number in range(images):
        Image.fromarray(drawn[number % len(drawn)]).save(folder / f"{number:06}.png")
    return drawn[np.arange(images) % len(drawn)]


def known(classifier: Classifier) -> OODDetector:
    """Of features that mean nothing."""
    features = np.random.default_rng(0).normal(size=(50, classifier.model.num_features)).astype(np.float32)
    return ood.fit_detector(features, np.zeros((50, 1), np.int64), classifier.task, features)


def ours(classifier: Classifier, familiar: OODDetector, folder: Path, out: Path) -> None:
    """All that the command does but for loading the model."""
    images, _ = inputs.list_inputs([str(folder)])
    table = ChunkedTable(out, str(time.time()))
    for rows in predicting.predict_chunks(
        classifier, familiar, classifier.operating_point("youden"), images, threads=None
    ):
        table.add_chunk(rows)
    table.finish()


def bare(classifier: Classifier, pixels: np.ndarray, batch: int) -> None:
    """The model on what is ready."""
    torch.set_num_threads(os.cpu_count() or 1)
    predict_logits(classifier.model, pixels, batch, classifier.device, classifier.normalization)


def bare_in_threads(classifier: Classifier, pixels: np.ndarray) -> None:
    """Likewise, as `predict` runs it."""
    torch.set_num_threads(1)

    def one(start: int) -> None:
        with torch.inference_mode():
            classifier.model(classifier.normalization(torch.from_numpy(pixels[start : start + predicting.BATCH_SIZE])))

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, range(0, len(pixels), predicting.BATCH_SIZE)))


def peak(images: int, side: int, backbone: str) -> float:
    """MiB of a process of its own."""
    command = [sys.executable, __file__, "--peak", "--images", str(images), "--side", str(side), "--backbone", backbone]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backbone", default="fadevit_nano")
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        classifier = network(base, wanted.backbone, wanted.side)
        familiar = known(classifier)
        pixels = write(base / "images", wanted.images, wanted.side)
        if wanted.peak:
            del pixels
            ours(classifier, familiar, base / "images", base / "out.csv")
            status = Path("/proc/self/status").read_text()  # ru_maxrss counts what the parent had when it forked
            print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
            return
        ways = {
            "ours, files to table": lambda: ours(classifier, familiar, base / "images", base / "out.csv"),
            "bare model, batches of 256": lambda: bare(classifier, pixels, 256),
            "bare model, batches of 32 in threads": lambda: bare_in_threads(classifier, pixels),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(wanted.repeats):
            for name, way in ways.items():
                began = time.perf_counter(), time.process_time()
                way()
                seconds[name].append(time.perf_counter() - began[0])
                busy[name].append(time.process_time() - began[1])
    on = f"{wanted.backbone}, {os.cpu_count()} cores, {wanted.repeats} turns"
    print(f"{wanted.images} PNGs of {wanted.side} pixels, {on}")
    first = "ours, files to table"
    for name in ways:
        by_clock, by_work = (
            statistics.median(other / own for other, own in zip(of[name], of[first], strict=True))
            for of in (seconds, busy)
        )
        rate = wanted.images / statistics.median(seconds[name])
        print(f"{name:38}{rate:8.0f} images/s   ours by this {by_clock:.2f}, by processor time {by_work:.2f}")
    for images in (wanted.many // 10, wanted.many):
        print(f"peak memory for {images:6,} images {peak(images, wanted.side, wanted.backbone):6.0f} MiB")


if __name__ == "__main__":
    main()
