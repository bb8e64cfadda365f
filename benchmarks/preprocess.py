"""How fast images become arrays, and in how much memory: ours against a loop over Pillow in one process.

    python benchmarks/preprocess.py [--images 4000] [--side 512] [--to 224] [--repeats 3]

Prints images per second of both, taken in turns, their ratio, the peak memory of ours in a process of its own, and
whether one thread and two, and a run that was killed and taken up again, left the same bytes.
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
import pyarrow.parquet  # noqa: F401  the stage has read its manifest before; no import is part of the time
from PIL import Image

from fadeformer.data import preprocess

CARD = {"name": "benchmark", "task": "multi-class", "classes": ["a", "b"]}


def make(archive: Path, images: int, side: int) -> None:
    """Photographs of noise on a coarse pattern, which compress as those of tissue do (about 60 kB at 512 pixels)."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for number in range(images):
            coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
            pixels = pixels + random.integers(-12, 13, pixels.shape, dtype=np.int16)
            held = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(held, "JPEG", quality=85)
            packed.writestr(f"{number:06}.jpg", held.getvalue())


def manifest(archive: Path) -> pd.DataFrame:
    """All of an archive, seven of ten images for train."""
    with zipfile.ZipFile(archive) as packed:
        names = packed.namelist()
    split = np.array(["train"] * 7 + ["val"] + ["test"] * 2)[np.arange(len(names)) % 10]
    rows = pd.DataFrame({"path": archive.name, "member": names, "split": split, "id": names, "group": None, "label": 0})
    return rows.sort_values("split", key=lambda s: s.map({"train": 0, "val": 1, "test": 2}), kind="stable")


def ours(archive: Path, side: int, folder: Path, threads: int | None = None) -> None:
    """The preprocess stage's work."""
    folder.mkdir(exist_ok=True)
    preprocess.write_arrays(
        CARD, manifest(archive).reset_index(drop=True), archive.parent, image_size=side, channels=3, aspect="squash",
        threads=threads, split="published", cross_split_duplicates=0, folder=folder,
    )  # fmt: skip


def rival(archive: Path, side: int, path: Path) -> None:
    """Decodes and resizes one image after the other, as a first script would."""
    with zipfile.ZipFile(archive) as packed, path.open("wb") as file:
        for name in packed.namelist():
            image = Image.open(io.BytesIO(packed.read(name))).convert("RGB")
            file.write(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).tobytes())


def digest(folder: Path) -> str:
    """Of all arrays of a folder."""
    return hashlib.sha256(b"".join((folder / f"{s}.npy").read_bytes() for s in ("train", "val", "test"))).hexdigest()


def measured(work: str, *arguments: object) -> str:
    """Runs one of the functions above in a process of its own; its last line of output."""
    command = [sys.executable, __file__, "--work", work, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def killed(archive: Path, side: int, folder: Path) -> bool:
    """Kills our work once something was noted, and takes it up again; whether it was killed in the middle."""
    command = [sys.executable, __file__, "--work", "ours", str(archive), str(side), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "done.npy").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    middle = (folder / "done.npy").exists()
    ours(archive, side, folder)
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--to", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=4, metavar=("NAME", "ARCHIVE", "SIDE", "FOLDER"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.work:
        name, archive, side, folder = wanted.work
        began = time.perf_counter()
        {"ours": ours, "rival": rival}[name](Path(archive), int(side), Path(folder))
        seconds = time.perf_counter() - began
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        archive = base / "images.zip"
        make(archive, wanted.images, wanted.side)
        seconds: dict[str, list[float]] = {"ours": [], "rival": []}
        peaks = []
        for repeat in range(wanted.repeats):
            for name in seconds:
                took, peak = map(float, measured(name, archive, wanted.to, base / f"{name}-{repeat}").split())
                seconds[name].append(took)
                peaks += [peak] if name == "ours" else []
        rates = {name: wanted.images / statistics.median(times) for name, times in seconds.items()}
        print(f"{wanted.images} JPEGs of {wanted.side} pixels to {wanted.to}, {os.cpu_count()} cores")
        ratio = rates["ours"] / rates["rival"]
        print(f"ours {rates['ours']:.0f} images/s, Pillow in a loop {rates['rival']:.0f}: {ratio:.2f}")
        print(f"peak memory {max(peaks):.0f} MiB")
        ours(archive, wanted.to, base / "one", threads=1)
        middle = killed(archive, wanted.to, base / "killed")
        same = {digest(base / name) for name in ("ours-0", "one", "killed")}
        when = "in the middle" if middle else "TOO LATE"
        outcome = "the same bytes" if len(same) == 1 else "DIFFERENT BYTES"
        print(f"one thread, {os.cpu_count()} threads, killed {when} and taken up: {outcome}")


if __name__ == "__main__":
    main()
