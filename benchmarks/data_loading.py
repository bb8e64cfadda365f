"""Throughput of data loading and augmentation, against torchvision's transforms image by image.

    python benchmarks/data_loading.py [--images 320] [--side 512] [--to 224] [--batch 32] [--repeats 5] [--device cpu]

The baseline is the published loader: JPEG files, decoded by Pillow, augmented by torchvision's v1 transforms, stacked.
FadeFormer reads the array of the preprocess stage in random order and augments with the same recipe, on one CPU core
like the baseline, or on the device of the model, where the host only gathers pixels and computes parameters. All use
one thread. Prints images per second (median of interleaved repeats, and range), the ratio to the baseline, and the
ratio with the one-off decoding spread over the epochs of a run.
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

EPOCHS = 25  # epochs of the published run
RECIPE = {  # pipelines/config/presets/paper.yaml
    "horizontal_flip": 0.5, "rotation": 15.0, "scale": 0.0, "translate": 0.0, "border": "zeros",
    "interpolation": "nearest", "brightness": 0.15, "contrast": 0.15, "saturation": 0.15, "erasing": 0.4,
    "erasing_scale": (0.02, 0.12), "randaugment_operations": 0, "randaugment_magnitude": 9, "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip


def write_images(folder: Path, images: int, side: int) -> list[Path]:
    """Write JPEGs of noise on a coarse pattern, which compress like tissue images (about 60 kB at 512 pixels)."""
    random = np.random.default_rng(0)
    paths = [folder / f"{number:06}.jpg" for number in range(images)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        pixels = pixels + random.integers(-12, 13, pixels.shape, dtype=np.int16)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def decode_images(paths: list[Path], to: int) -> np.ndarray:
    """Decode and resize by Pillow, as the preprocess stage does once."""
    return np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((to, to), Image.Resampling.BILINEAR)) for path in paths]
    )


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield full batches of row numbers in random order."""
    rows = np.random.default_rng(seed).permutation(count)
    yield from (rows[start : start + size] for start in range(0, count - size + 1, size))


def run_published_loader(paths: list[Path], to: int, size: int, seed: int) -> None:
    """Run the published loader in one process and thread."""
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


class ArrayLoader:
    """FadeFormer's loader: a memory-mapped array, and a buffer for the batches."""

    def __init__(self, path: Path, size: int, device: torch.device) -> None:
        self.pixels = np.load(path, mmap_mode="r").view(np.ndarray)
        self.size, self.device = size, device
        buffer = torch.empty((size, *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.buffer, self.filled = buffer, buffer.numpy()

    def gather(self, seed: int) -> Iterator[torch.Tensor]:
        for rows in batches(len(self.pixels), self.size, seed):
            np.take(self.pixels, rows, axis=0, out=self.filled, mode="clip")  # other modes make a temporary copy
            yield self.buffer

    def run(self, seed: int, device: torch.device, **changes: object) -> None:
        """Gather and augment all batches on a device."""
        augmentation = Augmentation(**{**RECIPE, **changes})
        for number, images in enumerate(self.gather(seed)):
            augmentation(images.to(device, non_blocking=True), augmentation.draw_uniforms(self.size, number), IMAGENET)
            if device.type == "cuda":
                torch.cuda.synchronize()  # before the buffer is reused

    def run_host_part(self, seed: int) -> None:
        """Run the host's part of augmentation on a device: gather, draw, compute parameters."""
        augmentation = Augmentation(**RECIPE)
        height, width = self.pixels.shape[1:3]
        for number, _ in enumerate(self.gather(seed)):
            augmentation.transform_parameters(augmentation.draw_uniforms(self.size, number), height, width)


def rates(tasks: dict[str, Callable[[int], None]], images: int, repeats: int) -> dict[str, list[float]]:
    """Return images per second of each task in interleaved repeats, after a warm-up."""
    results: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task(repeat)
            if repeat:
                results[name].append(images / (time.perf_counter() - start))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--to", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_images(Path(temporary), args.images, args.side)
        start = time.perf_counter()
        array = decode_images(paths, args.to)
        decoding = (time.perf_counter() - start) / args.images
        np.save(Path(temporary) / "train.npy", array)
        loader = ArrayLoader(Path(temporary) / "train.npy", args.batch, device)
        cpu = torch.device("cpu")
        tasks: dict[str, Callable[[int], None]] = {
            "published": lambda seed: run_published_loader(paths, args.to, args.batch, seed),
            "FadeFormer, nearest": lambda seed: loader.run(seed, cpu),
            "FadeFormer, bilinear": lambda seed: loader.run(seed, cpu, interpolation="bilinear"),
            "FadeFormer, host part": loader.run_host_part,
        }
        if device.type == "cuda":
            tasks["FadeFormer, host and GPU"] = lambda seed: loader.run(seed, device)
        results = rates(tasks, args.images // args.batch * args.batch, args.repeats)
    baseline = statistics.median(results["published"])
    print(f"{args.images} JPEGs of {args.side} pixels to {args.to}, batches of {args.batch}, one thread")
    print(f"decoding, once: {1000 * decoding:.2f} ms an image")
    print(f"| input | images/s | spread | ratio | with decoding over {EPOCHS} epochs |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in results.items():
        rate = statistics.median(values)
        with_decoding = rate if name == "published" else 1 / (1 / rate + decoding / EPOCHS)
        spread = f"{min(values):.0f}-{max(values):.0f}"
        print(f"| {name} | {rate:.0f} | {spread} | {rate / baseline:.2f} | {with_decoding / baseline:.2f} |")


if __name__ == "__main__":
    main()
