"""Which altered copies of real images the data gate finds, and which other images it takes for copies.

    python benchmarks/near_duplicates.py FOLDER [--images 200]

FOLDER holds `isic2019/ISIC_2019_Training_Input.zip`, `chestxray14/images_001.tar.gz`, `mednist/mednist.zip` and
`medmnist/retinamnist.npz`; those that are missing are left out. Of each set some images are drawn, altered, and looked
for among all by `fadeformer.data.near_duplicates`.
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
SETS = {
    "isic2019": "isic2019/ISIC_2019_Training_Input.zip", "chestxray14": "chestxray14/images_001.tar.gz",
    "mednist": "mednist/mednist.zip", "retinamnist": "medmnist/retinamnist.npz",
}  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return Image.open(held)


def shifted(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.roll(np.asarray(image), 1, axis=1))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 75": lambda x: jpeg(x, 75),
    "JPEG, quality 30": lambda x: jpeg(x, 30),
    "shifted by a pixel": shifted,
    "cropped by a pixel, two sides": lambda x: x.crop((1, 1, *x.size)),
    "15 % brighter": lambda x: ImageEnhance.Brightness(x).enhance(1.15),
    "30 % brighter": lambda x: ImageEnhance.Brightness(x).enhance(1.3),
    "20 % more contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.2),
    "twice the size": lambda x: x.resize((2 * x.width, 2 * x.height), Image.Resampling.BICUBIC),
    "half the size": lambda x: x.resize((x.width // 2, x.height // 2), Image.Resampling.BILINEAR),
    "mirrored": lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def drawn(path: Path, count: int) -> Iterator[Image.Image]:
    """Some images of a set, spread over it."""
    if path.suffix == ".npz":
        pixels = np.load(path)["train_images"]
        yield from (Image.fromarray(pixels[i]) for i in np.linspace(0, len(pixels) - 1, count).astype(int))
        return
    names = [member.name for member in reader.list_members(path) if member.name.lower().endswith(SUFFIXES)]
    chosen = {names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)}
    for _, data in reader.iter_members(path, chosen.__contains__):
        with Image.open(io.BytesIO(data)) as image:
            yield image.convert("L" if image.mode.startswith(("L", "I")) else "RGB")


def found(
    originals: list[near_duplicates.ImageSignature], copies: list[near_duplicates.ImageSignature], least: float
) -> float:
    """Share of the copies that are a pair with their original."""
    pairs = near_duplicates.find_near_duplicates([*originals, *copies], least)
    told = set(zip(pairs["first"], pairs["second"], strict=True))
    return float(np.mean([(i, i + len(originals)) in told for i in range(len(originals))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    wanted = parser.parse_args()
    least = schema.load_params(ROOT / "params.yaml").validate_.near_duplicate_similarity
    columns = {}
    for name, place in SETS.items():
        if not (wanted.folder / place).exists():
            print(f"{name}: {wanted.folder / place} is not there, left out")
            continue
        images = list(drawn(wanted.folder / place, wanted.images))
        sketches = [near_duplicates.compute_signature(image) for image in images]
        shares = {"other images": str(len(near_duplicates.find_near_duplicates(sketches, least)))}
        for kind, change in COPIES.items():
            copies = [change(image) for image in images]
            small = min(min(copy.size) for copy in copies) < near_duplicates.MIN_SIDE
            shares[kind] = (
                "too small"
                if small
                else f"{found(sketches, [*map(near_duplicates.compute_signature, copies)], least):.3f}"
            )
        columns[f"{name} {images[0].width} x {images[0].height}"] = shares
    print(f"| share found, or pairs among the {wanted.images} images | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for kind in ("other images", *COPIES):
        print(f"| {kind} | {' | '.join(shares[kind] for shares in columns.values())} |")


if __name__ == "__main__":
    main()
