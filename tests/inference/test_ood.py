"""Mahalanobis distances against SciPy, the threshold, and reading and writing."""

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi2
from sklearn.covariance import ledoit_wolf

from fadeformer.errors import UserError
from fadeformer.inference import ood
from fadeformer.tasks import TASKS

CLASSES, FINDINGS = TASKS["multi-class"], TASKS["multi-label, binary-class"]
MIX = np.random.default_rng(5).normal(size=(6, 6))


def sample(images, seed, shift=0.0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, (images, 1))
    means = np.array([[4.0], [0.0], [-4.0]]) * np.ones(6)
    return (means[labels[:, 0]] + random.normal(size=(images, 6)) @ MIX + shift).astype(np.float32), labels


def test_distance_matches_scipy_mahalanobis():
    train, labels = sample(300, 0)
    detector = ood.fit_detector(train, labels, CLASSES, sample(100, 1)[0])
    features, others = train.astype(np.float64), sample(20, 2, shift=3.0)[0]
    means = [features[labels[:, 0] == c].mean(axis=0) for c in range(3)]
    centered = features - np.array(means)[labels[:, 0]]
    inverse = np.linalg.inv(ledoit_wolf(centered, assume_centered=True)[0])
    expected = [min(mahalanobis(image, mean, inverse) for mean in means) for image in others.astype(np.float64)]
    assert detector.distance(others) == pytest.approx(expected)


def test_multi_label_has_single_mean():
    train, _ = sample(300, 0)
    labels = np.random.default_rng(0).integers(0, 2, (300, 4))
    detector = ood.fit_detector(train, labels, FINDINGS, sample(100, 1)[0])
    assert detector.means.shape == (1, 6)
    assert detector.distance(train.mean(axis=0, keepdims=True)) == pytest.approx(0, abs=1e-5)


def test_threshold_flags_shifted_images():
    train, labels = sample(2000, 0)
    val = sample(1000, 1)[0]
    detector = ood.fit_detector(train, labels, CLASSES, val)
    assert (detector.distance(val) > detector.threshold).sum() == 49  # of 1000; the 50th is the threshold
    assert (detector.distance(sample(1000, 2)[0]) > detector.threshold).mean() == pytest.approx(0.05, abs=0.03)
    assert (detector.distance(sample(50, 3, shift=40.0)[0]) > detector.threshold).all()


@pytest.mark.parametrize("count", [19, 20, 50, 200])
def test_flagged_share_keeps_promise(count):
    rng = np.random.default_rng(0)
    thresholds = [ood.conformal_threshold(rng.chisquare(8, count)) for _ in range(4000)]
    shares = chi2.sf(thresholds, 8)
    error = shares.std() / np.sqrt(len(shares))
    assert np.mean(shares) <= ood.FLAGGED_SHARE + 3 * error
    assert np.mean(shares) >= ood.FLAGGED_SHARE - 1 / count


def test_small_val_has_no_threshold(tmp_path):
    train, labels = sample(300, 0)
    few, enough = (ood.fit_detector(train, labels, CLASSES, sample(n, 1)[0]) for n in (18, 19))
    assert np.isinf(few.threshold)
    assert ood.threshold_to_json(few) is None
    assert ood.threshold_to_json(enough) == enough.threshold == enough.distance(sample(19, 1)[0]).max()
    ood.write(few, tmp_path / "few.safetensors")
    assert np.isinf(ood.read(tmp_path / "few.safetensors", None).threshold)


def test_few_images_and_constant_features_are_finite():
    random = np.random.default_rng(0)
    train = random.normal(size=(10, 40)).astype(np.float32)
    train[:, 7] = 1.0
    detector = ood.fit_detector(train, np.zeros((10, 1), np.int64), CLASSES, train)
    assert np.isfinite(detector.distance(random.normal(size=(5, 40)).astype(np.float32))).all()


def test_detector_round_trips(tmp_path):
    train, labels = sample(300, 0)
    detector = ood.fit_detector(train, labels, CLASSES, train)
    ood.write(detector, tmp_path / "u.safetensors")
    restored = ood.read(tmp_path / "u.safetensors", detector.threshold)
    assert np.array_equal(restored.distance(train), detector.distance(train))
    (tmp_path / "u.safetensors").write_bytes(b"no tensors")
    for name in ("u.safetensors", "gone.safetensors"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            ood.read(tmp_path / name, 1.0)
