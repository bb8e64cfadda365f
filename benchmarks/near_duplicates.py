"""Recall and false positives of near-duplicate detection on altered copies of real images.

    python benchmarks/near_duplicates.py FOLDER [--images 200]

FOLDER contains `isic2019/ISIC_2019_Training_Input.zip`, `chestxray14/images_001.tar.gz`, `mednist/mednist.zip` and
`medmnist/retinamnist.npz`; missing files are skipped. A sample of each dataset is altered, and the copies are searched
among all images by `fadeformer.data.near_duplicates`.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    threshold = schema.load_params(ROOT / "params.yaml").validate_.near_duplicate_similarity
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
