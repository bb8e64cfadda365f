"""Ablation of diffusion: models that differ in Fade layer and pooling, trained in the same way on real images.

    python benchmarks/diffusion_ablation.py run FOLDER RUNS       train the runs that are missing in the folder RUNS
    python benchmarks/diffusion_ablation.py table FOLDER RUNS     print means, standard deviations and paired tests

FOLDER contains `medmnist/retinamnist.npz`, `npz/pneumoniamnist.npz` and, in ISIC's layout, `isic2019/`, which is split
by lesion. The backbone is a small ViT of 14 x 14 patches, the grid of the published model. All arms start with the same
backbone weights and get the same batches; all pool the patch tokens, none uses the class token. The epoch is selected
on val; the test set is evaluated once, after training.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from scipy import stats
from sklearn.model_selection import StratifiedGroupKFold
from timm.models._registry import register_model
from timm.models.vision_transformer import VisionTransformer

from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import IMAGENET
from fadeformer.evaluation.metrics import auc, log_loss
from fadeformer.inference.forward import predict_logits
from fadeformer.io.atomic import atomic_write, read_json, write_json
from fadeformer.models.factory import FadeNet
from fadeformer.models.fadevit import drop_timm_factory_args
from fadeformer.tasks import TASKS
from fadeformer.training import loop
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.distributed import create_fabric
from fadeformer.training.state import Recipe, create_training_state

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # pixels (images, 28, 28, 3) and labels (images, 1) of each split

SIDE = 28  # pixels
CPU = torch.device("cpu")
TASK = TASKS["multi-class"]
EPOCHS = {"retinamnist": 12, "pneumoniamnist": 4, "isic2019": 4}
LAYER = {"num_heads": 4, "dropout": 0.1}
DIFFUSION = {"variant": "diffusion", "after_blocks": [1], "fade_attn_params": LAYER}
# The last arm has the diffusion layer and its pooling, with all gates fixed to attention, so its gain over the plain
# model is not due to diffusion.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"variant": "published", "fade_attn_params": {**LAYER, "K": 3, "alpha": 0.5}},
    "diffusion": DIFFUSION,
    "attention alone": DIFFUSION,
}
COMPARISONS = [
    ("published", "plain"),
    ("diffusion", "plain"),
    ("attention alone", "plain"),
    ("diffusion", "attention alone"),
]
RESAMPLES = 2000


@register_model
def ablation_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT with patches of 2 pixels, 14 x 14 for an image of 28 pixels, and 0.2 M parameters."""
    sizes = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return VisionTransformer(**{**sizes, **drop_timm_factory_args(options)})


def load(data: Path, dataset: str) -> Splits:
    if dataset == "isic2019":
        return load_isic(data / "isic2019")
    archive = np.load(next(data.glob(f"*/{dataset}.npz")))
    splits = {}
    for split in ("train", "val", "test"):
        pixels = archive[f"{split}_images"]
        if pixels.ndim == 3:
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        splits[split] = (np.ascontiguousarray(pixels), archive[f"{split}_labels"].astype(np.int64))
    return splits


def load_isic(folder: Path) -> Splits:
    truth = pd.read_csv(folder / "ISIC_2019_Training_GroundTruth.csv", index_col="image")
    lesions = pd.read_csv(folder / "ISIC_2019_Training_Metadata.csv", index_col="image").loc[truth.index, "lesion_id"]
    groups = lesions.fillna(pd.Series(truth.index, truth.index)).to_numpy()
    labels = truth.to_numpy().argmax(axis=1)
    _, labels = np.unique(labels, return_inverse=True)  # UNK has no images
    with zipfile.ZipFile(folder / "ISIC_2019_Training_Input.zip") as archive:
        paths = {Path(name).stem: name for name in archive.namelist() if name.endswith(".jpg")}
        pixels = np.stack([_decode(archive.read(paths[name])) for name in truth.index])
    folds = np.empty(len(labels), dtype=int)
    for fold, (_, fold_rows) in enumerate(
        StratifiedGroupKFold(10, shuffle=True, random_state=0).split(pixels, labels, groups)
    ):
        folds[fold_rows] = fold
    rows = {"train": folds < 7, "val": folds == 7, "test": folds > 7}
    return {split: (pixels[chosen], labels[chosen][:, None]) for split, chosen in rows.items()}


def _decode(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + edge, top + edge)))


def train_and_test(data: Path, runs: Path, dataset: str, arm: str, seed: int) -> None:
    """Train one model, keep the epoch with the lowest validation loss, and evaluate it on the test set.

    Write the result to `runs` as JSON, and the test scores as npy.
    """
    torch.set_num_threads(1)
    splits = load(data, dataset)
    classes = int(splits["train"][1].max()) + 1
    model = network(arm, classes, seed)
    recipe = Recipe(
        epochs=EPOCHS[dataset], batch_size=64, accumulate=1, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05,
        layer_decay=1.0, schedule="cosine", warmup_epochs=0, plateau_factor=0.5, plateau_patience=2, probe_epochs=0,
        label_smoothing=0.0, clip=None, ema=0.0, monitor="loss", early_stopping_patience=100, sampling="uniform",
        focal_gamma=0.0,
    )  # fmt: skip
    augmentation = Augmentation(
        horizontal_flip=0.5, rotation=10.0, scale=0.1, translate=0.08, border="reflection", interpolation="bilinear",
        brightness=0.15, contrast=0.15, saturation=0.15, erasing=0.0, erasing_scale=(0.02, 0.12),
        randaugment_operations=0, randaugment_magnitude=0, mixup=0.0, cutmix=0.0,
    )  # fmt: skip
    state = create_training_state(model, recipe)
    train, val = (SplitArrays(*splits[split], pd.DataFrame()) for split in ("train", "val"))
    epochs = list(
        loop.fit(
            state, train, val, task=TASK, recipe=recipe, class_weights=np.ones(classes), augmentation=augmentation,
            normalization=IMAGENET, seed=seed, fabric=create_fabric(CPU),
        )
    )  # fmt: skip
    model.load_state_dict(state.best_weights)
    pixels, labels = splits["test"]
    scores = TASK.probabilities(predict_logits(model, pixels, 256, CPU, IMAGENET))
    best = epochs[state.best_epoch - 1]
    row = {
        "dataset": dataset, "arm": arm, "seed": seed,
        "epoch": best.epoch, "val_auc": best.val_auc, "val_loss": best.val_loss,
        "test_auc": auc(labels, scores, TASK), "test_loss": log_loss(labels, scores, TASK),
    }  # fmt: skip
    name = f"{dataset}.{arm.replace(' ', '_')}.{seed}"
    with atomic_write(runs / f"{name}.npy") as path:
        np.save(path, scores)
    write_json(runs / f"{name}.json", row)


def network(arm: str, classes: int, seed: int) -> torch.nn.Module:
    """Create the model of an arm; the backbone weights depend only on the seed."""
    torch.manual_seed(seed)
    options = {"num_classes": classes, "img_size": SIDE, "drop_path_rate": 0.1}
    plain = timm.create_model("ablation_vit", global_pool="avg", drop_rate=0.1, **options)
    if arm == "plain":
        return plain
    model = FadeNet(dropout=0.1, backbone="ablation_vit", pretrained=False, **ARMS[arm], **options)
    with torch.no_grad():
        start = plain.state_dict()
        for name, value in model.state_dict().items():
            shared = name.replace(".block.", ".")  # blocks that a Fade layer follows are wrapped
            if shared.startswith(("patch_embed.", "pos_embed", "cls_token", "blocks.")) and shared in start:
                value.copy_(start[shared])
    if arm == "attention alone":
        disable_diffusion(model)
    return model


def disable_diffusion(model: torch.nn.Module) -> None:
    """Fix all gates to attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_logit"):
            torch.nn.init.constant_(parameter, 10.0)  # sigmoid(LOGIT_SCALE * 10) is 1 in float32
            parameter.requires_grad_(False)


def run(data: Path, runs: Path, seeds: int) -> None:
    done = {(row["dataset"], row["arm"], row["seed"]) for row in map(read_json, runs.glob("*.json"))}
    cases = [case for case in itertools.product(EPOCHS, ARMS, range(seeds)) if case not in done]
    cases.sort(key=lambda case: case[2])
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for future in as_completed([workers.submit(train_and_test, data, runs, *case) for case in cases]):
            future.result()


def table(data: Path, runs: Path) -> None:
    """Print the test AUC of each arm and comparisons paired over seeds (t test, Holm) and test images (bootstrap)."""
    results = pd.DataFrame([read_json(path) for path in sorted(runs.glob("*.json"))])
    print("| dataset | arm | seeds | val AUC | test AUC |\n| --- | --- | --- | --- | --- |")
    for dataset, arm in itertools.product(EPOCHS, ARMS):
        selected = results[(results.dataset == dataset) & (results.arm == arm)]
        cells = [f"{selected[name].mean():.4f} +- {selected[name].std():.4f}" for name in ("val_auc", "test_auc")]
        print(f"| {dataset} | {arm} | {len(selected)} | {' | '.join(cells)} |")
    rows = []
    for dataset in EPOCHS:
        labels = load(data, dataset)["test"][1][:, 0]
        weights = np.random.default_rng(0).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
        auc_by_seed = results[results.dataset == dataset].pivot_table(index="seed", columns="arm", values="test_auc")
        resampled = {
            (arm, seed): bootstrap_aucs(
                labels, np.load(runs / f"{dataset}.{arm.replace(' ', '_')}.{seed}.npy"), weights
            )
            for arm, seed in itertools.product(ARMS, auc_by_seed.index)
        }
        for arm, baseline in COMPARISONS:
            difference = (auc_by_seed[arm] - auc_by_seed[baseline]).dropna()
            image_differences = np.mean(
                [resampled[arm, seed] - resampled[baseline, seed] for seed in difference.index], axis=0
            )
            low, high = np.percentile(image_differences, [2.5, 97.5])
            p = stats.ttest_1samp(difference, 0).pvalue
            rows.append((dataset, f"{arm} - {baseline}", difference.mean(), p, (difference > 0).sum(), low, high))
    holm = holm_adjusted(np.array([row[3] for row in rows]))
    print("\n| dataset | difference of test AUC | mean | seeds above 0 | p | p (Holm) | 95 % over test images |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (dataset, comparison, mean, p, above, low, high), corrected in zip(rows, holm, strict=True):
        print(
            f"| {dataset} | {comparison} | {mean:+.4f} | {above} | {p:.4f} | {corrected:.4f} |"
            f" {low:+.4f} to {high:+.4f} |"
        )


def holm_adjusted(p: np.ndarray) -> np.ndarray:
    """Adjust p-values for multiple comparisons (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(stepped, 1)
    return result


def bootstrap_aucs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean one-vs-rest AUC of resamples in which image i has weight `weights[:, i]`; assumes no ties."""
    total = np.zeros(len(weights))
    classes = np.unique(labels)
    for label in classes:
        order = np.argsort(scores[:, label], kind="stable")
        ordered = weights[:, order].astype(float)
        positive = np.where(labels[order] == label, ordered, 0)
        below = np.cumsum(ordered - positive, axis=1)
        total += (positive * below).sum(axis=1) / np.maximum(positive.sum(axis=1) * below[:, -1], 1)
    return total / len(classes)


def command_line(
    description: str | None, run: Callable[[Path, Path, int], None], table: Callable[[Path, Path], None], seeds: int
) -> None:
    """Run the command `run DATA RUNS [--seeds N]` or `table DATA RUNS`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "table"):
        command = commands.add_parser(name)
        command.add_argument("data", type=Path)
        command.add_argument("runs", type=Path)
        if name == "run":
            command.add_argument("--seeds", type=int, default=seeds)
    args = parser.parse_args()
    if args.command == "run":
        run(args.data, args.runs, args.seeds)
    else:
        table(args.data, args.runs)


if __name__ == "__main__":
    command_line(__doc__, run, table, seeds=5)
