"""Augmentation of batches: torchvision's pixels and torchvision's chances, each image by its own row of the draws."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as published

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
COPIES = 2000
CERTAIN = 0.01  # a rightly built test of distributions fails by this chance once, but its seeds are fixed


def images(count: int = 4, height: int = 24, width: int = 20, channels: int = 3) -> torch.Tensor:
    """Smooth patterns over noise, so that a pixel differs from its neighbours by little, yet by something."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 5, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.1 * torch.rand(smooth.shape, generator=random)
    return ((smooth * 0.9 + noise) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augmented(
    batch: torch.Tensor,
    seed: int = 0,
    normalisation: Normalization = UNIT,
    drawn: dict | None = None,
    **changes: object,
) -> torch.Tensor:
    """With all off but the changes; `drawn` sets columns of the draws."""
    augmentation = Augmentation(**{**OFF, **changes})
    draws = augmentation.draw_uniforms(len(batch), seed)
    for name, number in (drawn or {}).items():
        draws[:, DRAW_COLUMNS.index(name)] = number
    return augmentation(batch, draws, normalisation)


def unit(value: float, largest: float) -> float:
    """The uniform number that stands for a value in [-largest, largest]."""
    return (value / largest + 1) / 2


def alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert min(len(ours), len(theirs)) > 0.9 * COPIES
    assert stats.ks_2samp(ours, theirs).pvalue > CERTAIN


def published_copies(transform: torch.nn.Module, image: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """What torchvision's own transform makes of so many copies of one image, (copies, channels, height, width)."""
    torch.manual_seed(seed)
    one = to_unit_range(image[None])[0]
    return torch.stack([transform(one.clone()) for _ in range(COPIES)])


def copies(image: torch.Tensor) -> torch.Tensor:
    return image.expand(COPIES, -1, -1, -1)


# Pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_with_all_off_it_only_normalises(channels):
    batch = images(channels=channels)
    expected = IMAGENET.for_channels(channels)(batch)
    torch.testing.assert_close(augmented(batch, normalisation=IMAGENET), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_flip_is_torchvisions(channels):
    batch = images(channels=channels)
    expected = published.hflip(to_unit_range(batch))
    torch.testing.assert_close(augmented(batch, horizontal_flip=1.0), expected, atol=1e-6, rtol=0)
    moving = augmented(batch, horizontal_flip=1.0, rotation=5.0, drawn={"angle": 0.5})
    torch.testing.assert_close(moving, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [-15.0, 7.3, 90.0, 133.0])
@pytest.mark.parametrize("flip", [False, True])
def test_a_rotation_is_torchvisions(angle, flip):
    batch = images(height=64, width=48)
    changes = {"rotation": 180.0, "horizontal_flip": float(flip), "drawn": {"angle": unit(angle, 180)}}
    before = published.hflip(to_unit_range(batch)) if flip else to_unit_range(batch)
    expected = published.rotate(before, angle)
    different = (augmented(batch, **changes) - expected).abs() > 1e-6
    assert different.float().mean() < 1e-3  # where both are so near the middle between two pixels that rounding decides
    expected = published.rotate(before, angle, InterpolationMode.BILINEAR)
    torch.testing.assert_close(augmented(batch, interpolation="bilinear", **changes), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("angle", "size", "shift"), [(0.0, 1.2, (0, 0)), (0.0, 1.0, (5, -7)), (25.0, 0.9, (-3, 6))])
def test_scale_and_translation_are_torchvisions_affine_map(angle, size, shift):
    batch = images(height=64, width=50)
    drawn = {
        "angle": unit(angle, 30), "size": unit(size - 1, 0.3), "shift_x": unit(shift[0], 0.2 * 50),
        "shift_y": unit(shift[1], 0.2 * 64),
    }  # fmt: skip
    found = augmented(batch, rotation=30.0, scale=0.3, translate=0.2, interpolation="bilinear", drawn=drawn)
    expected = published.affine(to_unit_range(batch), -angle, list(shift), size, [0.0, 0.0], InterpolationMode.BILINEAR)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.6])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_single_change_of_colour_is_torchvisions(name, factor, channels):
    batch = images(channels=channels)
    found = augmented(batch, **{name: 0.95}, drawn={name: unit(factor - 1, 0.95)})
    expected = getattr(published, f"adjust_{name}")(to_unit_range(batch), factor)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ((found - to_unit_range(batch)).abs().max() < 1e-5) == (factor == 1 or (name, channels) == ("saturation", 1))


def test_where_nothing_clips_the_three_changes_are_torchvisions_in_any_order():
    batch = (images() // 4 + 90).to(torch.uint8)
    factors = {"brightness": 1.1, "contrast": 1.2, "saturation": 0.7}
    drawn = {name: unit(factor - 1, 0.5) for name, factor in factors.items()}
    found = augmented(batch, brightness=0.5, contrast=0.5, saturation=0.5, drawn=drawn)
    for order in itertools.permutations(factors):
        expected = to_unit_range(batch)
        for name in order:
            expected = getattr(published, f"adjust_{name}")(expected, factors[name])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_contrast_is_about_the_mean_of_the_turned_image():
    batch = images(height=32, width=32)
    drawn = {"angle": unit(30, 40), "contrast": unit(-0.5, 0.6)}
    found = augmented(batch, rotation=40.0, contrast=0.6, interpolation="bilinear", drawn=drawn)
    turned = published.rotate(to_unit_range(batch), 30, InterpolationMode.BILINEAR)
    torch.testing.assert_close(found, published.adjust_contrast(turned, 0.5), atol=1e-4, rtol=0)


def test_what_is_erased_is_zero_after_normalising_and_nothing_else_changes():
    batch = images(40, 60, 60)
    plain, found = (augmented(batch, normalisation=IMAGENET, erasing=chance) for chance in (0.0, 1.0))
    gone = (found == 0).all(dim=1)
    for image, before, erased in zip(found, plain, gone, strict=True):
        rows, columns = erased.any(dim=1).nonzero(), erased.any(dim=0).nonzero()
        top, left, height, width = rows.min(), columns.min(), len(rows), len(columns)
        assert erased.sum() == height * width
        assert torch.equal(image, published.erase(before, top, left, height, width, torch.zeros(3, 1, 1)))


@pytest.mark.parametrize(("border", "dark"), [("zeros", True), ("border", False), ("reflection", False)])
def test_the_border_is_as_asked(border, dark):
    batch = torch.full((50, 20, 20, 1), 200, dtype=torch.uint8)
    assert (augmented(batch, translate=0.3, border=border).amin() < 0.1) == dark


# Distributions


@pytest.mark.parametrize(("scale", "size"), [((0.02, 0.12), (48, 70)), ((0.5, 1.0), (40, 40))])
def test_erased_rectangles_are_distributed_as_torchvisions(scale, size):
    image = torch.full((*size, 1), 255, dtype=torch.uint8)

    def rectangles(found: torch.Tensor) -> np.ndarray:
        """(images, 4): height, width, top, left; zeros where nothing is erased."""
        gone = found[:, 0] == 0
        rows, columns = gone.any(dim=2).int(), gone.any(dim=1).int()
        return torch.stack([rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)], dim=1).numpy()

    ours = rectangles(augmented(copies(image), erasing=1.0, erasing_scale=scale))
    theirs = rectangles(published_copies(transforms.RandomErasing(1.0, scale), image))
    assert (ours[:, 0] > 0).mean() == pytest.approx((theirs[:, 0] > 0).mean(), abs=0.01)  # given up as often
    ours, theirs = (found[found[:, 0] > 0] for found in (ours, theirs))
    alike(ours[:, 0] * ours[:, 1], theirs[:, 0] * theirs[:, 1])  # area
    alike(ours[:, 0] / ours[:, 1], theirs[:, 0] / theirs[:, 1])  # aspect
    alike(ours[:, 2], theirs[:, 2])
    alike(ours[:, 3], theirs[:, 3])
    alike(ours[:, 3] / (size[1] - ours[:, 1] + 1), theirs[:, 3] / (size[1] - theirs[:, 1] + 1))  # of where it may lie


# Mixing


def mixed(batch: torch.Tensor, targets: torch.Tensor, seed: int = 0, **changes: object):
    augmentation = Augmentation(**{**OFF, **changes})
    return augmentation.mix_batch(batch, targets, augmentation.draw_uniforms(len(batch), seed))


def halves(side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ones and then as many of zeros, so that a pixel tells whose it is; targets likewise."""
    ones = torch.cat([torch.ones(COPIES), torch.zeros(COPIES)])
    return ones.view(-1, 1, 1, 1).expand(-1, 1, side, side), torch.stack([ones, 1 - ones], dim=1)


def test_mixing_that_is_off_returns_what_it_was_given():
    batch, targets = halves()
    assert all(out is given for out, given in zip(mixed(batch, targets), (batch, targets), strict=True))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_shares_of_mixup_follow_a_beta_distribution(alpha):
    batch, targets = mixed(*halves(4), mixup=alpha)
    shares = batch[:COPIES, 0, 0, 0]
    alike(shares.numpy(), np.random.default_rng(0).beta(alpha, alpha, COPIES))
    torch.testing.assert_close(batch[:COPIES, 0], shares.view(-1, 1, 1).expand(-1, 4, 4))
    torch.testing.assert_close(targets[:COPIES, 0], shares)
    torch.testing.assert_close(1 - targets[COPIES:, 0], 1 - batch[COPIES:, 0, 0, 0])  # the other half by its own shares
    assert not torch.allclose(batch[COPIES:, 0, 0, 0].flip(0), 1 - shares)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_areas_of_cutmix_are_those_of_the_paper(alpha):
    side, random = 48, np.random.default_rng(0)
    batch, targets = mixed(*halves(side), cutmix=alpha)
    foreign = batch[:COPIES, 0] == 0
    shares = 1 - foreign.float().mean(dim=(1, 2))
    torch.testing.assert_close(targets[:COPIES, 0], shares, atol=1e-5, rtol=0)
    rows, columns = foreign.any(dim=2).sum(dim=1), foreign.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, foreign.sum(dim=(1, 2)))
    expected = []
    for share in random.beta(alpha, alpha, COPIES):  # Yun et al. 2019, rand_bbox
        cut = int(side * np.sqrt(1 - share))
        y, x = random.integers(side, size=2)
        top, bottom, left, right = np.clip([y - cut // 2, y + cut // 2, x - cut // 2, x + cut // 2], 0, side)
        expected.append(1 - (bottom - top) * (right - left) / side**2)
    alike(shares.numpy(), np.array(expected))


def test_each_image_takes_one_of_the_two_with_equal_chance():
    batch, targets = mixed(*halves(), mixup=1.0, cutmix=1.0)
    pasted = ((batch == 0) | (batch == 1)).flatten(1).all(dim=1)
    assert stats.binomtest(int(pasted.sum()), len(pasted)).pvalue > CERTAIN
    torch.testing.assert_close(batch.mean(dim=(1, 2, 3)), targets[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_an_image_is_mixed_with_its_mirror_in_the_batch(changes):
    given = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 8, 8)
    targets = torch.eye(7)
    batch, labels = mixed(given, targets, **changes)
    torch.testing.assert_close(batch[3], given[3])  # the middle one is its own mirror
    torch.testing.assert_close(labels[3], targets[3])
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(7))
    pairs = torch.eye(7).bool() | torch.eye(7).bool().flip(0)
    assert (labels[~pairs] == 0).all()
    assert ((labels.flip(1).diagonal() > 0.01) & (labels.diagonal() > 0.01)).sum() >= 4  # truly mixed, not replaced
    torch.testing.assert_close(batch.mean(dim=(1, 2, 3)), labels @ torch.arange(7.0), atol=1e-5, rtol=0)


# Rows


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_part_of_the_rows_is_that_part_of_the_whole(channels, interpolation):
    augmentation = Augmentation(**{**OFF, **ALL, "interpolation": interpolation})
    batch, draws = images(20, channels=channels), augmentation.draw_uniforms(20, 0)
    whole = augmentation(batch, draws, IMAGENET.for_channels(channels))
    for rows in ([7], [0, 1, 2], [19, 3, 11, 4], list(range(0, 20, 2))):
        torch.testing.assert_close(
            augmentation(batch[rows], draws[rows], IMAGENET.for_channels(channels)), whole[rows], atol=1e-6, rtol=0
        )
    assert (whole - augmented(batch, normalisation=IMAGENET)).abs().amax(dim=(1, 2, 3)).min() > 0.01  # all changed


def test_the_seed_decides_alone_and_the_batch_given_and_torchs_own_generator_stay_as_they_are():
    torch.manual_seed(0)
    before, batch = torch.get_rng_state(), images()
    given = batch.clone()
    assert torch.equal(augmented(batch, 3, **ALL), augmented(batch, 3, **ALL))
    assert not torch.equal(augmented(batch, 3, **ALL), augmented(batch, 4, **ALL))
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
def test_pixels_stay_within_black_and_white(changes, size, channels, seed):
    batch = images(3, *size, channels)
    found = augmented(batch, seed, IMAGENET.for_channels(channels), **changes)
    black, white = (
        IMAGENET.for_channels(channels)(torch.full((1, 1, 1, channels), v, dtype=torch.uint8)) for v in (0, 255)
    )
    assert found.shape == (3, channels, *size)
    assert torch.isfinite(found).all()
    assert (found >= black - 1e-5).all()
    assert (found <= white + 1e-5).all()
