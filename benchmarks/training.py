"""The training loop against a plain PyTorch loop, images per second.

    python benchmarks/training.py [--images 640] [--repeats 5] [--threads 2]

The rival is what a user would write: a Dataset of one image at a time, torchvision's v2 transforms on Pillow images, a
DataLoader (without workers, or with as many as threads, whichever is faster), and a loop of forward, loss, backward,
step. Both train the same network on the same images in float32 on the CPU, with the augmentation, batch size, optimizer
and learning rate of params.yaml, and count loss and accuracy. They take turns, epoch by epoch; the first epoch of each
does not count. Validation and checkpoints are left out of both.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms import InterpolationMode, v2

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import IMAGENET
from fadeformer.models.factory import create_model
from fadeformer.tasks import TASKS
from fadeformer.training import loop
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.distributed import create_fabric
from fadeformer.training.sampling import sampling_weights
from fadeformer.training.state import Recipe, create_training_state
from pipelines import paths
from pipelines.stages import train_worker

CPU = torch.device("cpu")
TASK = TASKS["multi-class"]
CLASSES = 5


def some_images(count: int, size: int) -> SplitArrays:
    """Noise, of classes as even as can be."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return SplitArrays(pixels, np.arange(count)[:, None] % CLASSES, pd.DataFrame(index=range(count)))


def network(backbone: str, size: int, wanted: Params) -> nn.Module:
    """A network with the Fade layers of params.yaml if it is fadevit_nano, else without."""
    torch.manual_seed(wanted.seed)
    fade = wanted.model.fade.model_dump() if wanted.model.fade and backbone == "fadevit_nano" else None
    return create_model(
        backbone=backbone, num_classes=CLASSES, image_size=size, in_chans=3, pretrained=False,
        dropout=wanted.model.dropout, drop_path=wanted.model.drop_path, fade=fade,
    )  # fmt: skip


class PlainDataset(Dataset[tuple[Tensor, int]]):
    """Images and labels, one by one."""

    def __init__(self, images: SplitArrays, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images.images[row])), int(self.images.labels[row, 0])


def plain_transform(augmentation: Augmentation) -> v2.Compose:
    """The same changes by torchvision, which has no reflection beyond the edges."""
    shift = augmentation.translate
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(augmentation.horizontal_flip),
            v2.RandomAffine(
                augmentation.rotation, (shift, shift), (1 - augmentation.scale, 1 + augmentation.scale),
                interpolation=InterpolationMode(augmentation.interpolation),
            ),
            v2.ColorJitter(augmentation.brightness, augmentation.contrast, augmentation.saturation),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )  # fmt: skip


def plain_epochs(
    model: nn.Module, images: SplitArrays, augmentation: Augmentation, recipe: Recipe, workers: int
) -> Iterator[float]:
    """Seconds of each epoch of the plain loop."""
    weights = sampling_weights(images.labels, TASK)
    sampler = WeightedRandomSampler(weights.tolist(), len(weights)) if recipe.sampling == "weighted" else None
    dataset = PlainDataset(images, plain_transform(augmentation))
    loader = DataLoader(
        dataset, recipe.batch_size, shuffle=sampler is None, sampler=sampler, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    optimizer = create_training_state(model, recipe).optimizer
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(loader))
    criterion = nn.CrossEntropyLoss()
    while True:
        began, total, right = time.perf_counter(), 0.0, 0
        model.train()
        for batch, labels in loader:
            optimizer.zero_grad()
            logits = model(batch)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum().item())
        yield time.perf_counter() - began


def our_epochs(model: nn.Module, images: SplitArrays, augmentation: Augmentation, recipe: Recipe) -> Iterator[float]:
    """Seconds of the training part of each epoch of ours, deterministic as the train stage is."""
    few = SplitArrays(images.images[: 4 * CLASSES], images.labels[: 4 * CLASSES], images.index[: 4 * CLASSES])
    epochs = loop.fit(
        create_training_state(model, recipe), images, few, task=TASK, recipe=recipe, class_weights=np.ones(CLASSES),
        augmentation=augmentation, normalization=IMAGENET, seed=0, fabric=create_fabric(CPU),
    )  # fmt: skip
    while True:
        torch.use_deterministic_algorithms(True)
        result = next(epochs)
        torch.use_deterministic_algorithms(False)
        yield result.train_seconds


def compare(backbone: str, size: int, wanted: Params, count: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of each loop in each epoch."""
    images = some_images(count, size)
    recipe = Recipe(**wanted.train.model_dump(exclude=set(train_worker.NOT_IN_RECIPE)))
    recipe = replace(recipe, epochs=repeats + 1, early_stopping_patience=repeats + 1)
    chosen = wanted.augment.model_dump() | {"horizontal_flip": 0.5}
    given = images, Augmentation(**chosen), recipe
    threads = torch.get_num_threads()
    loops = {
        "ours": our_epochs(network(backbone, size, wanted), *given),
        "plain, no worker": plain_epochs(network(backbone, size, wanted), *given, workers=0),
        f"plain, {threads} worker(s)": plain_epochs(network(backbone, size, wanted), *given, workers=threads),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats + 1):
        for name, epochs in loops.items():
            rates[name].append(count / next(epochs))
    return {name: each[1:] for name, each in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--networks", nargs="+", default=["fadevit_nano", "resnet18"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[28, 64], help="sides of the images, pixels")
    arguments = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the train stage does
    wanted = schema.load_params(paths.PARAMS)
    print(f"images/s, median of {arguments.repeats} epochs of {arguments.images} images, {arguments.threads} threads")
    print("| network | pixels | ours | plain, no worker | plain, workers | ours / the faster plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for backbone in arguments.networks:
        for size in arguments.sizes:
            rates = compare(backbone, size, wanted, arguments.images, arguments.repeats)
            ours, *plain = (statistics.median(each) for each in rates.values())
            shown = " | ".join(f"{rate:.0f}" for rate in (ours, *plain))
            print(f"| {backbone} | {size} | {shown} | {ours / max(plain):.2f} |", flush=True)


if __name__ == "__main__":
    main()
