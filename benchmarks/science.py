"""Does diffusion help? Networks that differ in their Fade layer and its read-out, trained alike on real images.

    python benchmarks/science.py run FOLDER runs.csv     trains what is not in runs.csv yet
    python benchmarks/science.py table runs.csv          mean, spread and paired tests

FOLDER holds `medmnist/retinamnist.npz`, `npz/pneumoniamnist.npz` and, in ISIC's layout, `isic2019/`, which is split by
lesion. All arms begin with the same backbone and see the same batches; all read the patches, none the class token. The
epoch is chosen on val; test is looked at once, after training.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import zipfile
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

from fadeformer import training
from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.inference import logits_of
from fadeformer.metrics import auc, log_loss
from fadeformer.models import FadeNet
from fadeformer.tasks import TASKS

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # pixels (images, 28, 28, 3) and labels (images, 1) of each split

SIDE = 28  # pixels
CPU = torch.device("cpu")
TASK = TASKS["multi-class"]
EPOCHS = {"retinamnist": 15, "pneumoniamnist": 5, "isic2019": 5}
LAYER = {"num_heads": 4, "dropout": 0.1}
DIFFUSION = {"variant": "diffusion", "after_blocks": ["last"], "fade_attn_params": LAYER}
# The last arm is the layer with its read-out, every gate shut to diffusion: what it gains over the plain network is not
# diffusion's merit.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"variant": "published", "fade_attn_params": {**LAYER, "K": 3, "alpha": 0.5}},
    "diffusion": DIFFUSION,
    "attention alone": DIFFUSION,
}
FIELDS = ("dataset", "arm", "seed", "epoch", "val_auc", "val_loss", "test_auc", "test_balanced_accuracy", "test_loss")


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


def train_and_test(data: Path, dataset: str, arm: str, seed: int) -> dict[str, Any]:
    """Trains one network, keeps the epoch of the lowest validation loss, and looks at test once."""
    torch.set_num_threads(1)
    splits = load(data, dataset)
    model = network(arm, classes=int(splits["train"][1].max()) + 1, seed=seed)
    recipe = training.Recipe(
        epochs=EPOCHS[dataset], batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05,
        schedule="cosine", plateau_factor=0.5, plateau_patience=2, early_stopping_patience=100, sampling="uniform",
    )  # fmt: skip
    augmentation = Augmentation(
        horizontal_flip=0.5, rotation=10.0, scale=0.1, translate=0.08, border="reflection", brightness=0.15,
        contrast=0.15, saturation=0.15, erasing=0.0, erasing_scale=(0.02, 0.12),
    )  # fmt: skip
    state = training.start(model, recipe)
    train, val = (Images(*splits[split], pd.DataFrame()) for split in ("train", "val"))
    epochs = list(
        training.fit(
            state, train, val, task=TASK, recipe=recipe, augmentation=augmentation, seed=seed, device=CPU,
            precision=torch.float32,
        )
    )  # fmt: skip
    model.load_state_dict(state.best_weights)
    pixels, labels = splits["test"]
    scores = TASK.probabilities(logits_of(model, pixels, 256, CPU, torch.float32))
    right = scores.argmax(axis=1) == labels[:, 0]
    best = epochs[state.best_epoch - 1]
    return {
        "dataset": dataset, "arm": arm, "seed": seed,
        "epoch": best.epoch, "val_auc": best.val_auc, "val_loss": best.val_loss,
        "test_auc": auc(labels, scores, TASK), "test_loss": log_loss(labels, scores, TASK),
        "test_balanced_accuracy": float(np.mean([right[labels[:, 0] == c].mean() for c in np.unique(labels)])),
    }  # fmt: skip


def network(arm: str, classes: int, seed: int) -> torch.nn.Module:
    """An arm's network; the backbone's weights depend on the seed alone."""
    torch.manual_seed(seed)
    options = {"num_classes": classes, "img_size": SIDE, "drop_path_rate": 0.1}
    plain = timm.create_model("fadevit_nano", global_pool="avg", drop_rate=0.1, **options)
    if arm == "plain":
        return plain
    model = FadeNet(dropout=0.1, backbone="fadevit_nano", pretrained=False, **ARMS[arm], **options)
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
    done = set()
    if runs.exists():
        done = {(row.dataset, row.arm, row.seed) for row in pd.read_csv(runs).itertuples()}
    else:
        runs.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    wanted = [case for case in itertools.product(EPOCHS, ARMS, range(seeds)) if case not in done]
    wanted.sort(key=lambda case: case[2])
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for future in as_completed([workers.submit(train_and_test, data, *case) for case in wanted]):
            with runs.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(future.result())


def table(runs: Path) -> None:
    """Test AUC of each arm, and its difference from the plain network and from attention alone, paired by seed."""
    found = pd.read_csv(runs)
    print("| data set | arm | seeds | test AUC | - plain | p | - attention alone | p |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dataset, arm in itertools.product(EPOCHS, ARMS):
        of = {name: rows.set_index("seed")["test_auc"] for name, rows in found[found.dataset == dataset].groupby("arm")}
        if arm not in of:
            continue
        cells = [dataset, arm, str(len(of[arm])), f"{of[arm].mean():.4f} +- {of[arm].std():.4f}"]
        for rival in ("plain", "attention alone"):
            if rival == arm or rival not in of:
                cells += ["", ""]
                continue
            difference = (of[arm] - of[rival]).dropna()
            chance = stats.ttest_1samp(difference, 0).pvalue if len(difference) > 1 else np.nan
            cells += [f"{difference.mean():+.4f}", f"{chance:.3f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path)
    running.add_argument("runs", type=Path)
    running.add_argument("--seeds", type=int, default=5)
    commands.add_parser("table").add_argument("runs", type=Path)
    wanted = parser.parse_args()
    if wanted.command == "run":
        run(wanted.data, wanted.runs, wanted.seeds)
    else:
        table(wanted.runs)


if __name__ == "__main__":
    main()
