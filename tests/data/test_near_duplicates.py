"""Exact and near-duplicate detection."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fadeformer.data import near_duplicates


def scene(seed: int, height: int = 80, width: int = 96) -> np.ndarray:
    """Smooth RGB image with some noise, different for every seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.normal(0, 4, (height, width, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def reencode(pixels: np.ndarray, kind: str, **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return np.asarray(Image.open(buffer))


COPIES = {
    "JPEG of quality 60": lambda x: reencode(x, "JPEG", quality=60),
    "shifted right by a pixel": lambda x: np.roll(x, 1, axis=1),
    "shifted up and left by a pixel": lambda x: np.roll(x, (-1, -1), axis=(0, 1)),
    "cropped by a pixel": lambda x: x[1:, 1:],
    "brighter": lambda x: np.asarray(ImageEnhance.Brightness(Image.fromarray(x)).enhance(1.15)),
    "less contrast": lambda x: np.asarray(ImageEnhance.Contrast(Image.fromarray(x)).enhance(0.8)),
    "half the size": lambda x: np.asarray(Image.fromarray(x).reduce(2)),
    "grayscale": lambda x: np.asarray(Image.fromarray(x).convert("L")),
}


@pytest.mark.parametrize(
    ("name", "side"),
    # at 28 pixels a one-pixel crop changes an image more than two images differ, and half the size is too small
    [
        (name, side)
        for name in COPIES
        for side in (28, 200)
        if side > 28 or name not in ("cropped by a pixel", "half the size")
    ],
)
def test_only_the_near_duplicate_is_found(name, side):
    copy = COPIES[name]
    originals = [scene(seed, side, side + side // 5) for seed in range(20)]
    images = [*originals, copy(originals[7])]
    pairs = near_duplicates.find_near_duplicates(
        [near_duplicates.compute_signature(Image.fromarray(image)) for image in images], threshold=0.9
    )
    assert pairs[["first", "second"]].to_numpy().tolist() == [[7, 20]]


def test_content_hash_depends_on_pixels_only():
    pixels = scene(0)
    assert near_duplicates.content_hash(reencode(pixels, "PNG")) == near_duplicates.content_hash(
        reencode(pixels, "BMP")
    )
    gray = np.asarray(Image.fromarray(pixels).convert("L"))
    assert near_duplicates.content_hash(gray) == near_duplicates.content_hash(np.repeat(gray[..., None], 3, axis=2))
    assert near_duplicates.content_hash(pixels) != near_duplicates.content_hash(gray)
    assert near_duplicates.content_hash(np.zeros((2, 8), np.uint8)) != near_duplicates.content_hash(
        np.zeros((4, 4), np.uint8)
    )
    changed = pixels.copy()
    changed[3, 4, 1] ^= 1
    assert near_duplicates.content_hash(changed) != near_duplicates.content_hash(pixels)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=12), st.data())
def test_candidates_match_brute_force_hamming_search(base, data):
    """Compare the multi-index search with a comparison of all pairs."""
    near = []
    for value in base:
        bits = data.draw(st.lists(st.integers(0, 63), max_size=7, unique=True))
        near.append(value ^ sum(1 << bit for bit in bits))
    hashes = np.array([base + near] * len(near_duplicates.SHIFTS), np.uint64).T.copy()
    expected = [
        [i, j]
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if int(hashes[i, 0] ^ hashes[j, 0]).bit_count() <= near_duplicates.HAMMING_RADIUS
    ]
    assert near_duplicates._candidate_pairs(hashes).tolist() == expected


def test_chunked_search_finds_the_same_pairs(monkeypatch):
    signatures = [
        near_duplicates.compute_signature(Image.fromarray(reencode(scene(1), "JPEG", quality=95 - i))) for i in range(9)
    ]
    expected = near_duplicates.find_near_duplicates(signatures, threshold=0.9)
    assert len(expected) == 36
    monkeypatch.setattr(near_duplicates, "CANDIDATE_CHUNK", 5)
    monkeypatch.setattr(near_duplicates, "COMPARISON_CHUNK", 7)
    pd.testing.assert_frame_equal(near_duplicates.find_near_duplicates(signatures, threshold=0.9), expected)


def frame(seed: int, spread: float = 3.0) -> Image.Image:
    """Video frame; all frames are near-duplicates."""
    return Image.fromarray(
        (scene(0, 64, 64) + np.random.default_rng(seed).normal(0, spread, (64, 64, 3))).clip(0, 255).astype(np.uint8)
    )


def test_video_frames_form_one_sparse_component(monkeypatch):
    monkeypatch.setattr(near_duplicates, "CLUSTERING_CHUNK", 256)
    signatures = [near_duplicates.compute_signature(frame(seed)) for seed in range(100)]
    pairs = near_duplicates.find_near_duplicates(signatures, threshold=0.9)
    assert len(pairs) < 100 * 15  # of 4,950
    graph = coo_array((np.ones(len(pairs)), (pairs["first"], pairs["second"])), shape=(100, 100))
    assert connected_components(graph, directed=False)[0] == 1


def fundus(seed: int) -> np.ndarray:
    """Round image on black, as from a fundus camera."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    return (scene(seed, 96, 96) // 3 + 90) * (x**2 + y**2 < 0.8)[..., None].astype(np.uint8)


def test_black_border_does_not_make_images_similar():
    images = [*(fundus(seed) for seed in range(12)), reencode(np.roll(fundus(3), 1, axis=1), "JPEG", quality=75)]
    pairs = near_duplicates.find_near_duplicates(
        [near_duplicates.compute_signature(Image.fromarray(image)) for image in images], threshold=0.9
    )
    assert pairs[["first", "second"]].to_numpy().tolist() == [[3, 12]]


def test_real_images_match_only_their_copies(real_data, config):
    """Real images with scanner noise, black borders, and similar fundus photographs."""
    threshold = config.validate_.near_duplicate_similarity
    with zipfile.ZipFile(real_data / "mednist" / "mednist.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpeg")][::9]
        scans = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L")) for name in names]
    photographs = np.load(real_data / "medmnist" / "retinamnist.npz")["test_images"]
    for originals in (scans, list(photographs[::2])):
        signatures = [near_duplicates.compute_signature(Image.fromarray(image)) for image in originals]
        assert len(near_duplicates.find_near_duplicates(signatures, threshold)) <= 1
        for change in (lambda x: reencode(x, "JPEG", quality=75), lambda x: np.roll(x, 1, axis=1)):
            copies = [near_duplicates.compute_signature(Image.fromarray(change(image))) for image in originals]
            pairs = near_duplicates.find_near_duplicates([*signatures, *copies], threshold)
            found = set(zip(pairs["first"], pairs["second"], strict=True))
            copied = {(i, i + len(originals)) for i in range(len(originals))}
            assert len(copied & found) >= 0.99 * len(copied)  # one fundus photograph is almost black


def test_zero_or_one_images_give_no_pairs():
    for signatures in ([], [near_duplicates.compute_signature(Image.fromarray(scene(0)))]):
        pairs = near_duplicates.find_near_duplicates(signatures, threshold=0.5)
        assert (len(pairs), list(pairs)) == (0, ["first", "second", "similarity"])


def test_too_small_image_raises_value_error():
    with pytest.raises(ValueError, match="12 x 40 pixels is too small"):
        near_duplicates.compute_signature(Image.new("L", (40, 12)))
