"""Recall, false positives and cost of near-duplicate detection.

    python benchmarks/near_duplicates.py FOLDER [--images 200]
    python benchmarks/near_duplicates.py --synthetic 100000

FOLDER contains `isic2019/ISIC_2019_Training_Input.zip`, `chestxray14/images_001.tar.gz`, `mednist/mednist.zip` and
`medmnist/retinamnist.npz`; missing files are skipped. A sample of each dataset is altered, and the copies are searched
among all images by `fadeformer.data.near_duplicates`. With `--synthetic`, it prints the time and peak memory for that
many synthetic images, of which one in a thousand has a copy that is turned by a right angle.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fadeformer.config import schema
from fadeformer.data import near_duplicates
from fadeformer.data.archives import reader

ROOT = Path(__file__).resolve().parents[1]
DATASETS = {
    "isic2019": "isic2019/ISIC_2019_Training_Input.zip", "chestxray14": "chestxray14/images_001.tar.gz",
    "mednist": "mednist/mednist.zip", "retinamnist": "medmnist/retinamnist.npz",
}  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def shift_by_pixel(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), 1, axis=1))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 75": lambda x: jpeg(x, 75),
    "JPEG, quality 30": lambda x: jpeg(x, 30),
    "shifted by a pixel": shift_by_pixel,
    "cropped by a pixel, two sides": lambda x: x.crop((1, 1, *x.size)),
    "15 % brighter": lambda x: ImageEnhance.Brightness(x).enhance(1.15),
    "30 % brighter": lambda x: ImageEnhance.Brightness(x).enhance(1.3),
    "20 % more contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.2),
    "twice the size": lambda x: x.resize((2 * x.width, 2 * x.height), Image.Resampling.BICUBIC),
    "half the size": lambda x: x.resize((x.width // 2, x.height // 2), Image.Resampling.BILINEAR),
    "mirrored": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "quarter turn": lambda x: x.transpose(Image.Transpose.ROTATE_90),
    "rotated by 5 degrees": lambda x: x.rotate(5, Image.Resampling.BILINEAR),
    "rotated by 15 degrees": lambda x: x.rotate(15, Image.Resampling.BILINEAR),
    "shifted by a tenth": lambda x: x.transform(
        x.size, Image.Transform.AFFINE, (1, 0, 0.1 * x.width, 0, 1, -0.1 * x.height)
    ),
    "cropped by a tenth": lambda x: x.resize(
        x.size, Image.Resampling.BILINEAR, (0.05 * x.width, 0.05 * x.height, 0.95 * x.width, 0.95 * x.height)
    ),
    "inverted": ImageOps.invert,
}


def sample_images(path: Path, count: int) -> Iterator[Image.Image]:
    """Yield evenly spaced images of a dataset."""
    if path.suffix == ".npz":
        pixels = np.load(path)["train_images"]
        yield from (Image.fromarray(pixels[i]) for i in np.linspace(0, len(pixels) - 1, count).astype(int))
        return
    names = [member.name for member in reader.list_members(path) if member.name.lower().endswith(SUFFIXES)]
    chosen = {names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)}
    for _, data in reader.iter_members(path, chosen.__contains__):
        with Image.open(io.BytesIO(data)) as image:
            yield image.convert("L" if image.mode.startswith(("L", "I")) else "RGB")


def recall(
    originals: list[near_duplicates.ImageSignature], copies: list[near_duplicates.ImageSignature], threshold: float
) -> float:
    """Return the fraction of copies that are detected as near-duplicates of their original."""
    pairs = near_duplicates.find_near_duplicates([*originals, *copies], threshold)
    detected = set(zip(pairs["first"], pairs["second"], strict=True))
    return float(np.mean([(i, i + len(originals)) in detected for i in range(len(originals))]))


def measure_cost(count: int, threshold: float) -> None:
    """Print time and peak memory for synthetic images."""
    random, images = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC)) + random.normal(0, 4, (64, 64))
        is_copy = number % 1000 == 50
        images.append(
            images[-1].transpose(Image.Transpose.ROTATE_90)
            if is_copy
            else Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        )
    start = time.perf_counter()
    signatures = [near_duplicates.compute_signature(image) for image in images]
    middle = time.perf_counter()
    pairs = near_duplicates.find_near_duplicates(signatures, threshold)
    end, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count:,} images: thumbnails {middle - start:.1f} s, search {end - middle:.1f} s, peak {memory:.2f} GiB,")
    print(f"{len(pairs)} pairs found, {(count + 949) // 1000} copies made")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--synthetic", type=int, metavar="COUNT")
    args = parser.parse_args()
    threshold = schema.load_params(ROOT / "params.yaml").validate_.near_duplicate_similarity
    if args.synthetic:
        measure_cost(args.synthetic, threshold)
    if args.folder is None:
        return
    columns = {}
    for name, file in DATASETS.items():
        if not (args.folder / file).exists():
            print(f"{name}: skipped, {args.folder / file} does not exist")
            continue
        images = list(sample_images(args.folder / file, args.images))
        signatures = [near_duplicates.compute_signature(image) for image in images]
        cells = {"other images": str(len(near_duplicates.find_near_duplicates(signatures, threshold)))}
        for alteration, alter in COPIES.items():
            copies = [alter(image) for image in images]
            if min(min(copy.size) for copy in copies) < near_duplicates.MIN_SIDE:
                cells[alteration] = "too small"
            else:
                copy_signatures = [near_duplicates.compute_signature(copy) for copy in copies]
                cells[alteration] = f"{recall(signatures, copy_signatures, threshold):.3f}"
        columns[f"{name} {images[0].width} x {images[0].height}"] = cells
    print(f"| recall; for other images, pairs among {args.images} | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for alteration in ("other images", *COPIES):
        print(f"| {alteration} | {' | '.join(cells[alteration] for cells in columns.values())} |")


if __name__ == "__main__":
    main()
