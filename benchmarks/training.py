"""Throughput of the training loop, against a plain PyTorch loop, in images per second.

    python benchmarks/training.py [--images 640] [--repeats 5] [--threads 2]

The baseline is a typical user's loop: a Dataset of single images, torchvision's v2 transforms on Pillow images, a
DataLoader (without workers, or with as many as threads, whichever is faster), and forward, loss, backward, step. Both
train the same model on the same images in float32 on the CPU, with the augmentation, batch size, optimizer and
learning rate of params.yaml, and compute loss and accuracy. Epochs are interleaved; the first of each is a warm-up.
Validation and checkpoints are excluded.
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
from pipelines.environment import configure_environment

if __name__ == "__main__":  # before MLflow is imported, to disable its telemetry
    configure_environment()

from pipelines import paths
from pipelines.stages import train_worker

CPU = torch.device("cpu")
TASK = TASKS["multi-class"]
CLASSES = 5


def some_images(count: int, size: int) -> SplitArrays:
    """Return images of noise with balanced classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return SplitArrays(pixels, np.arange(count)[:, None] % CLASSES, pd.DataFrame(index=range(count)))


def create_network(backbone: str, size: int, config: Params) -> nn.Module:
    """Create a model; fadevit_nano has the Fade layers of params.yaml, other backbones none."""
    torch.manual_seed(config.seed)
    fade = config.model.fade.model_dump() if config.model.fade and backbone == "fadevit_nano" else None
    return create_model(
        backbone=backbone, num_classes=CLASSES, image_size=size, in_chans=3, pretrained=False,
        dropout=config.model.dropout, drop_path=config.model.drop_path, fade=fade,
    )  # fmt: skip


class PlainDataset(Dataset[tuple[Tensor, int]]):
    """Single images and labels."""

    def __init__(self, images: SplitArrays, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images.images[row])), int(self.images.labels[row, 0])


def plain_transform(augmentation: Augmentation) -> v2.Compose:
    """Return the same augmentation with torchvision's transforms, except for reflection padding, which they lack."""
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
    """Yield the seconds of each epoch of the plain loop."""
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
        start, total, correct = time.perf_counter(), 0.0, 0
        model.train()
        for batch, labels in loader:
            optimizer.zero_grad()
            logits = model(batch)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(labels)
            correct += int((logits.argmax(1) == labels).sum().item())
        yield time.perf_counter() - start


def fit_epochs(model: nn.Module, images: SplitArrays, augmentation: Augmentation, recipe: Recipe) -> Iterator[float]:
    """Yield the seconds of training in each epoch of `fit`, deterministic like the train stage."""
    val = SplitArrays(images.images[: 4 * CLASSES], images.labels[: 4 * CLASSES], images.index[: 4 * CLASSES])
    epochs = loop.fit(
        create_training_state(model, recipe), images, val, task=TASK, recipe=recipe, class_weights=np.ones(CLASSES),
        augmentation=augmentation, normalization=IMAGENET, seed=0, fabric=create_fabric(CPU),
    )  # fmt: skip
    while True:
        torch.use_deterministic_algorithms(True)
        result = next(epochs)
        torch.use_deterministic_algorithms(False)
        yield result.train_seconds


def compare(backbone: str, size: int, config: Params, count: int, repeats: int) -> dict[str, list[float]]:
    """Return images per second of each loop in each epoch."""
    images = some_images(count, size)
    recipe = Recipe(**config.train.model_dump(exclude=set(train_worker.NOT_IN_RECIPE)))
    recipe = replace(recipe, epochs=repeats + 1, early_stopping_patience=repeats + 1)
    augment_options = config.augment.model_dump() | {"horizontal_flip": 0.5}
    common = images, Augmentation(**augment_options), recipe
    threads = torch.get_num_threads()
    loops = {
        "FadeFormer": fit_epochs(create_network(backbone, size, config), *common),
        "plain, no worker": plain_epochs(create_network(backbone, size, config), *common, workers=0),
        f"plain, {threads} worker(s)": plain_epochs(create_network(backbone, size, config), *common, workers=threads),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats + 1):
        for name, epochs in loops.items():
            rates[name].append(count / next(epochs))
    return {name: values[1:] for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--networks", nargs="+", default=["fadevit_nano", "resnet18"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[28, 64], help="sides of the images, pixels")
    args = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # no message about the precision
    torch.set_num_threads(args.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as the train stage does
    config = schema.load_params(paths.PARAMS)
    print(f"images/s, median of {args.repeats} epochs of {args.images} images, {args.threads} threads")
    print("| model | pixels | FadeFormer | plain, no worker | plain, workers | FadeFormer / faster plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for backbone in args.networks:
        for size in args.sizes:
            rates = compare(backbone, size, config, args.images, args.repeats)
            own_rate, *plain_rates = (statistics.median(values) for values in rates.values())
            cells = " | ".join(f"{rate:.0f}" for rate in (own_rate, *plain_rates))
            print(f"| {backbone} | {size} | {cells} | {own_rate / max(plain_rates):.2f} |", flush=True)


if __name__ == "__main__":
    main()
