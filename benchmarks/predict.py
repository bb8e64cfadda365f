"""Speed and memory of `fadeformer predict`, from files to a table, against the bare model.

    python benchmarks/predict.py [--images 2000] [--side 64] [--repeats 3] [--backbone fadevit_nano] [--many 10000]

The bare model has the same images as one uint8 array in memory. It runs in batches of 256 with all of torch's threads,
and as `predict` runs it, in batches of 32 with one thread per core. Repeats are interleaved; besides wall time the
processor time is compared, which depends less on other programs. Peak memory is that of a new process, for a tenth of
`--many` images and for all of them.
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
from fadeformer.inference import batch as batch_inference
from fadeformer.inference import inputs, ood
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.forward import predict_logits
from fadeformer.inference.ood import OODDetector
from fadeformer.io.chunked_table import ChunkedTable
from fadeformer.models.factory import create_model

PREDICT = "predict, files to table"
CLASSES = ("a", "b", "c", "d", "e")
FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 4, "dropout": 0.0, "K": 3, "alpha": 0.5}


def network(folder: Path, backbone: str, side: int) -> Classifier:
    """Create an untrained model, which costs the same as a trained one."""
    architecture = {
        "backbone": backbone, "num_classes": len(CLASSES), "image_size": side, "in_chans": 3, "pretrained": False,
        "dropout": 0.0, "drop_path": 0.0, "fade": FADE,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.save(create_model(**architecture).state_dict(), folder / "weights.pth")
    metadata = {
        "model": architecture, "task": "multi-class", "head": "auto", "classes": CLASSES,
        "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}, "calibration": {"slope": [1.0], "offset": [0.0]},
        "input": {"image_size": side, "channels": 3, "aspect": "squash"},
    }  # fmt: skip
    return Classifier(metadata, folder / "weights.pth", device=torch.device("cpu"))


def write_images(folder: Path, images: int, side: int) -> np.ndarray:
    """Write phantom images as PNGs, 300 distinct ones repeated, and return them as an array."""
    pixels = generate.draw_dataset(300, side, seed=0)["train_images"]
    folder.mkdir()
    for number in range(images):
        Image.fromarray(pixels[number % len(pixels)]).save(folder / f"{number:06}.png")
    return pixels[np.arange(images) % len(pixels)]


def random_detector(classifier: Classifier) -> OODDetector:
    """Fit an OOD detector to random features."""
    features = np.random.default_rng(0).normal(size=(50, classifier.model.num_features)).astype(np.float32)
    return ood.fit_detector(features, np.zeros((50, 1), np.int64), classifier.task, features)


def run_predict(classifier: Classifier, detector: OODDetector, folder: Path, out: Path) -> None:
    """Run the work of the command, without loading the model."""
    images, _ = inputs.list_inputs([str(folder)])
    table = ChunkedTable(out, str(time.time()))
    for rows in batch_inference.predict_chunks(
        classifier, detector, classifier.operating_point("youden"), images, threads=None
    ):
        table.add_chunk(rows)
    table.finish()


def run_model(classifier: Classifier, pixels: np.ndarray, batch: int) -> None:
    """Run the model on an array."""
    torch.set_num_threads(os.cpu_count() or 1)
    predict_logits(classifier.model, pixels, batch, classifier.device, classifier.normalization)


def run_model_in_threads(classifier: Classifier, pixels: np.ndarray) -> None:
    """Run the model on an array with one thread per core, as `predict` does."""
    torch.set_num_threads(1)

    def predict_batch(start: int) -> None:
        with torch.inference_mode():
            classifier.model(
                classifier.normalization(torch.from_numpy(pixels[start : start + batch_inference.BATCH_SIZE]))
            )

    with ThreadPoolExecutor() as pool:
        list(pool.map(predict_batch, range(0, len(pixels), batch_inference.BATCH_SIZE)))


def measure_peak(images: int, side: int, backbone: str) -> float:
    """Return the peak memory of a new process in MiB."""
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        classifier = network(base, args.backbone, args.side)
        detector = random_detector(classifier)
        pixels = write_images(base / "images", args.images, args.side)
        if args.peak:
            del pixels
            run_predict(classifier, detector, base / "images", base / "out.csv")
            status = Path("/proc/self/status").read_text()  # ru_maxrss would include memory of the parent process
            print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
            return
        variants = {
            PREDICT: lambda: run_predict(classifier, detector, base / "images", base / "out.csv"),
            "bare model, batches of 256": lambda: run_model(classifier, pixels, 256),
            "bare model, batches of 32 in threads": lambda: run_model_in_threads(classifier, pixels),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(args.repeats):
            for name, variant in variants.items():
                start = time.perf_counter(), time.process_time()
                variant()
                seconds[name].append(time.perf_counter() - start[0])
                cpu_seconds[name].append(time.process_time() - start[1])
    print(f"{args.images} PNGs of {args.side} pixels, {args.backbone}, {os.cpu_count()} cores, {args.repeats} repeats")
    for name in variants:
        wall_ratio, cpu_ratio = (
            statistics.median(own / reference for own, reference in zip(times[name], times[PREDICT], strict=True))
            for times in (seconds, cpu_seconds)
        )
        rate = args.images / statistics.median(seconds[name])
        print(f"{name:38}{rate:8.0f} images/s   time / {PREDICT}: wall {wall_ratio:.2f}, processor {cpu_ratio:.2f}")
    for images in (args.many // 10, args.many):
        print(f"peak memory for {images:6,} images {measure_peak(images, args.side, args.backbone):6.0f} MiB")


if __name__ == "__main__":
    main()
