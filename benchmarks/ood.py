"""Comparison of out-of-distribution scores: energy, maximum softmax probability and Mahalanobis distance.

    python benchmarks/ood.py PROJECT [--other FILE ...]

PROJECT is a folder in which `dvc repro train` was run. The in-distribution images are its test set; the others are
noise, images of a single color, negatives and shuffled pixels of the test images, and, with `--other`, images from a
folder, a zip, or an npz file with `test_images`. For each score the table lists the fraction of test images above the
threshold (the conformal 95 % quantile on val), and for each other set the AUROC and the fraction above the threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score

from fadeformer.data import arrays
from fadeformer.data.decode import image_to_array, to_channels
from fadeformer.inference import inputs, ood
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.forward import predict_logits
from fadeformer.io.atomic import read_json
from fadeformer.tasks import TASKS

Outputs = tuple[np.ndarray, np.ndarray]  # logits and features
ONE_MEAN_TASK = TASKS["multi-label, binary-class"]  # the detector has one mean for all classes of this task


def scores(
    train: Outputs, labels: np.ndarray, val: Outputs, val_labels: np.ndarray, task
) -> dict[str, Callable[[Outputs], np.ndarray]]:
    """Return the scores to compare; higher means more out-of-distribution."""
    # no features for the detectors' own thresholds: they are computed here, in the same way for all scores
    no_features = np.zeros((1, train[1].shape[1]), np.float32)
    by_class, by_val = (
        ood.fit_detector(*given, task, no_features) for given in ((train[1], labels), (val[1], val_labels))
    )
    one_mean = ood.fit_detector(train[1], labels, ONE_MEAN_TASK, no_features)
    return {
        "energy": lambda outputs: -logsumexp(outputs[0], axis=1),  # Liu et al. 2020, arXiv:2010.03759
        "probability": lambda outputs: (
            -softmax(outputs[0], axis=1).max(axis=1)
        ),  # Hendrycks and Gimpel 2017, arXiv:1610.02136
        "distance": lambda outputs: by_class.distance(outputs[1]),
        "distance, one mean": lambda outputs: one_mean.distance(outputs[1]),
        "distance, fitted on val": lambda outputs: by_val.distance(outputs[1]),
    }


def ood_images(test: np.ndarray, files: list[Path], meta: arrays.ArrayMetadata) -> dict[str, np.ndarray]:
    """Return out-of-distribution images by name."""
    random, flat = np.random.default_rng(0), test.reshape(len(test), -1, test.shape[3])
    images_by_name = {
        "noise": random.integers(0, 256, test.shape, dtype=np.uint8),
        "single color": np.repeat(
            random.integers(0, 256, (len(test), 1, test.shape[3]), dtype=np.uint8), flat.shape[1], 1
        ),
        "negatives": 255 - test,
        "shuffled": np.stack([random.permutation(image) for image in flat]),
    }
    for path in files:
        if path.suffix == ".npz":
            images = map(Image.fromarray, np.load(path, allow_pickle=False)["test_images"])
        else:
            images = (image.read() for image in inputs.list_inputs([str(path)])[0])
        images_by_name[path.stem] = np.stack(
            [
                image_to_array(to_channels(image, meta.channels), meta.image_size, meta.channels, meta.aspect)
                for image in images
            ]
        )
    return {name: images.reshape(-1, *test.shape[1:]) for name, images in images_by_name.items()}


def table_row(
    score: Callable[[Outputs], np.ndarray], val: Outputs, test: Outputs, ood_outputs: dict[str, Outputs]
) -> list[str]:
    """Return the cells of a table row."""
    threshold, in_scores = ood.conformal_threshold(score(val)), score(test)
    cells = [f"{100 * (in_scores > threshold).mean():.0f} %"]
    for outputs in ood_outputs.values():
        out_scores = score(outputs)
        auroc = roc_auc_score(
            np.repeat([0, 1], [len(in_scores), len(out_scores)]), np.concatenate([in_scores, out_scores])
        )
        cells.append(f"{auroc:.3f}, {100 * (out_scores > threshold).mean():.0f} %")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--other", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    processed, models = args.project / "data" / "processed", args.project / "models"
    classifier = Classifier(read_json(models / "model.json"), models / "best_model.pth")
    meta = arrays.read_metadata(processed)
    splits = {split: arrays.load_split(processed, split) for split in ("train", "val", "test")}

    def predict(pixels: np.ndarray) -> Outputs:
        logits = predict_logits(classifier.model, pixels, 256, classifier.device, classifier.normalization)
        return logits, classifier.predict(pixels).features

    train, val, test = (predict(split.images) for split in splits.values())
    ood_outputs = {
        name: predict(pixels) for name, pixels in ood_images(np.array(splits["test"].images), args.other, meta).items()
    }
    print("| score | test | " + " | ".join(ood_outputs) + " |")
    print("| --- |" + " --- |" * (1 + len(ood_outputs)))
    for name, score in scores(train, splits["train"].labels, val, splits["val"].labels, classifier.task).items():
        print(f"| {name} | " + " | ".join(table_row(score, val, test, ood_outputs)) + " |")


if __name__ == "__main__":
    main()
