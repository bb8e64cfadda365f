"""Augmentation against torchvision's pixels and distributions, with independent parameters for each image."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv_functional

from fadeformer.data.normalization import IMAGENET, Normalization, to_unit_range
from fadeformer.training.augmentation import DRAW_COLUMNS, Augmentation

OFF = {
    "horizontal_flip": 0.0, "rotation": 0.0, "scale": 0.0, "translate": 0.0, "border": "zeros",
    "interpolation": "nearest", "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "erasing": 0.0,
    "erasing_scale": (0.02, 0.12), "randaugment_operations": 0, "randaugment_magnitude": 9, "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip
ALL = {
    "horizontal_flip": 0.5, "rotation": 20.0, "scale": 0.1, "translate": 0.1, "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.4, "erasing": 0.5, "randaugment_operations": 2,
}  # fmt: skip
UNIT = Normalization((0.0,) * 3, (1.0,) * 3)  # the result is the pixels in [0, 1]
NUM_SAMPLES = 2000
MIN_P_VALUE = 0.01  # seeds are fixed, so a passing test keeps passing


def random_images(count: int = 4, height: int = 24, width: int = 20, channels: int = 3) -> torch.Tensor:
    """Return smooth patterns plus noise, so that neighboring pixels differ slightly."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 5, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.1 * torch.rand(smooth.shape, generator=random)
    return ((smooth * 0.9 + noise) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augment(
    batch: torch.Tensor,
    seed: int = 0,
    normalization: Normalization = UNIT,
    columns: dict | None = None,
    **changes: object,
) -> torch.Tensor:
    """Augment with only the given transforms on; `columns` sets columns of the draws."""
    augmentation = Augmentation(**{**OFF, **changes})
    draws = augmentation.draw_uniforms(len(batch), seed)
    for name, number in (columns or {}).items():
        draws[:, DRAW_COLUMNS.index(name)] = number
    return augmentation(batch, draws, normalization)


def to_uniform(value: float, largest: float) -> float:
    """Return the uniform number in [0, 1) for a value in [-largest, largest]."""
    return (value / largest + 1) / 2


def assert_same_distribution(x: np.ndarray, y: np.ndarray) -> None:
    assert min(len(x), len(y)) > 0.9 * NUM_SAMPLES
    assert stats.ks_2samp(x, y).pvalue > MIN_P_VALUE


def torchvision_samples(transform: torch.nn.Module, image: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Apply a torchvision transform to copies of an image, (copies, channels, height, width)."""
    torch.manual_seed(seed)
    one = to_unit_range(image[None])[0]
    return torch.stack([transform(one.clone()) for _ in range(NUM_SAMPLES)])


def repeat_image(image: torch.Tensor) -> torch.Tensor:
    return image.expand(NUM_SAMPLES, -1, -1, -1)


# Pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_without_transforms_only_normalizes(channels):
    batch = random_images(channels=channels)
    expected = IMAGENET.for_channels(channels)(batch)
    torch.testing.assert_close(augment(batch, normalization=IMAGENET), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_matches_torchvision(channels):
    batch = random_images(channels=channels)
    expected = tv_functional.hflip(to_unit_range(batch))
    torch.testing.assert_close(augment(batch, horizontal_flip=1.0), expected, atol=1e-6, rtol=0)
    warped = augment(batch, horizontal_flip=1.0, rotation=5.0, columns={"angle": 0.5})
    torch.testing.assert_close(warped, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [-15.0, 7.3, 90.0, 133.0])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_matches_torchvision(angle, flip):
    batch = random_images(height=64, width=48)
    changes = {"rotation": 180.0, "horizontal_flip": float(flip), "columns": {"angle": to_uniform(angle, 180)}}
    before = tv_functional.hflip(to_unit_range(batch)) if flip else to_unit_range(batch)
    expected = tv_functional.rotate(before, angle)
    different = (augment(batch, **changes) - expected).abs() > 1e-6
    assert different.float().mean() < 1e-3  # rounding differs halfway between two pixels
    expected = tv_functional.rotate(before, angle, InterpolationMode.BILINEAR)
    torch.testing.assert_close(augment(batch, interpolation="bilinear", **changes), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("angle", "size", "shift"), [(0.0, 1.2, (0, 0)), (0.0, 1.0, (5, -7)), (25.0, 0.9, (-3, 6))])
def test_scale_and_translation_match_torchvision_affine(angle, size, shift):
    batch = random_images(height=64, width=50)
    columns = {
        "angle": to_uniform(angle, 30), "size": to_uniform(size - 1, 0.3), "shift_x": to_uniform(shift[0], 0.2 * 50),
        "shift_y": to_uniform(shift[1], 0.2 * 64),
    }  # fmt: skip
    actual = augment(batch, rotation=30.0, scale=0.3, translate=0.2, interpolation="bilinear", columns=columns)
    expected = tv_functional.affine(
        to_unit_range(batch), -angle, list(shift), size, [0.0, 0.0], InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_single_color_transform_matches_torchvision(name, factor, channels):
    batch = random_images(channels=channels)
    actual = augment(batch, **{name: 0.95}, columns={name: to_uniform(factor - 1, 0.95)})
    expected = getattr(tv_functional, f"adjust_{name}")(to_unit_range(batch), factor)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert ((actual - to_unit_range(batch)).abs().max() < 1e-5) == (
        factor == 1 or (name, channels) == ("saturation", 1)
    )


def test_color_jitter_matches_torchvision_without_clipping():
    batch = (random_images() // 4 + 90).to(torch.uint8)
    factors = {"brightness": 1.1, "contrast": 1.2, "saturation": 0.7}
    columns = {name: to_uniform(factor - 1, 0.5) for name, factor in factors.items()}
    actual = augment(batch, brightness=0.5, contrast=0.5, saturation=0.5, columns=columns)
    for order in itertools.permutations(factors):
        expected = to_unit_range(batch)
        for name in order:
            expected = getattr(tv_functional, f"adjust_{name}")(expected, factors[name])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_contrast_uses_mean_of_rotated_image():
    batch = random_images(height=32, width=32)
    columns = {"angle": to_uniform(30, 40), "contrast": to_uniform(-0.5, 0.6)}
    actual = augment(batch, rotation=40.0, contrast=0.6, interpolation="bilinear", columns=columns)
    rotated = tv_functional.rotate(to_unit_range(batch), 30, InterpolationMode.BILINEAR)
    torch.testing.assert_close(actual, tv_functional.adjust_contrast(rotated, 0.5), atol=1e-4, rtol=0)


def test_erasing_changes_only_one_box():
    batch = random_images(40, 60, 60)
    without_erasing, actual = (augment(batch, normalization=IMAGENET, erasing=chance) for chance in (0.0, 1.0))
    erased_mask = (actual == 0).all(dim=1)
    for image, before, erased in zip(actual, without_erasing, erased_mask, strict=True):
        rows, columns = erased.any(dim=1).nonzero(), erased.any(dim=0).nonzero()
        top, left, height, width = rows.min(), columns.min(), len(rows), len(columns)
        assert erased.sum() == height * width
        assert torch.equal(image, tv_functional.erase(before, top, left, height, width, torch.zeros(3, 1, 1)))


@pytest.mark.parametrize(("border", "dark"), [("zeros", True), ("border", False), ("reflection", False)])
def test_padding_mode_of_translation(border, dark):
    batch = torch.full((50, 20, 20, 1), 200, dtype=torch.uint8)
    assert (augment(batch, translate=0.3, border=border).amin() < 0.1) == dark


# Distributions


@pytest.mark.parametrize(("scale", "size"), [((0.02, 0.12), (48, 70)), ((0.5, 1.0), (40, 40))])
def test_erased_boxes_match_torchvision_distribution(scale, size):
    image = torch.full((*size, 1), 255, dtype=torch.uint8)

    def erased_boxes(actual: torch.Tensor) -> np.ndarray:
        """Return height, width, top, left of the erased boxes, (images, 4); zeros if none."""
        erased_mask = actual[:, 0] == 0
        rows, columns = erased_mask.any(dim=2).int(), erased_mask.any(dim=1).int()
        return torch.stack([rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)], dim=1).numpy()

    boxes = erased_boxes(augment(repeat_image(image), erasing=1.0, erasing_scale=scale))
    expected_boxes = erased_boxes(torchvision_samples(transforms.RandomErasing(1.0, scale), image))
    assert (boxes[:, 0] > 0).mean() == pytest.approx(
        (expected_boxes[:, 0] > 0).mean(), abs=0.01
    )  # equally often nothing is erased
    boxes, expected_boxes = (actual[actual[:, 0] > 0] for actual in (boxes, expected_boxes))
    assert_same_distribution(boxes[:, 0] * boxes[:, 1], expected_boxes[:, 0] * expected_boxes[:, 1])  # area
    assert_same_distribution(boxes[:, 0] / boxes[:, 1], expected_boxes[:, 0] / expected_boxes[:, 1])  # aspect
    assert_same_distribution(boxes[:, 2], expected_boxes[:, 2])
    assert_same_distribution(boxes[:, 3], expected_boxes[:, 3])
    assert_same_distribution(
        boxes[:, 3] / (size[1] - boxes[:, 1] + 1), expected_boxes[:, 3] / (size[1] - expected_boxes[:, 1] + 1)
    )  # relative to the possible positions


# Mixing


def mix(batch: torch.Tensor, targets: torch.Tensor, seed: int = 0, **changes: object):
    augmentation = Augmentation(**{**OFF, **changes})
    return augmentation.mix_batch(batch, targets, augmentation.draw_uniforms(len(batch), seed))


def ones_and_zeros(side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and targets of ones, then of zeros, so that a pixel shows its source image."""
    ones = torch.cat([torch.ones(NUM_SAMPLES), torch.zeros(NUM_SAMPLES)])
    return ones.view(-1, 1, 1, 1).expand(-1, 1, side, side), torch.stack([ones, 1 - ones], dim=1)


def test_mix_batch_off_returns_same_objects():
    batch, targets = ones_and_zeros()
    assert all(out is given for out, given in zip(mix(batch, targets), (batch, targets), strict=True))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_weights_follow_beta_distribution(alpha):
    batch, targets = mix(*ones_and_zeros(4), mixup=alpha)
    shares = batch[:NUM_SAMPLES, 0, 0, 0]
    assert_same_distribution(shares.numpy(), np.random.default_rng(0).beta(alpha, alpha, NUM_SAMPLES))
    torch.testing.assert_close(batch[:NUM_SAMPLES, 0], shares.view(-1, 1, 1).expand(-1, 4, 4))
    torch.testing.assert_close(targets[:NUM_SAMPLES, 0], shares)
    torch.testing.assert_close(
        1 - targets[NUM_SAMPLES:, 0], 1 - batch[NUM_SAMPLES:, 0, 0, 0]
    )  # the second half has its own weights
    assert not torch.allclose(batch[NUM_SAMPLES:, 0, 0, 0].flip(0), 1 - shares)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_areas_match_paper(alpha):
    side, random = 48, np.random.default_rng(0)
    batch, targets = mix(*ones_and_zeros(side), cutmix=alpha)
    pasted_mask = batch[:NUM_SAMPLES, 0] == 0
    shares = 1 - pasted_mask.float().mean(dim=(1, 2))
    torch.testing.assert_close(targets[:NUM_SAMPLES, 0], shares, atol=1e-5, rtol=0)
    rows, columns = pasted_mask.any(dim=2).sum(dim=1), pasted_mask.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, pasted_mask.sum(dim=(1, 2)))
    expected = []
    for share in random.beta(alpha, alpha, NUM_SAMPLES):  # Yun et al. 2019, rand_bbox
        cut = int(side * np.sqrt(1 - share))
        y, x = random.integers(side, size=2)
        top, bottom, left, right = np.clip([y - cut // 2, y + cut // 2, x - cut // 2, x + cut // 2], 0, side)
        expected.append(1 - (bottom - top) * (right - left) / side**2)
    assert_same_distribution(shares.numpy(), np.array(expected))


def test_mixup_and_cutmix_are_equally_likely():
    batch, targets = mix(*ones_and_zeros(), mixup=1.0, cutmix=1.0)
    pasted = ((batch == 0) | (batch == 1)).flatten(1).all(dim=1)
    assert stats.binomtest(int(pasted.sum()), len(pasted)).pvalue > MIN_P_VALUE
    torch.testing.assert_close(batch.mean(dim=(1, 2, 3)), targets[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_image_is_mixed_with_reversed_batch(changes):
    given = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    targets = torch.eye(7)
    batch, labels = mix(given, targets, **changes)
    torch.testing.assert_close(batch[3], given[3])  # the middle image is its own partner
    torch.testing.assert_close(labels[3], targets[3])
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(7))
    pairs = torch.eye(7).bool() | torch.eye(7).bool().flip(0)
    assert (labels[~pairs] == 0).all()
    assert ((labels.flip(1).diagonal() > 0.01) & (labels.diagonal() > 0.01)).sum() >= 4  # mixed, not replaced
    torch.testing.assert_close(batch.mean(dim=(1, 2, 3)), labels @ torch.arange(7.0), atol=1e-5, rtol=0)


# Rows


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_subset_of_rows_gives_same_images(channels, interpolation):
    augmentation = Augmentation(**{**OFF, **ALL, "interpolation": interpolation})
    batch, draws = random_images(20, channels=channels), augmentation.draw_uniforms(20, 0)
    full_batch = augmentation(batch, draws, IMAGENET.for_channels(channels))
    for rows in ([7], [0, 1, 2], [19, 3, 11, 4], list(range(0, 20, 2))):
        torch.testing.assert_close(
            augmentation(batch[rows], draws[rows], IMAGENET.for_channels(channels)), full_batch[rows], atol=1e-6, rtol=0
        )
    assert (full_batch - augment(batch, normalization=IMAGENET)).abs().amax(dim=(1, 2, 3)).min() > 0.01  # all changed


def test_seed_determines_augmentation_without_side_effects():
    torch.manual_seed(0)
    before, batch = torch.get_rng_state(), random_images()
    given = batch.clone()
    assert torch.equal(augment(batch, 3, **ALL), augment(batch, 3, **ALL))
    assert not torch.equal(augment(batch, 3, **ALL), augment(batch, 4, **ALL))
    assert torch.equal(batch, given)
    assert torch.equal(torch.get_rng_state(), before)


fractions = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {
            "horizontal_flip": fractions, "rotation": st.floats(0, 180), "scale": st.floats(0, 0.9),
            "translate": fractions, "border": st.sampled_from(["zeros", "border", "reflection"]),
            "interpolation": st.sampled_from(["nearest", "bilinear"]), "brightness": fractions, "contrast": fractions,
            "saturation": fractions, "erasing": fractions,
            "erasing_scale": st.tuples(fractions, fractions).map(sorted).map(tuple),
            "randaugment_operations": st.integers(0, 2), "randaugment_magnitude": st.integers(0, 30),
        }
    ),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)), channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_pixels_stay_in_range(changes, size, channels, seed):
    batch = random_images(3, *size, channels)
    actual = augment(batch, seed, IMAGENET.for_channels(channels), **changes)
    black, white = (
        IMAGENET.for_channels(channels)(torch.full((1, 1, 1, channels), v, dtype=torch.uint8)) for v in (0, 255)
    )
    assert actual.shape == (3, channels, *size)
    assert torch.isfinite(actual).all()
    assert (actual >= black - 1e-5).all()
    assert (actual <= white + 1e-5).all()
