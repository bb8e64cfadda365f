"""RetinaMNIST at 28 pixels from scratch by the preset `retinamnist`, and what FadeAttn has to do with it.

    python benchmarks/retinamnist.py run FILE RUNS       trains what is not in the folder RUNS yet
    python benchmarks/retinamnist.py table FILE RUNS     test AUC and accuracy with intervals

FILE is the published retinamnist.npz. Arms: FadeAttn with alpha learned (as published), with alpha as it starts, and
the plain backbone. The epoch is chosen on val; test is looked at once, after training.
"""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ruamel.yaml import YAML
from diffusion_ablation import bootstrap_aucs, command_line
from scipy import stats

from fadeformer.config import schema
from fadeformer.config.schema import Params
from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import IMAGENET
from fadeformer.evaluation.metrics import accuracy, auc
from fadeformer.inference.forward import choose_precision, predict_logits
from fadeformer.io.atomic import atomic_write, read_json, write_json
from fadeformer.models.factory import create_model
from fadeformer.tasks import TASKS
from fadeformer.training import loop
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.distributed import create_fabric
from fadeformer.training.state import Recipe, create_training_state
from pipelines.stages.train_worker import NOT_IN_RECIPE

PROJECT = Path(__file__).resolve().parents[1]
TASK = TASKS["ordinal-regression"]
ARMS = ("alpha learned", "alpha fixed", "without FadeAttn")
PUBLISHED = {"test_auc": 0.717, "test_accuracy": 0.524}  # ResNet-18 at 28 pixels, Yang et al. 2023, table 3
CPU = torch.device("cpu")
RESAMPLES = 2000


def preset() -> Params:
    """params.yaml as `make preset NAME=retinamnist` leaves it."""
    yaml = YAML(typ="safe")
    values = yaml.load(PROJECT / "params.yaml")
    for section, changes in yaml.load(PROJECT / "pipelines/config/presets/retinamnist.yaml").items():
        values[section].update(changes)
    return schema.parse_params(values, "retinamnist.yaml")


def splits(file: Path) -> dict[str, SplitArrays]:
    with np.load(file, allow_pickle=False) as archive:
        return {
            split: SplitArrays(archive[f"{split}_images"], archive[f"{split}_labels"].astype(np.int64), pd.DataFrame())
            for split in ("train", "val", "test")
        }


def train_and_test(file: Path, runs: Path, arm: str, seed: int, **changes: Any) -> None:
    """Trains one network and looks at test once; leaves a row as JSON, and the test scores."""
    torch.set_num_threads(1)
    wanted, images = preset(), splits(file)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = create_model(
        backbone=wanted.model.backbone, num_classes=5 - TASK.num_omitted_outputs, image_size=28, in_chans=3, pretrained=False,
        dropout=wanted.model.dropout, drop_path=wanted.model.drop_path,
        fade=None if arm == "without FadeAttn" or wanted.model.fade is None else wanted.model.fade.model_dump(),
    )  # fmt: skip
    if arm == "alpha fixed":
        model.attn.alpha.requires_grad_(False)
    recipe = Recipe(**(wanted.train.model_dump(exclude=set(NOT_IN_RECIPE)) | changes))
    precision = choose_precision(wanted.train.precision, CPU)
    state, began = create_training_state(model, recipe), time.perf_counter()
    chosen = wanted.augment.model_dump() | {"erasing_scale": tuple(wanted.augment.erasing_scale)}
    epochs = loop.fit(
        state, images["train"], images["val"], task=TASK, recipe=recipe, class_weights=np.ones(5),
        augmentation=Augmentation(**chosen), normalization=IMAGENET, seed=seed, fabric=create_fabric(CPU, precision),
    )  # fmt: skip
    best = max(epochs, key=lambda epoch: (epoch.epoch == state.best_epoch, epoch.epoch))
    seconds = time.perf_counter() - began
    model.load_state_dict(state.best_weights)
    labels = images["test"].labels
    scores = TASK.probabilities(predict_logits(model, images["test"].images, 256, CPU, IMAGENET))
    row = {
        "arm": arm, "seed": seed, "seconds": seconds, "epoch": state.best_epoch, "val_auc": best.val_auc,
        "val_accuracy": best.val_accuracy, "test_auc": auc(labels, scores, TASK),
        "test_accuracy": accuracy(labels, scores, TASK),
        "alpha": float(model.attn.alpha.detach()) if hasattr(model, "attn") else None,
    }  # fmt: skip
    name = f"{arm.replace(' ', '_')}.{seed}"
    with atomic_write(runs / f"{name}.npy") as path:
        np.save(path, scores)
    write_json(runs / f"{name}.json", row)


def run(file: Path, runs: Path, seeds: int) -> None:
    cases = [(arm, seed) for seed, arm in itertools.product(range(seeds), ARMS)]
    wanted = [case for case in cases if not (runs / f"{case[0].replace(' ', '_')}.{case[1]}.json").is_file()]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for future in as_completed([workers.submit(train_and_test, file, runs, *case) for case in wanted]):
            future.result()


def table(file: Path, runs: Path) -> None:
    """Means over seeds with intervals over seeds (t) and over test images (bootstrap, seeds as they are)."""
    found = pd.DataFrame([read_json(path) for path in sorted(runs.glob("*.json"))])
    labels = splits(file)["test"].labels[:, 0]
    random = np.random.default_rng(0)
    weights = random.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
    scores = {
        (row.arm, row.seed): np.load(runs / f"{row.arm.replace(' ', '_')}.{row.seed}.npy") for row in found.itertuples()
    }
    resampled = {
        "test_auc": {key: bootstrap_aucs(labels, value, weights) for key, value in scores.items()},
        "test_accuracy": {key: weights @ (value.argmax(1) == labels) / len(labels) for key, value in scores.items()},
    }
    print("| | seeds | mean | standard deviation | 95 % over seeds | 95 % over images | published |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for arm, (measure, drawn) in itertools.product(ARMS, resampled.items()):
        values = found.loc[found["arm"] == arm, measure]
        low, high = np.percentile(
            np.mean([drawn[arm, seed] for seed in found.loc[values.index, "seed"]], axis=0), [2.5, 97.5]
        )
        half = stats.t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
        of_seeds = f"{values.mean() - half:.4f} to {values.mean() + half:.4f}"
        print(
            f"| {arm}, {measure.removeprefix('test_')} | {len(values)} | {values.mean():.4f} | {values.std():.4f} |"
            f" {of_seeds} | {low:.4f} to {high:.4f} | {PUBLISHED[measure]} |"
        )
    print("\n| difference of test AUC | mean | p (paired t over seeds) | 95 % over images |\n| --- | --- | --- | --- |")
    rows = found.pivot_table(index="seed", columns="arm", values="test_auc")
    for one, other in itertools.combinations(ARMS, 2):
        difference = (rows[one] - rows[other]).dropna()
        of_images = np.mean(
            [resampled["test_auc"][one, s] - resampled["test_auc"][other, s] for s in difference.index], axis=0
        )
        low, high = np.percentile(of_images, [2.5, 97.5])
        p = stats.ttest_1samp(difference, 0).pvalue
        print(f"| {one} - {other} | {difference.mean():+.4f} | {p:.3f} | {low:+.4f} to {high:+.4f} |")
    ends = found.groupby("arm")["alpha"].mean().to_dict()
    print(f"\nalpha at the end: {ends}; seconds of a training: {found['seconds'].median():.0f}")


if __name__ == "__main__":
    command_line(__doc__, run, table, seeds=3)
