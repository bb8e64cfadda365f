"""RetinaMNIST at 28 pixels, trained from scratch with the preset `retinamnist`, with and without FadeAttn.

    python benchmarks/retinamnist.py run FILE RUNS       train the runs that are missing in the folder RUNS
    python benchmarks/retinamnist.py table FILE RUNS     print test AUC and accuracy with confidence intervals

FILE is the published retinamnist.npz. Arms: FadeAttn with alpha learned (as published), with alpha fixed at its initial
value, and the plain backbone. The epoch is selected on val; the test set is evaluated once, after training.
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
from diffusion_ablation import bootstrap_aucs, command_line
from ruamel.yaml import YAML
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
from pipelines.environment import configure_environment

if __name__ == "__main__":  # before MLflow is imported, to disable its telemetry
    configure_environment()

from pipelines.stages.train_worker import NOT_IN_RECIPE

PROJECT = Path(__file__).resolve().parents[1]
TASK = TASKS["ordinal-regression"]
ARMS = ("alpha learned", "alpha fixed", "without FadeAttn")
PUBLISHED = {"test_auc": 0.717, "test_accuracy": 0.524}  # ResNet-18 at 28 pixels, Yang et al. 2023, table 3
CPU = torch.device("cpu")
RESAMPLES = 2000


def preset() -> Params:
    """Return the parameters after `make preset NAME=retinamnist`."""
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
    """Train one model, evaluate it on the test set, and write the result as JSON and the test scores as npy."""
    torch.set_num_threads(1)
    config, images = preset(), splits(file)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = create_model(
        backbone=config.model.backbone, num_classes=5 - TASK.num_omitted_outputs, image_size=28, in_chans=3,
        pretrained=False, dropout=config.model.dropout, drop_path=config.model.drop_path,
        fade=None if arm == "without FadeAttn" or config.model.fade is None else config.model.fade.model_dump(),
    )  # fmt: skip
    if arm == "alpha fixed":
        model.attn.alpha.requires_grad_(False)
    recipe = Recipe(**(config.train.model_dump(exclude=set(NOT_IN_RECIPE)) | changes))
    precision = choose_precision(config.train.precision, CPU)
    state, start = create_training_state(model, recipe), time.perf_counter()
    augment_options = config.augment.model_dump() | {"erasing_scale": tuple(config.augment.erasing_scale)}
    epochs = loop.fit(
        state, images["train"], images["val"], task=TASK, recipe=recipe, class_weights=np.ones(5),
        augmentation=Augmentation(**augment_options), normalization=IMAGENET, seed=seed,
        fabric=create_fabric(CPU, precision),
    )  # fmt: skip
    best = max(epochs, key=lambda epoch: (epoch.epoch == state.best_epoch, epoch.epoch))
    seconds = time.perf_counter() - start
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
    missing = [case for case in cases if not (runs / f"{case[0].replace(' ', '_')}.{case[1]}.json").is_file()]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for future in as_completed([workers.submit(train_and_test, file, runs, *case) for case in missing]):
            future.result()


def table(file: Path, runs: Path) -> None:
    """Print means over seeds, with intervals over seeds (t) and over test images (bootstrap with fixed seeds)."""
    rows = pd.DataFrame([read_json(path) for path in sorted(runs.glob("*.json"))])
    labels = splits(file)["test"].labels[:, 0]
    random = np.random.default_rng(0)
    weights = random.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
    scores = {
        (row.arm, row.seed): np.load(runs / f"{row.arm.replace(' ', '_')}.{row.seed}.npy") for row in rows.itertuples()
    }
    resampled = {
        "test_auc": {key: bootstrap_aucs(labels, value, weights) for key, value in scores.items()},
        "test_accuracy": {key: weights @ (value.argmax(1) == labels) / len(labels) for key, value in scores.items()},
    }
    print("| | seeds | mean | standard deviation | 95 % over seeds | 95 % over images | published |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for arm, (metric, samples) in itertools.product(ARMS, resampled.items()):
        values = rows.loc[rows["arm"] == arm, metric]
        low, high = np.percentile(
            np.mean([samples[arm, seed] for seed in rows.loc[values.index, "seed"]], axis=0), [2.5, 97.5]
        )
        half = stats.t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
        seed_interval = f"{values.mean() - half:.4f} to {values.mean() + half:.4f}"
        print(
            f"| {arm}, {metric.removeprefix('test_')} | {len(values)} | {values.mean():.4f} | {values.std():.4f} |"
            f" {seed_interval} | {low:.4f} to {high:.4f} | {PUBLISHED[metric]} |"
        )
    print("\n| difference of test AUC | mean | p (paired t over seeds) | 95 % over images |\n| --- | --- | --- | --- |")
    auc_by_seed = rows.pivot_table(index="seed", columns="arm", values="test_auc")
    for first, second in itertools.combinations(ARMS, 2):
        difference = (auc_by_seed[first] - auc_by_seed[second]).dropna()
        image_differences = np.mean(
            [resampled["test_auc"][first, s] - resampled["test_auc"][second, s] for s in difference.index], axis=0
        )
        low, high = np.percentile(image_differences, [2.5, 97.5])
        p = stats.ttest_1samp(difference, 0).pvalue
        print(f"| {first} - {second} | {difference.mean():+.4f} | {p:.3f} | {low:+.4f} to {high:+.4f} |")
    final_alpha = rows.groupby("arm")["alpha"].mean().to_dict()
    print(f"\nfinal alpha: {final_alpha}; seconds per run: {rows['seconds'].median():.0f}")


if __name__ == "__main__":
    command_line(__doc__, run, table, seeds=3)
