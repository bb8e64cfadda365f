"""How fast images become augmented, normalised batches: ours against torchvision's transforms, image by image.

    python benchmarks/data_loading.py [--images 320] [--side 512] [--to 224] [--batch 32] [--repeats 5] [--device cpu]

The rival is the published loader: JPEG files, each decoded by Pillow and augmented by torchvision's v1 transforms, then
stacked. Ours reads the array that the preprocess stage left, in random order, and augments by the same recipe:
on the core that the rival had, or on the model's device, where the host only gathers the bytes and draws the
parameters. All use one thread. Prints images per second of each (the median of repeats taken in turns, with the
spread), the ratio to the rival, and that ratio if the one-off decoding is spread over the epochs of a run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from fadeformer.data.normalization import IMAGENET
from fadeformer.training.augmentation import Augmentation

EPOCHS = 25  # of the published run
RECIPE = {  # pipelines/config/presets/paper.yaml
    "horizontal_flip": 0.5, "rotation": 15.0, "scale": 0.0, "translate": 0.0, "border": "zeros",
    "interpolation": "nearest", "brightness": 0.15, "contrast": 0.15, "saturation": 0.15, "erasing": 0.4,
    "erasing_scale": (0.02, 0.12), "randaugment_operations": 0, "randaugment_magnitude": 9, "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip


def make(folder: Path, images: int, side: int) -> list[Path]:
    """Photographs of noise on a coarse pattern, which compress as those of tissue do (about 60 kB at 512 pixels)."""
    random = np.random.default_rng(0)
    paths = [folder / f"{number:06}.jpg" for number in range(images)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        pixels = pixels + random.integers(-12, 13, pixels.shape, dtype=np.int16)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def decoded(paths: list[Path], to: int) -> np.ndarray:
    """What ours does once: Pillow's decoding and resizing."""
    return np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((to, to), Image.Resampling.BILINEAR)) for path in paths]
    )


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Full batches of rows in random order."""
    rows = np.random.default_rng(seed).permutation(count)
    yield from (rows[start : start + size] for start in range(0, count - size + 1, size))


def published(paths: list[Path], to: int, size: int, seed: int) -> None:
    """The published loader, one process, one thread."""
    transform = transforms.Compose(
        [
            transforms.Resize((to, to)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(15),
            transforms.ColorJitter(0.15, 0.15, 0.15),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.std),
            transforms.RandomErasing(p=0.4, scale=(0.02, 0.12)),
        ]
    )
    for rows in batches(len(paths), size, seed):
        torch.stack([transform(Image.open(paths[row]).convert("RGB")) for row in rows])


class Ours:
    """The memory-mapped array, and a buffer that each batch is gathered into."""

    def __init__(self, path: Path, size: int, device: torch.device) -> None:
        self.pixels = np.load(path, mmap_mode="r").view(np.ndarray)
        self.size, self.device = size, device
        buffer = torch.empty((size, *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.buffer, self.filled = buffer, buffer.numpy()

    def gathered(self, seed: int) -> Iterator[torch.Tensor]:
        for rows in batches(len(self.pixels), self.size, seed):
            np.take(self.pixels, rows, axis=0, out=self.filled, mode="clip")  # clip: writes to `out` without a copy
            yield self.buffer

    def augmented(self, seed: int, device: torch.device, **changes: object) -> None:
        """All of the work, on a device."""
        augmentation = Augmentation(**{**RECIPE, **changes})
        for number, images in enumerate(self.gathered(seed)):
            augmentation(images.to(device, non_blocking=True), augmentation.draw_uniforms(self.size, number), IMAGENET)
            if device.type == "cuda":
                torch.cuda.synchronize()  # as the one buffer is filled again

    def host(self, seed: int) -> None:
        """The host's part when the work is the device's: gather, draw, parameters."""
        augmentation = Augmentation(**RECIPE)
        height, width = self.pixels.shape[1:3]
        for number, _ in enumerate(self.gathered(seed)):
            augmentation.transform_parameters(augmentation.draw_uniforms(self.size, number), height, width)


def rates(works: dict[str, Callable[[int], None]], images: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of each, in turns, after a first turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work(repeat)
            if repeat:
                found[name].append(images / (time.perf_counter() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--to", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    wanted = parser.parse_args()
    device = torch.device(wanted.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = make(Path(temporary), wanted.images, wanted.side)
        began = time.perf_counter()
        array = decoded(paths, wanted.to)
        decoding = (time.perf_counter() - began) / wanted.images
        np.save(Path(temporary) / "train.npy", array)
        ours = Ours(Path(temporary) / "train.npy", wanted.batch, device)
        cpu = torch.device("cpu")
        works: dict[str, Callable[[int], None]] = {
            "published": lambda seed: published(paths, wanted.to, wanted.batch, seed),
            "ours, nearest": lambda seed: ours.augmented(seed, cpu),
            "ours, bilinear": lambda seed: ours.augmented(seed, cpu, interpolation="bilinear"),
            "ours, host's part": ours.host,
        }
        if device.type == "cuda":
            works["ours, host and GPU"] = lambda seed: ours.augmented(seed, device)
        found = rates(works, wanted.images // wanted.batch * wanted.batch, wanted.repeats)
    rival = statistics.median(found["published"])
    print(f"{wanted.images} JPEGs of {wanted.side} pixels to {wanted.to}, batches of {wanted.batch}, one thread")
    print(f"decoding, once: {1000 * decoding:.2f} ms an image")
    print(f"| input | images/s | spread | ratio | with decoding over {EPOCHS} epochs |")
    print("| --- | --- | --- | --- | --- |")
    for name, each in found.items():
        rate = statistics.median(each)
        with_decoding = rate if name == "published" else 1 / (1 / rate + decoding / EPOCHS)
        spread = f"{min(each):.0f}-{max(each):.0f}"
        print(f"| {name} | {rate:.0f} | {spread} | {rate / rival:.2f} | {with_decoding / rival:.2f} |")


if __name__ == "__main__":
    main()
