"""What of a training is not the network: waiting for images, augmentation, and the loop around them.

    python benchmarks/training.py [--repeats 10] [--threads 2]
    python benchmarks/training.py precision [--epochs 20] [--seeds 1]
    python benchmarks/training.py attention [--repeats 10] [--threads 2]

All three take the demo of params.yaml on the CPU. The first prints the share that each part has of the training part of
an epoch, from the draw of its order to its last step, the progress bar shown (median over epochs, after one that does
not count); and, as a check that needs no timers inside, how long a step of the loop takes against one of a bare loop
over the same batches, ready as tensors: forward, loss, backward, optimiser. The two take turns, epoch by epoch. The
second trains with both precisions from the same seeds and prints the AUC on test. The third compares forward and
backward in bf16 with attention in float32, as it is in training, to the same with attention in bf16, as torch has it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn
from tqdm import tqdm

from fadeformer import arrays, params, training
from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.devices import Measured, make_fabric
from fadeformer.inference import autocast, choose_precision, logits_of
from fadeformer.metrics import auc
from fadeformer.models import create_model
from fadeformer.state import Epoch, Recipe, State, start
from fadeformer.tasks import Task
from pipelines import fitting, overrides, paths

PROJECT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NETWORK = ("forward", "loss", "backward", "optimiser")
IMAGES, AUGMENTATION = "waiting for images", "augmentation and normalisation"
ELSE = ("order", "seeds", "learning rate", "targets and decisions", "sums of the loss", "progress bar", "other")


@dataclass
class Demo:
    """All that a training is made of.

    Attributes:
        network: makes a model from a seed.
        recipe: how it is trained.
        images: of train, val and test.
        options: of `fit`, but for fabric and precision.
        precision: as params.yaml chooses it.
    """

    network: Callable[[int], nn.Module]
    recipe: Recipe
    images: dict[str, Images]
    options: dict[str, Any]
    precision: torch.dtype

    def model(self) -> nn.Module:
        return self.network(self.options["seed"])

    def fit(self, state: State, fabric: Fabric, recipe: Recipe) -> Iterator[Epoch]:
        train, val = self.images["train"], self.images["val"]
        return training.fit(state, train, val, recipe=recipe, fabric=fabric, precision=self.precision, **self.options)


def prepare(folder: Path, **changes: object) -> Demo:
    """The demo as params.yaml has it, prepared by the stages in a folder of its own.

    Args:
        folder: empty.
        changes: of `dataset:`.
    """
    shutil.copy(PROJECT / paths.PARAMS, folder)
    overrides.apply(folder / paths.PARAMS, {"dataset": changes})
    for stage in ("download", "validate", "preprocess"):
        subprocess.run([sys.executable, "-m", "pipelines", stage], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wanted, processed = params.load(folder / paths.PARAMS), folder / paths.PROCESSED
    meta = arrays.read_meta(processed)
    task = meta.task.with_head(wanted.model.head)
    described = wanted.model.model_dump(exclude={"weights", "head", "normalise"})

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        classes = len(meta.classes) - task.spare_outputs
        return create_model(**described, num_classes=classes, image_size=meta.image_size, in_chans=meta.channels)

    images = {split: arrays.read(processed, split) for split in ("train", "val", "test")}
    options = {
        "task": task, "class_weights": fitting.class_weights_of(wanted, meta, task, images["train"].labels),
        "augmentation": fitting.augmentation_of(wanted, meta), "seed": wanted.seed,
        "normalisation": fitting.normalisation_of(wanted.model, meta, network(wanted.seed)),
    }  # fmt: skip
    recipe = Recipe(**wanted.train.model_dump(exclude=set(fitting.ELSEWHERE)))
    return Demo(network, recipe, images, options, choose_precision(wanted.train.precision, CPU))


class Clock:
    """Seconds by part, each without the parts that ran inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.inner = 0.0

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            outer, self.inner = self.inner, 0.0
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self.inner
                self.inner = outer + took

        return timed


@contextmanager
def timed(clock: Clock, fabric: Fabric, task: Task) -> Iterator[Task]:
    """Times the parts of `fit` by what it calls, and has it show its progress bar; gives the task to train with."""
    parts: list[tuple[str, Any, tuple[str, ...]]] = [
        ("forward", _FabricModule, ("__call__",)), ("backward", fabric, ("backward",)),
        ("optimiser", _FabricOptimizer, ("step",)), ("optimiser", torch.optim.Optimizer, ("zero_grad",)),
        (AUGMENTATION, Augmentation, ("draw", "__call__", "mix")),
        ("order", training.batches, ("draw", "shared")),
        ("seeds", training.batches, ("mix",)), ("seeds", torch, ("manual_seed",)),
        ("learning rate", training, ("set_learning_rate",)), ("targets and decisions", Task, ("smooth",)),
        ("sums of the loss", Measured, ("__init__", "add", "send", "read")),
        ("progress bar", training, ("_bar",)), ("progress bar", tqdm, ("set_postfix", "update", "close")),
    ]  # fmt: skip
    feed = training.batches.feed

    def fed(*arguments: Any) -> Iterator[Tensor]:
        following = clock.around(IMAGES, functools.partial(next, feed(*arguments), None))
        while (images := following()) is not None:
            yield images

    with ExitStack() as patches, Path(os.devnull).open("w") as nowhere:

        def shown(**options: Any) -> Any:
            return tqdm(**{**options, "disable": False, "file": nowhere})

        patches.enter_context(mock.patch.object(training, "tqdm", shown))
        patches.enter_context(mock.patch.object(training.batches, "feed", fed))
        for part, owner, names in parts:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, clock.around(part, getattr(owner, name))))
        yield replace(
            task, losses=clock.around("loss", task.losses), targets=clock.around("targets and decisions", task.targets),
            right=clock.around("targets and decisions", task.right),
        )  # fmt: skip


def record(demo: Demo, fabric: Fabric) -> list[tuple[Tensor, Tensor]]:
    """What the network and the loss get in one epoch: augmented images and targets of each batch."""
    seen, wanted = [], []
    losses, forward = demo.options["task"].losses, _FabricModule.__call__

    def called(model: nn.Module, images: Tensor) -> Any:
        seen.append(images)
        return forward(model, images)

    def lost(logits: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        wanted.append(targets)
        return losses(logits, targets, *rest)

    recording = replace(demo, options={**demo.options, "task": replace(demo.options["task"], losses=lost)})
    with mock.patch.object(_FabricModule, "__call__", called):
        recipe = replace(demo.recipe, epochs=1)
        list(recording.fit(start(demo.model(), recipe), fabric, recipe))
    return list(zip(seen, wanted, strict=True))


def bare(demo: Demo, state: State, batches: list[tuple[Tensor, Tensor]]) -> None:
    """An epoch of what no training can do without."""
    weights = torch.tensor(demo.options["class_weights"], dtype=torch.float32)
    state.model.train()
    for images, targets in batches:
        with autocast(CPU, demo.precision):
            logits = state.model(images)
        demo.options["task"].losses(logits.float(), targets, weights, demo.recipe.focal_gamma).mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)


def measure(demo: Demo, repeats: int) -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Seconds of a step and share by part, and ratios of the loop to the bare one: of wall and of processor time."""
    fabric = make_fabric(CPU, demo.precision)
    batches = record(demo, fabric)
    recipe = replace(demo.recipe, epochs=repeats + 1, early_stopping_patience=repeats + 1)
    clock, ended = Clock(), np.zeros(2)
    loop, alone = (start(demo.model(), recipe) for _ in range(2))
    predict = training.predict_together

    def predicted(*arguments: Any, **options: Any) -> Any:
        nonlocal ended
        ended = now()
        return predict(*arguments, **options)

    def now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    epochs, ratios = [], []
    with timed(clock, fabric, demo.options["task"]) as task, mock.patch.object(training, "predict_together", predicted):
        epochs_of_loop = replace(demo, options={**demo.options, "task": task}).fit(loop, fabric, recipe)
        for _ in range(recipe.epochs):
            clock.seconds.clear()
            began = now()
            next(epochs_of_loop)
            took = ended - began
            clock.seconds["other"] = took[0] - sum(clock.seconds.values())
            epochs.append(dict(clock.seconds))
            began = now()
            bare(demo, alone, batches)
            ratios.append(took / (now() - began))
        epochs_of_loop.close()
    del epochs[0], ratios[0]  # in which memory and kernels are made ready
    parts = {
        "network": NETWORK, **{name: (name,) for name in (*NETWORK, IMAGES, AUGMENTATION)}, "everything else": ELSE,
        **{name: (name,) for name in ELSE},
    }  # fmt: skip
    of_parts = {title: [sum(epoch[name] for name in names) for epoch in epochs] for title, names in parts.items()}
    in_all = [sum(epoch.values()) for epoch in epochs]
    seconds = {title: statistics.median(each) / len(batches) for title, each in of_parts.items()}
    shares = {
        title: statistics.median(part / whole for part, whole in zip(each, in_all, strict=True))
        for title, each in of_parts.items()
    }
    return seconds, shares, np.median(ratios, axis=0).tolist()


def shares(demo: Demo, repeats: int) -> None:
    seconds, share, (wall, processor) = measure(demo, repeats)
    train = demo.images["train"].pixels
    print(f"{len(train)} images of {train.shape[1]} pixels in batches of {demo.recipe.batch_size}, {demo.precision},")
    print(f"{torch.get_num_threads()} threads, median of {repeats} epochs; load {os.getloadavg()[0]:.1f}")
    print("| part | ms a step | share, % |\n| --- | --- | --- |")
    for title, value in seconds.items():
        inside = "- " if title in NETWORK or title in ELSE else ""
        print(f"| {inside}{title} | {1000 * value:.3f} | {100 * share[title]:.2f} |")
    print(f"a step of the loop takes {wall:.3f} times as long as a bare one, and {processor:.3f} times the processor")


def precision(demo: Demo, epochs: int, seeds: int) -> None:
    """Trains with both precisions from the same seeds."""
    kinds = {name: choose_precision(name, CPU) for name in ("32", "bf16")}
    aucs: dict[str, list[float]] = {name: [] for name in kinds}
    print("| seed | precision | best epoch | AUC on val | AUC on test | s an epoch |\n" + "| --- " * 6 + "|")
    for number, (name, kind) in itertools.product(range(seeds), kinds.items()):
        seed = demo.options["seed"] + number
        of_seed = replace(demo, precision=kind, options={**demo.options, "seed": seed})
        recipe = replace(demo.recipe, epochs=epochs, early_stopping_patience=epochs)
        state = start(of_seed.model(), recipe)
        results = list(of_seed.fit(state, make_fabric(CPU, kind), recipe))
        aucs[name].append(auc_on_test(of_seed, state))
        seconds, best = statistics.median(result.train_seconds for result in results), results[state.best_epoch - 1]
        told = f"{best.epoch} | {best.val_auc:.4f} | {aucs[name][-1]:.4f} | {seconds:.2f}"
        print(f"| {seed} | {name} | {told} |", flush=True)
    differences = [bf16 - full for full, bf16 in zip(aucs["32"], aucs["bf16"], strict=True)]
    spread = f", from one seed to another with 32: {statistics.stdev(aucs['32']):.4f}" if seeds > 1 else ""
    print(f"difference of AUC on test, bf16 - 32: {statistics.mean(differences):+.4f}{spread}")


def attention(demo: Demo, repeats: int) -> None:
    """Forward and backward of the network in bf16, with either attention."""
    images, targets = record(demo, make_fabric(CPU, demo.precision))[0]
    model, weights = demo.model(), torch.tensor(demo.options["class_weights"], dtype=torch.float32)
    kinds = {"float32": autocast, "bf16": lambda device, kind: torch.autocast(device.type, kind)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats + 1):
        for name, mixed in kinds.items():
            began = time.perf_counter()
            with mixed(CPU, torch.bfloat16):
                logits = model(images)
            demo.options["task"].losses(logits.float(), targets, weights, 0.0).mean().backward()
            seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        print(f"attention in {name}: {1000 * statistics.median(each[1:]):.1f} ms forward and backward")
    ratios = [ours / torchs for ours, torchs in zip(seconds["float32"][1:], seconds["bf16"][1:], strict=True)]
    print(f"in float32 it takes {statistics.median(ratios):.2f} of the time")


def auc_on_test(demo: Demo, state: State) -> float:
    """Of the best weights."""
    test, task, normalisation = demo.images["test"], demo.options["task"], demo.options["normalisation"]
    state.model.load_state_dict(state.best_weights)
    logits = logits_of(state.model, test.pixels, demo.recipe.batch_size, CPU, demo.precision, normalisation)
    found = auc(test.labels, task.probabilities(logits), task)
    assert found is not None  # every class is in test
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default="shares", choices=["shares", "precision", "attention"])
    parser.add_argument("--images", type=int, default=2000, help="of the phantom, before they are split")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=10, help="epochs of shares")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--epochs", type=int, default=20, help="of precision")
    parser.add_argument("--seeds", type=int, default=1, help="of precision, from that of params.yaml on")
    wanted = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision
    torch.set_num_threads(wanted.threads)
    torch.use_deterministic_algorithms(True)  # as the stage does
    with tempfile.TemporaryDirectory() as temporary:
        prepared = prepare(Path(temporary), images=wanted.images, size=wanted.size)
        if wanted.table == "shares":
            shares(prepared, wanted.repeats)
        elif wanted.table == "precision":
            precision(prepared, wanted.epochs, wanted.seeds)
        else:
            attention(prepared, wanted.repeats)


if __name__ == "__main__":
    main()
