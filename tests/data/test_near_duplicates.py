"""Exact and near-duplicate detection."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fadeformer.data import near_duplicates
from fadeformer.data.near_duplicates import candidates, spectra


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


def edit(pixels: np.ndarray, change) -> np.ndarray:
    return np.asarray(change(Image.fromarray(pixels)))


def shift(image: Image.Image, right: float, down: float) -> Image.Image:
    """Shift by fractions of the size; the border becomes black."""
    moved = (1, 0, -right * image.width, 0, 1, -down * image.height)
    return image.transform(image.size, Image.Transform.AFFINE, moved)


def crop(image: Image.Image, fraction: float) -> Image.Image:
    """Cut off a fraction of the width and height in total, and enlarge the rest to the same size."""
    x, y = fraction * image.width / 2, fraction * image.height / 2
    return image.resize(image.size, Image.Resampling.BILINEAR, (x, y, image.width - x, image.height - y))


COPIES = {
    "JPEG of quality 60": lambda x: reencode(x, "JPEG", quality=60),
    "shifted right by a pixel": lambda x: np.roll(x, 1, axis=1),
    "cropped by a pixel": lambda x: x[1:, 1:],
    "brighter": lambda x: edit(x, lambda image: ImageEnhance.Brightness(image).enhance(1.2)),
    "less contrast": lambda x: edit(x, lambda image: ImageEnhance.Contrast(image).enhance(0.8)),
    "half the size": lambda x: edit(x, lambda image: image.reduce(2)),
    "grayscale": lambda x: edit(x, lambda image: image.convert("L")),
    "inverted": lambda x: 255 - x,
    "mirrored": lambda x: x[:, ::-1],
    "upside down": lambda x: x[::-1],
    "quarter turn": lambda x: np.rot90(x),
    "half turn": lambda x: np.rot90(x, 2),
    "mirrored and quarter turn": lambda x: np.rot90(x[:, ::-1], 3),
    "rotated by 12 degrees": lambda x: edit(x, lambda image: image.rotate(12, Image.Resampling.BILINEAR)),
    "rotated by -15 degrees": lambda x: edit(x, lambda image: image.rotate(-15, Image.Resampling.BILINEAR)),
    "shifted by a tenth": lambda x: edit(x, lambda image: shift(image, 0.1, -0.1)),
    "cropped by a tenth": lambda x: edit(x, lambda image: crop(image, 0.1)),
    "mirrored, shifted, darker": lambda x: edit(
        x, lambda image: ImageEnhance.Brightness(shift(ImageOps.mirror(image), 0.07, 0.05)).enhance(0.8)
    ),
}


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side)
        for name in COPIES
        for side in (28, 200)
        if side > 28 or name not in ("half the size", "cropped by a pixel")
    ],
)
def test_only_the_near_duplicate_is_found(name, side):
    originals = [scene(seed, side, side + side // 5) for seed in range(20)]
    images = [*originals, np.ascontiguousarray(COPIES[name](originals[7]))]
    pairs = near_duplicates.find_near_duplicates(
        [near_duplicates.compute_signature(Image.fromarray(image)) for image in images], threshold=0.95
    )
    assert pairs[["first", "second"]].to_numpy().tolist() == [[7, 20]]
    assert 0.95 <= pairs["similarity"][0] <= 1.001


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


def test_descriptor_is_independent_of_quarter_turns():
    image = Image.fromarray(scene(1)).convert("L").resize((spectra.SIDE, spectra.SIDE))
    pixels = np.asarray(image, np.float32)
    versions = np.stack([np.rot90(pixels), pixels[:, ::-1], 255 - pixels, pixels])
    *changed, original = spectra.rotation_invariants(spectra.polar_spectra(versions))
    for descriptor in changed:
        assert descriptor == pytest.approx(original, abs=1e-3)


def test_clustered_search_finds_the_same_neighbors(monkeypatch):
    images = np.stack(
        [np.asarray(Image.fromarray(scene(seed)).convert("L").resize((spectra.SIDE,) * 2)) for seed in range(60)]
    )
    images = np.concatenate([images, images[:, ::-1]])
    exact = candidates.candidate_pairs(images)
    monkeypatch.setattr(candidates, "EXACT_SEARCH_LIMIT", 10)
    monkeypatch.setattr(candidates, "CLUSTER_SIZE", 20)
    monkeypatch.setattr(candidates, "SEARCHED_CLUSTERS", 3)
    clustered = candidates.candidate_pairs(images)
    copies = {(i, i + 60) for i in range(60)}
    for pairs in (exact, clustered):
        assert copies <= {tuple(sorted(pair)) for pair in pairs[["first", "second"]].to_numpy().tolist()}


def frame(seed: int, spread: float = 3.0) -> Image.Image:
    """Video frame; all frames are near-duplicates."""
    return Image.fromarray(
        (scene(0, 64, 64) + np.random.default_rng(seed).normal(0, spread, (64, 64, 3))).clip(0, 255).astype(np.uint8)
    )


def test_video_frames_form_one_sparse_component():
    signatures = [near_duplicates.compute_signature(frame(seed)) for seed in range(100)]
    pairs = near_duplicates.find_near_duplicates(signatures, threshold=0.9)
    assert len(pairs) < 100 * 25  # of 4,950
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


def augment(image: Image.Image, kind: str, random: np.random.Generator) -> Image.Image:
    """Alter an image as published collections of augmented copies do."""
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    angle = float(random.uniform(-15, 15)) if kind == "rotation" else 90 * int(random.integers(1, 4))
    changed = {
        "none": lambda: image,
        "right angle": lambda: image.rotate(angle),
        "rotation": lambda: image.rotate(angle, Image.Resampling.BILINEAR),
        "shift": lambda: shift(image, *random.uniform(-0.1, 0.1, 2)),
        "crop": lambda: crop(image, float(random.uniform(0.02, 0.1))),
    }[kind]()
    bright = ImageEnhance.Brightness(changed).enhance(float(random.uniform(0.8, 1.2)))
    return ImageEnhance.Contrast(bright).enhance(float(random.uniform(0.8, 1.2)))


def test_augmented_fundus_photographs_are_connected(real_data, config):
    """Siblings of one photograph are connected, photographs without copies match only their repeats."""
    data, random = np.load(real_data / "medmnist" / "retinamnist.npz"), np.random.default_rng(0)
    kinds = ("none", "right angle", "rotation", "shift", "crop", "none", "right angle", "rotation")
    images = [augment(Image.fromarray(x), kind, random) for x in data["train_images"][:100] for kind in kinds]
    count, original = len(images), np.repeat(np.arange(100), len(kinds))
    images += [Image.fromarray(pixels) for pixels in data["train_images"][100:]]
    signatures = [near_duplicates.compute_signature(image) for image in images]
    pairs = near_duplicates.find_near_duplicates(signatures, config.validate_.near_duplicate_similarity)
    siblings = pairs[(pairs["second"] < count)]
    first, second = siblings["first"].to_numpy(), siblings["second"].to_numpy()
    assert (original[first] != original[second]).sum() <= 2
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    cluster = connected_components(graph, directed=False)[1]
    same, expected = cluster[:, None] == cluster, original[:, None] == original
    rotated = np.tile(np.array(kinds) == "rotation", 100)
    rigid = ~rotated[:, None] & ~rotated & ~np.eye(count, dtype=bool)
    assert (same & expected & rigid).sum() >= 0.95 * (expected & rigid).sum()
    assert (same & expected & ~rigid).sum() >= 0.9 * (expected & ~rigid).sum()


def test_other_real_images_are_not_near_duplicates(real_data, config):
    """CT slices and radiographs of one kind look alike; only neighboring slices of a scan count as near-duplicates."""
    with zipfile.ZipFile(real_data / "mednist" / "mednist.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpeg"))
        signatures = [near_duplicates.compute_signature(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    pairs = near_duplicates.find_near_duplicates(signatures, config.validate_.near_duplicate_similarity)
    kinds = [names[position].split("/")[0] for position in pairs["first"]]
    scans = ("AbdomenCT", "BreastMRI")  # several slices of each
    assert sum(kind not in scans for kind in kinds) <= 0.001 * len(names)
    assert len(kinds) <= 0.01 * len(names)


def test_zero_or_one_images_give_no_pairs():
    for signatures in ([], [near_duplicates.compute_signature(Image.fromarray(scene(0)))]):
        pairs = near_duplicates.find_near_duplicates(signatures, threshold=0.5)
        assert (len(pairs), list(pairs)) == (0, ["first", "second", "similarity"])


def test_too_small_image_raises_value_error():
    with pytest.raises(ValueError, match="12 x 40 pixels is too small"):
        near_duplicates.compute_signature(Image.new("L", (40, 12)))
