"""Which score tells images that a network knows from others: energy, largest probability, or Mahalanobis distance.

    python benchmarks/ood.py PROJECT [--other FILE ...]

PROJECT is a folder in which `dvc repro train` was run. Its test images stand against noise, images of one colour, their
own negatives, their own pixels in another order, and, by `--other`, images of something else: a folder, a zip, or an
npz with `test_images`. Of each score: the share of test images above the limit by val (the 95 % quantile), and against
each of the others the AUROC and the share of them above it.
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

Seen = tuple[np.ndarray, np.ndarray]  # logits and features
ALL = TASKS["multi-label, binary-class"]  # has one mean, of all images


def scores(
    train: Seen, labels: np.ndarray, val: Seen, of_val: np.ndarray, task
) -> dict[str, Callable[[Seen], np.ndarray]]:
    """What is compared; the higher, the less familiar."""
    none = np.zeros((1, train[1].shape[1]), np.float32)  # the limit is taken from val here, for all alike
    by_class, by_val = (ood.fit_detector(*given, task, none) for given in ((train[1], labels), (val[1], of_val)))
    together = ood.fit_detector(train[1], labels, ALL, none)
    return {
        "energy": lambda seen: -logsumexp(seen[0], axis=1),  # Liu et al. 2020, arXiv:2010.03759
        "probability": lambda seen: (
            -softmax(seen[0], axis=1).max(axis=1)
        ),  # Hendrycks and Gimpel 2017, arXiv:1610.02136
        "distance": lambda seen: by_class.distance(seen[1]),
        "distance, one mean": lambda seen: together.distance(seen[1]),
        "distance, of val": lambda seen: by_val.distance(seen[1]),
    }


def others(test: np.ndarray, more: list[Path], meta: arrays.ArrayMetadata) -> dict[str, np.ndarray]:
    """What is not of the data set."""
    random, flat = np.random.default_rng(0), test.reshape(len(test), -1, test.shape[3])
    found = {
        "noise": random.integers(0, 256, test.shape, dtype=np.uint8),
        "one colour": np.repeat(
            random.integers(0, 256, (len(test), 1, test.shape[3]), dtype=np.uint8), flat.shape[1], 1
        ),
        "negatives": 255 - test,
        "shuffled": np.stack([random.permutation(image) for image in flat]),
    }
    for path in more:
        if path.suffix == ".npz":
            pictures = map(Image.fromarray, np.load(path, allow_pickle=False)["test_images"])
        else:
            pictures = (image.read() for image in inputs.list_inputs([str(path)])[0])
        found[path.stem] = np.stack(
            [
                image_to_array(to_channels(image, meta.channels), meta.image_size, meta.channels, meta.aspect)
                for image in pictures
            ]
        )
    return {name: images.reshape(-1, *test.shape[1:]) for name, images in found.items()}


def row(score: Callable[[Seen], np.ndarray], val: Seen, test: Seen, apart: dict[str, Seen]) -> list[str]:
    """Cells of the table."""
    limit, known = np.quantile(score(val), ood.THRESHOLD_QUANTILE), score(test)
    cells = [f"{100 * (known > limit).mean():.0f} %"]
    for seen in apart.values():
        far = score(seen)
        area = roc_auc_score(np.repeat([0, 1], [len(known), len(far)]), np.concatenate([known, far]))
        cells.append(f"{area:.3f}, {100 * (far > limit).mean():.0f} %")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--other", type=Path, nargs="*", default=[])
    wanted = parser.parse_args()
    processed, models = wanted.project / "data" / "processed", wanted.project / "models"
    classifier = Classifier(read_json(models / "model.json"), models / "best_model.pth")
    meta = arrays.read_metadata(processed)
    splits = {split: arrays.load_split(processed, split) for split in ("train", "val", "test")}

    def see(pixels: np.ndarray) -> Seen:
        logits = predict_logits(classifier.model, pixels, 256, classifier.device, classifier.normalization)
        return logits, classifier.predict(pixels).features

    train, val, test = (see(of.images) for of in splits.values())
    apart = {name: see(pixels) for name, pixels in others(np.array(splits["test"].images), wanted.other, meta).items()}
    print("| score | test | " + " | ".join(apart) + " |")
    print("| --- |" + " --- |" * (1 + len(apart)))
    for name, score in scores(train, splits["train"].labels, val, splits["val"].labels, classifier.task).items():
        print(f"| {name} | " + " | ".join(row(score, val, test, apart)) + " |")


if __name__ == "__main__":
    main()
