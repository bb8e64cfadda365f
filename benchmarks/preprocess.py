"""Speed and memory of preprocessing, against a loop over Pillow in one process.

    python benchmarks/preprocess.py [--images 4000] [--side 512] [--to 224] [--repeats 3]

Prints images per second of both in interleaved repeats, their ratio, the peak memory of FadeFormer in a new process,
and whether one thread, all threads and a run that was killed and resumed write identical files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet  # noqa: F401  imported here so that the import is not timed
from PIL import Image

from fadeformer.data import preprocess

CARD = {"name": "benchmark", "task": "multi-class", "classes": ["a", "b"]}


def write_archive(archive: Path, images: int, side: int) -> None:
    """Write JPEGs of noise on a coarse pattern, which compress like tissue images (about 60 kB at 512 pixels)."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as archive_file:
        for number in range(images):
            coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
            pixels = pixels + random.integers(-12, 13, pixels.shape, dtype=np.int16)
            buffer = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
            archive_file.writestr(f"{number:06}.jpg", buffer.getvalue())


def manifest(archive: Path) -> pd.DataFrame:
    """Return a manifest of all images of an archive, 70 % in train."""
    with zipfile.ZipFile(archive) as archive_file:
        names = archive_file.namelist()
    split = np.array(["train"] * 7 + ["val"] + ["test"] * 2)[np.arange(len(names)) % 10]
    rows = pd.DataFrame({"path": archive.name, "member": names, "split": split, "id": names, "group": None, "label": 0})
    return rows.sort_values("split", key=lambda s: s.map({"train": 0, "val": 1, "test": 2}), kind="stable")


def run_preprocess(archive: Path, side: int, folder: Path, threads: int | None = None) -> None:
    """Run the preprocess stage's function."""
    folder.mkdir(exist_ok=True)
    preprocess.write_arrays(
        CARD, manifest(archive).reset_index(drop=True), archive.parent, image_size=side, channels=3, aspect="squash",
        threads=threads, split="published", cross_split_duplicates=0, folder=folder,
    )  # fmt: skip


def run_pillow_loop(archive: Path, side: int, path: Path) -> None:
    """Decode and resize one image after the other, as a simple script does."""
    with zipfile.ZipFile(archive) as archive_file, path.open("wb") as file:
        for name in archive_file.namelist():
            image = Image.open(io.BytesIO(archive_file.read(name))).convert("RGB")
            file.write(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).tobytes())


def digest(folder: Path) -> str:
    """Return the hash of all arrays of a folder."""
    return hashlib.sha256(b"".join((folder / f"{s}.npy").read_bytes() for s in ("train", "val", "test"))).hexdigest()


def run_in_process(task: str, *arguments: object) -> str:
    """Run one of the functions above in a new process; return its last line of output."""
    command = [sys.executable, __file__, "--work", task, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def kill_and_resume(archive: Path, side: int, folder: Path) -> bool:
    """Kill preprocessing after its first progress file, and resume it; return True if it was killed midway."""
    command = [sys.executable, __file__, "--work", "fadeformer", str(archive), str(side), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "done.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_midway = (folder / "done.npy").exists()
    run_preprocess(archive, side, folder)
    return killed_midway


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--to", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=4, metavar=("NAME", "ARCHIVE", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, archive, side, folder = args.work
        start = time.perf_counter()
        {"fadeformer": run_preprocess, "pillow": run_pillow_loop}[name](Path(archive), int(side), Path(folder))
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        archive = base / "images.zip"
        write_archive(archive, args.images, args.side)
        seconds: dict[str, list[float]] = {"fadeformer": [], "pillow": []}
        peaks = []
        for repeat in range(args.repeats):
            for name in seconds:
                elapsed, peak = map(float, run_in_process(name, archive, args.to, base / f"{name}-{repeat}").split())
                seconds[name].append(elapsed)
                peaks += [peak] if name == "fadeformer" else []
        rates = {name: args.images / statistics.median(times) for name, times in seconds.items()}
        print(f"{args.images} JPEGs of {args.side} pixels to {args.to}, {os.cpu_count()} cores")
        ratio = rates["fadeformer"] / rates["pillow"]
        print(f"FadeFormer {rates['fadeformer']:.0f} images/s, Pillow in a loop {rates['pillow']:.0f}: {ratio:.2f}")
        print(f"peak memory {max(peaks):.0f} MiB")
        run_preprocess(archive, args.to, base / "single", threads=1)
        killed_midway = kill_and_resume(archive, args.to, base / "killed")
        digests = {digest(base / name) for name in ("fadeformer-0", "single", "killed")}
        when = "midway" if killed_midway else "TOO LATE"
        outcome = "identical files" if len(digests) == 1 else "DIFFERENT FILES"
        print(f"one thread, {os.cpu_count()} threads, killed {when} and resumed: {outcome}")


if __name__ == "__main__":
    main()
