"""Does diffusion help? Networks that differ in nothing but their Fade layer, trained alike on real images.

    python benchmarks/science.py run FOLDER runs.csv     trains what is not in runs.csv yet
    python benchmarks/science.py table runs.csv          mean, spread and paired tests

FOLDER holds `medmnist/retinamnist.npz`, `npz/pneumoniamnist.npz` and, in ISIC's layout, `isic2019/`, which is split by
lesion. The epoch is chosen on val; test is looked at once, after training.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from fadeformer import training
from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.inference import choose_precision, logits_of
from fadeformer.metrics import auc, log_loss
from fadeformer.models import create_model
from fadeformer.tasks import TASKS

SIDE = 28
CPU = torch.device("cpu")
EPOCHS = {"retinamnist": 15, "pneumoniamnist": 5, "isic2019": 5}
FADE = {"num_heads": 4, "dropout": 0.1}
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "published": {**FADE, "variant": "published", "K": 3, "alpha": 0.5},
    "diffusion": {**FADE, "variant": "diffusion"},
}
FIELDS = ("dataset", "arm", "seed", "epoch", "val_auc", "val_loss", "test_auc", "test_balanced_accuracy", "test_loss")


def load(data: Path, dataset: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels (images, 28, 28, 3) and labels (images, 1) of each split."""
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


def load_isic(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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


def run(
    splits: dict[str, tuple[np.ndarray, np.ndarray]], dataset: str, arm: str, seed: int, look: bool
) -> dict[str, Any]:
    """Trains one network and measures it."""
    classes = int(splits["train"][1].max()) + 1
    task = TASKS["multi-class"]
    torch.manual_seed(seed)
    model = create_model(
        backbone="fadevit_nano", num_classes=classes, image_size=SIDE, in_chans=3, pretrained=False, dropout=0.1,
        drop_path=0.1, fade=ARMS[arm],
    )  # fmt: skip
    recipe = training.Recipe(
        epochs=EPOCHS[dataset], batch_size=64, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05,
        schedule="cosine", plateau_factor=0.5, plateau_patience=2, early_stopping_patience=100, sampling="weighted",
    )  # fmt: skip
    augmentation = Augmentation(
        horizontal_flip=0.5, rotation=10.0, scale=0.1, translate=0.08, border="reflection", brightness=0.15,
        contrast=0.15, saturation=0.15, erasing=0.0, erasing_scale=(0.02, 0.12),
    )  # fmt: skip
    state = training.start(model, recipe)
    precision = choose_precision("auto", CPU)
    images = {split: Images(pixels, labels, pd.DataFrame()) for split, (pixels, labels) in splits.items()}
    epochs = list(
        training.fit(
            state, images["train"], images["val"], task=task, recipe=recipe, augmentation=augmentation, seed=seed,
            device=CPU, precision=precision,
        )
    )  # fmt: skip
    model.load_state_dict(state.best_weights)
    best = epochs[state.best_epoch - 1]
    row = {
        "dataset": dataset,
        "arm": arm,
        "seed": seed,
        "epoch": best.epoch,
        "val_auc": best.val_auc,
        "val_loss": best.val_loss,
    }
    if look:
        pixels, labels = splits["test"]
        scores = task.probabilities(logits_of(model, pixels, 256, CPU, precision))
        row |= {
            "test_auc": auc(labels, scores, task),
            "test_balanced_accuracy": float(
                np.mean([(scores.argmax(1) == c)[labels[:, 0] == c].mean() for c in np.unique(labels)])
            ),
            "test_loss": log_loss(labels, scores, task),
        }
    fades = [m for m in model.modules() if hasattr(m, "gate_logit")]
    row["learned"] = " | ".join(f"t {m.time.tolist()} s {m.exponent.tolist()} g {m.gate.tolist()}" for m in fades)
    return row
