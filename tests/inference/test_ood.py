"""Distances are Mahalanobis's, the limit lets through what it says, and what was written comes back."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf

from fadeformer.errors import UserError
from fadeformer.inference import ood
from fadeformer.tasks import TASKS

CLASSES, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]
MIX = np.random.default_rng(5).normal(size=(6, 6))


def drawn(images, seed, shift=0.0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, (images, 1))
    means = np.array([[4.0], [0.0], [-4.0]]) * np.ones(6)
    return (means[labels[:, 0]] + random.normal(size=(images, 6)) @ MIX + shift).astype(np.float32), labels


def test_the_distance_is_the_smallest_of_the_classes_by_scipy():
    train, labels = drawn(300, 0)
    familiar = ood.fit_detector(train, labels, CLASSES, drawn(100, 1)[0])
    wide, others = train.astype(np.float64), drawn(20, 2, shift=3.0)[0]
    means = [wide[labels[:, 0] == c].mean(axis=0) for c in range(3)]
    centred = wide - np.array(means)[labels[:, 0]]
    inverse = np.linalg.inv(ledoit_wolf(centred, assume_centered=True)[0])
    slow = [min(mahalanobis(image, mean, inverse) for mean in means) for image in others.astype(np.float64)]
    assert familiar.distance(others) == pytest.approx(slow)


def test_findings_have_one_mean():
    train, _ = drawn(300, 0)
    labels = np.random.default_rng(0).integers(0, 2, (300, 4))
    familiar = ood.fit_detector(train, labels, FINDINGS, drawn(100, 1)[0])
    assert familiar.means.shape == (1, 6)
    assert familiar.distance(train.mean(axis=0, keepdims=True)) == pytest.approx(0, abs=1e-5)


def test_one_in_twenty_of_val_is_unfamiliar_and_what_lies_apart_is():
    train, labels = drawn(2000, 0)
    val = drawn(1000, 1)[0]
    familiar = ood.fit_detector(train, labels, CLASSES, val)
    assert (familiar.distance(val) > familiar.threshold).mean() == pytest.approx(1 - ood.THRESHOLD_QUANTILE)
    assert (familiar.distance(drawn(1000, 2)[0]) > familiar.threshold).mean() == pytest.approx(0.05, abs=0.03)
    assert (familiar.distance(drawn(50, 3, shift=40.0)[0]) > familiar.threshold).all()


def test_fewer_images_than_features_and_features_that_never_vary():
    random = np.random.default_rng(0)
    train = random.normal(size=(10, 40)).astype(np.float32)
    train[:, 7] = 1.0
    familiar = ood.fit_detector(train, np.zeros((10, 1), np.int64), CLASSES, train)
    assert np.isfinite(familiar.distance(random.normal(size=(5, 40)).astype(np.float32))).all()


def test_what_was_written_comes_back(tmp_path):
    train, labels = drawn(300, 0)
    familiar = ood.fit_detector(train, labels, CLASSES, train)
    ood.write(familiar, tmp_path / "u.safetensors")
    again = ood.read(tmp_path / "u.safetensors", familiar.threshold)
    assert np.array_equal(again.distance(train), familiar.distance(train))
    (tmp_path / "u.safetensors").write_bytes(b"no tensors")
    for name in ("u.safetensors", "gone.safetensors"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            ood.read(tmp_path / name, 1.0)
