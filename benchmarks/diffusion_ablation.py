"""Does diffusion help? Networks that differ in their Fade layer and its read-out, trained alike on real images.

    python benchmarks/diffusion_ablation.py run FOLDER RUNS       trains what is not in the folder RUNS yet
    python benchmarks/diffusion_ablation.py table FOLDER RUNS     mean, spread and paired tests

FOLDER holds `medmnist/retinamnist.npz`, `npz/pneumoniamnist.npz` and, in ISIC's layout, `isic2019/`, which is split by
lesion. The backbone is a small ViT of 14 x 14 patches, the grid of the published model. All arms begin with the same
backbone and see the same batches; all read the patches, none the class token. The epoch is chosen on val; test is
looked at once, after training.
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
# The last arm is the layer with its read-out, every gate shut to diffusion: what it gains over the plain network is not
# diffusion's merit.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"variant": "published", "fade_attn_params": {**LAYER, "K": 3, "alpha": 0.5}},
    "diffusion": DIFFUSION,
    "attention alone": DIFFUSION,
}
QUESTIONS = [
    ("published", "plain"),
    ("diffusion", "plain"),
    ("attention alone", "plain"),
    ("diffusion", "attention alone"),
]
RESAMPLES = 2000


@register_model
def science_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT whose patches of 2 pixels make a grid of 14 x 14 of an image of 28 pixels, 0.2 M parameters."""
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
    _, labels = np.unique(labels, return_inverse=True)  # UNK has no image
    with zipfile.ZipFile(folder / "ISIC_2019_Training_Input.zip") as archive:
        paths = {Path(name).stem: name for name in archive.namelist() if name.endswith(".jpg")}
        pixels = np.stack([_decode(archive.read(paths[name])) for name in truth.index])
    folds = np.empty(len(labels), dtype=int)
    for fold, (_, of_fold) in enumerate(
        StratifiedGroupKFold(10, shuffle=True, random_state=0).split(pixels, labels, groups)
    ):
        folds[of_fold] = fold
    rows = {"train": folds < 7, "val": folds == 7, "test": folds > 7}
    return {split: (pixels[chosen], labels[chosen][:, None]) for split, chosen in rows.items()}


def _decode(jpeg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + edge, top + edge)))


def train_and_test(data: Path, runs: Path, dataset: str, arm: str, seed: int) -> None:
    """Trains one network, keeps the epoch of the lowest validation loss, and looks at test once.

    What came of it is written into `runs`: a row as JSON, and the test scores.
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
    """An arm's network; the backbone's weights depend on the seed alone."""
    torch.manual_seed(seed)
    options = {"num_classes": classes, "img_size": SIDE, "drop_path_rate": 0.1}
    plain = timm.create_model("science_vit", global_pool="avg", drop_rate=0.1, **options)
    if arm == "plain":
        return plain
    model = FadeNet(dropout=0.1, backbone="science_vit", pretrained=False, **ARMS[arm], **options)
    with torch.no_grad():
        start = plain.state_dict()
        for name, value in model.state_dict().items():
            shared = name.replace(".block.", ".")  # behind which a Fade layer stands
            if shared.startswith(("patch_embed.", "pos_embed", "cls_token", "blocks.")) and shared in start:
                value.copy_(start[shared])
    if arm == "attention alone":
        shut_diffusion(model)
    return model


def shut_diffusion(model: torch.nn.Module) -> None:
    """Sets every gate to attention and leaves it there."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_logit"):
            torch.nn.init.constant_(parameter, 10.0)  # a share of attention of 1, to the last bit of float32
            parameter.requires_grad_(False)


def run(data: Path, runs: Path, seeds: int) -> None:
    done = {(row["dataset"], row["arm"], row["seed"]) for row in map(read_json, runs.glob("*.json"))}
    wanted = [case for case in itertools.product(EPOCHS, ARMS, range(seeds)) if case not in done]
    wanted.sort(key=lambda case: case[2])
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for future in as_completed([workers.submit(train_and_test, data, runs, *case) for case in wanted]):
            future.result()


def table(data: Path, runs: Path) -> None:
    """Test AUC of each arm, and the questions: paired over seeds (t test, Holm) and over test images (bootstrap)."""
    found = pd.DataFrame([read_json(path) for path in sorted(runs.glob("*.json"))])
    print("| data set | arm | seeds | val AUC | test AUC |\n| --- | --- | --- | --- | --- |")
    for dataset, arm in itertools.product(EPOCHS, ARMS):
        of = found[(found.dataset == dataset) & (found.arm == arm)]
        told = [f"{of[name].mean():.4f} +- {of[name].std():.4f}" for name in ("val_auc", "test_auc")]
        print(f"| {dataset} | {arm} | {len(of)} | {' | '.join(told)} |")
    answers = []
    for dataset in EPOCHS:
        labels = load(data, dataset)["test"][1][:, 0]
        weights = np.random.default_rng(0).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
        rows = found[found.dataset == dataset].pivot_table(index="seed", columns="arm", values="test_auc")
        resampled = {
            (arm, seed): bootstrap_aucs(
                labels, np.load(runs / f"{dataset}.{arm.replace(' ', '_')}.{seed}.npy"), weights
            )
            for arm, seed in itertools.product(ARMS, rows.index)
        }
        for arm, rival in QUESTIONS:
            difference = (rows[arm] - rows[rival]).dropna()
            of_images = np.mean([resampled[arm, seed] - resampled[rival, seed] for seed in difference.index], axis=0)
            low, high = np.percentile(of_images, [2.5, 97.5])
            p = stats.ttest_1samp(difference, 0).pvalue
            answers.append((dataset, f"{arm} - {rival}", difference.mean(), p, (difference > 0).sum(), low, high))
    holm = adjusted(np.array([answer[3] for answer in answers]))
    print("\n| data set | difference of test AUC | mean | seeds above 0 | p | p (Holm) | 95 % over test images |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (dataset, what, mean, p, above, low, high), corrected in zip(answers, holm, strict=True):
        print(f"| {dataset} | {what} | {mean:+.4f} | {above} | {p:.4f} | {corrected:.4f} | {low:+.4f} to {high:+.4f} |")


def adjusted(p: np.ndarray) -> np.ndarray:
    """P values corrected for their number after Holm (1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(stepped, 1)
    return result


def bootstrap_aucs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean one-versus-rest AUC of each resample, which counts image i `weights[:, i]` times; no scores are equal."""
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
    told: str | None, run: Callable[[Path, Path, int], None], table: Callable[[Path, Path], None], seeds: int
) -> None:
    """`run DATA RUNS [--seeds N]` or `table DATA RUNS`, as the arguments say."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "table"):
        command = commands.add_parser(name)
        command.add_argument("data", type=Path)
        command.add_argument("runs", type=Path)
        if name == "run":
            command.add_argument("--seeds", type=int, default=seeds)
    wanted = parser.parse_args()
    if wanted.command == "run":
        run(wanted.data, wanted.runs, wanted.seeds)
    else:
        table(wanted.data, wanted.runs)


if __name__ == "__main__":
    command_line(__doc__, run, table, seeds=5)
