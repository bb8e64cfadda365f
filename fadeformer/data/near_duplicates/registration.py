"""Similarity of two images after registration: what one explains of the other, once it is turned and moved onto it.

A rotation from the spectra and a shift by cross-correlation are refined by Gauss-Newton steps of an affine
transformation with a linear change of intensity (Lucas and Kanade 1981; Baker and Matthews 2004, "Lucas-Kanade 20 years
on"). Two different images of the same kind can correlate as well as two copies do, but then they differ by more than
the detail that resampling loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, minimum_filter

from fadeformer.data.near_duplicates import spectra
from fadeformer.data.near_duplicates.signature import THUMBNAIL_SIDE, ImageSignature
from fadeformer.data.near_duplicates.spectra import SIDE, Floats

MAX_OFFSET = 9  # pixels of `SIDE`, of the cross-correlation
COARSE_BLUR, FINE_BLUR = 1.2, 0.7  # standard deviation of the blur at `SIDE`, pixels: first and second steps
FULL_BLUR = 1.0  # the same at full size, last steps
SHIFT_STEPS = 2  # of the cross-correlation: the window moves with the image
STEPS = 3  # Gauss-Newton steps at each of these
MAX_STEP = 2.0, 0.1  # pixels; relative change of the matrix
DAMPING = 1e-3  # of the normal equations, relative to their mean diagonal
EARLY_LIMIT = 0.88  # similarity after the coarse steps, below which a pair is given up
TOLERANCE = 0.02  # by which the similarity at `SIDE` may be below the threshold
BLACK_LEVEL = 12  # of 255; pixels up to this value count as background
BORDER = 5  # pixels; twice the distance at which background still darkens the blurred image, plus one
MIN_VISIBLE_AREA = 0.2  # fraction of the thumbnail; with less, background is compared, too
MIN_OVERLAP = 0.55  # fraction of the thumbnail
SCALES = 0.88, 1.14  # allowed change of size
MAX_STRETCH = 1.05  # allowed ratio of the scales along two directions
MAX_RESIDUAL = 1.9  # mean squared difference, in units of the detail that the blur removes nearby
CERTAIN_SIMILARITY = 0.995  # above it the residual does not matter: smooth images have no detail, but noise of a JPEG
RESIDUAL_FLOOR = 2.0  # gray levels; smaller differences are rounding
RESIDUAL_CAP = 25.0  # of a single pixel, in the same units
DETAIL_RADIUS = 1.5  # pixels, of the neighborhood of a pixel
MIN_GRADIENT = 4.0  # gray levels per pixel, root mean square nearby; flatter regions do not count in the residual
BATCH = 512  # pairs


class Transformation(NamedTuple):
    """Affine transformations to positions in the first image, in pixels from its center, (y, x).

    Attributes:
        matrix: (n, 2, 2).
        offset: (n, 2).
    """

    matrix: Floats
    offset: Floats

    def select(self, rows: NDArray[np.bool_]) -> Transformation:
        """Return some of the transformations."""
        return Transformation(self.matrix[rows], self.offset[rows])


class _Images(NamedTuple):
    """Pairs of images of one size, with the masks of pixels that are not background; each (n, side, side)."""

    first: Floats
    second: Floats
    first_visible: Floats
    second_visible: NDArray[np.bool_]

    @staticmethod
    def from_pixels(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> _Images:
        images = [pixels.astype(np.float32) for pixels in (first, second)]
        visible = [
            minimum_filter(gaussian_filter(image, (0, FINE_BLUR, FINE_BLUR)), (1, BORDER, BORDER)) > BLACK_LEVEL
            for image in images
        ]
        return _Images(images[0], images[1], visible[0].astype(np.float32), visible[1])

    def select(self, rows: NDArray[np.bool_]) -> _Images:
        return _Images(self.first[rows], self.second[rows], self.first_visible[rows], self.second_visible[rows])

    def blur(self, sigma: float) -> _Images:
        """Return the pairs with smoothed images and the same masks."""
        return self._replace(
            first=gaussian_filter(self.first, (0, sigma, sigma), mode="nearest"),
            second=gaussian_filter(self.second, (0, sigma, sigma), mode="nearest"),
        )


def pair_similarities(
    signatures: Sequence[ImageSignature], images: NDArray[np.uint8], pairs: pd.DataFrame, threshold: float
) -> Floats:
    """Compute the similarity of candidate pairs: R^2 of one image on the other after registration, 0 to 1.

    Args:
        signatures: of all images.
        images: their thumbnails resized to `SIDE`, (n, SIDE, SIDE).
        pairs: from `candidate_pairs`.
        threshold: pairs that stay below it are given up early and get similarity 0.

    Returns:
        (pairs,); 0 also if the transformation is not one of a copy, or the difference exceeds the detail that
        resampling loses.
    """
    batches = [pairs.iloc[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(partial(_batch_similarities, signatures, images, threshold), batches))
    return np.concatenate([np.empty(0, np.float32), *results])


def _batch_similarities(
    signatures: Sequence[ImageSignature], images: NDArray[np.uint8], threshold: float, pairs: pd.DataFrame
) -> Floats:
    first, second = pairs["first"].to_numpy(), pairs["second"].to_numpy()
    small, remaining = _Images.from_pixels(images[first], images[second]), np.arange(len(pairs))
    transformation = _initial_transformation(
        small.blur(COARSE_BLUR), pairs["angle"].to_numpy(), pairs["reflected"].to_numpy()
    )
    for blur, limit in ((COARSE_BLUR, EARLY_LIMIT), (FINE_BLUR, threshold - TOLERANCE)):
        smooth = small.blur(blur)
        transformation = _refine(smooth, transformation)
        passed = np.asarray(_Fit(smooth, transformation).r_squared >= limit)
        remaining, small, transformation = remaining[passed], small.select(passed), transformation.select(passed)
    ends = [[signatures[i] for i in positions[remaining]] for positions in (first, second)]
    aspects = np.array([[signature.aspect for signature in side] for side in ends]).reshape(2, -1)
    sides = np.array([[len(signature.thumbnail) for signature in side] for side in ends], np.int64).reshape(2, -1)
    is_full = np.asarray(sides.min(axis=0) == THUMBNAIL_SIDE)
    similarity = np.zeros(len(pairs), np.float32)
    if not is_full.all():
        rows = ~is_full
        similarity[remaining[rows]] = _copy_similarity(
            small.select(rows), transformation.select(rows), FINE_BLUR, aspects[:, rows]
        )
    if is_full.any():
        thumbnails = [np.stack([side[i].thumbnail for i in np.flatnonzero(is_full)]) for side in ends]
        start = transformation.select(is_full)
        start = start._replace(offset=start.offset * np.float32(THUMBNAIL_SIDE / SIDE))
        similarity[remaining[is_full]] = _copy_similarity(
            _Images.from_pixels(*thumbnails), start, FULL_BLUR, aspects[:, is_full]
        )
    return similarity


def _copy_similarity(images: _Images, start: Transformation, blur: float, aspects: NDArray[np.float64]) -> Floats:
    """R^2 after the last steps at full size; 0 for pairs that are not copies, (n,)."""
    smooth = images.blur(blur)
    transformation = _refine(smooth, start)
    fit = _Fit(smooth, transformation)
    is_copy = _is_plausible(transformation, aspects) & (fit.overlap >= MIN_OVERLAP)
    is_copy &= (fit.residual(images) <= MAX_RESIDUAL) | (fit.r_squared >= CERTAIN_SIMILARITY)
    return np.where(is_copy, fit.r_squared, 0).astype(np.float32)


def _initial_transformation(smooth: _Images, angle: Floats, reflected: NDArray[np.bool_]) -> Transformation:
    """Find the shift by cross-correlation at several rotations; that with the best correlation.

    The rotations are the angle of the spectra, the multiple of a right angle next to it, since that is what most copies
    are turned by and shifts blur the angle, and both half a turn further.
    """
    sign, results = np.where(reflected, -1, 1), []
    for value in (angle, np.round(angle / (np.pi / 2)) * (np.pi / 2)):
        sine, cosine = np.sin(value), np.cos(value)
        turn = np.stack([np.stack([cosine, sine], 1), np.stack([-sine * sign, cosine * sign], 1)], 1).astype(np.float32)
        results += [_best_shift(smooth, turn), _best_shift(smooth, -turn)]
    best = np.argmax([correlation for _, correlation in results], axis=0)
    rows = np.arange(len(angle))
    return Transformation(
        np.stack([transformation.matrix for transformation, _ in results])[best, rows],
        np.stack([transformation.offset for transformation, _ in results])[best, rows],
    )


def _best_shift(smooth: _Images, turn: Floats) -> tuple[Transformation, Floats]:
    """Find the shift of the turned first image onto the second one, and their correlation, (n,)."""
    offset = np.zeros((len(turn), 2), np.float32)
    target = spectra.remove_mean(smooth.second)
    conjugate, near = scipy.fft.rfft2(target).conj(), np.r_[0:MAX_OFFSET, -MAX_OFFSET:0]
    for _ in range(SHIFT_STEPS):
        moving = spectra.remove_mean(_warp(smooth.first, Transformation(turn, offset))[0])
        correlation = scipy.fft.irfft2(conjugate * scipy.fft.rfft2(moving), s=(SIDE, SIDE))
        peaks = np.abs(correlation[:, near][:, :, near])  # absolute, for inverted copies
        y, x = np.divmod(peaks.reshape(len(turn), -1).argmax(axis=1), len(near))
        offset = offset + np.einsum("nij,nj->ni", turn, np.stack([near[y], near[x]], axis=1).astype(np.float32))
    norm = np.sqrt((target**2).sum((1, 2)) * (moving**2).sum((1, 2))) + 1e-6
    return Transformation(turn, offset), peaks.max(axis=(1, 2)) / norm


def _grid(side: int) -> tuple[Floats, Floats]:
    y, x = np.mgrid[:side, :side].astype(np.float32) - np.float32((side - 1) / 2)
    return y, x


def _warp(images: Floats, transformation: Transformation, *more: Floats) -> list[NDArray[Any]]:
    """Sample stacks of images bilinearly, (n, side, side); the last array is the mask of positions inside."""
    count, side = images.shape[:2]
    y, x = _grid(side)
    matrix, offset = transformation.matrix[..., None, None], transformation.offset[..., None, None]
    rows, columns = (matrix[:, i, 0] * y + matrix[:, i, 1] * x + offset[:, i] + (side - 1) / 2 for i in (0, 1))
    inside = (rows >= 0) & (rows <= side - 1) & (columns >= 0) & (columns <= side - 1)
    rows, columns = (np.clip(values, 0, side - 1.001) for values in (rows, columns))
    row, column = rows.astype(np.int32), columns.astype(np.int32)
    dy, dx = (rows - row).astype(np.float32), (columns - column).astype(np.float32)
    base = np.arange(count, dtype=np.int32)[:, None, None] * side**2 + row * side + column
    sampled = []
    for stack in (images, *more):
        flat = stack.ravel()
        top = flat[base] * (1 - dx) + flat[base + 1] * dx
        bottom = flat[base + side] * (1 - dx) + flat[base + side + 1] * dx
        sampled.append(top * (1 - dy) + bottom * dy)
    return [*sampled, inside]


class _Fit:
    """Linear regression of the second image of each pair on the transformed first one.

    Attributes:
        mask: compared pixels, (n, side, side).
        moved: the transformed first image, (n, side, side).
        gain: slope, (n,).
        difference: residual at the compared pixels, (n, side, side).
        r_squared: explained share of the variance, (n,).
        overlap: share of the second image that the first one covers, (n,).
    """

    def __init__(self, images: _Images, transformation: Transformation) -> None:
        self.moved, visible, inside = _warp(images.first, transformation, images.first_visible)
        mask = inside & (visible > 0.99) & images.second_visible
        is_small = mask.mean((1, 2)) < MIN_VISIBLE_AREA
        mask[is_small] = inside[is_small]
        self.mask = mask.astype(np.float32)
        self.area = self.mask.sum((1, 2)) + 1e-6
        predictor, target = self._center(self.moved), self._center(images.second)
        variance, covariance = (predictor**2).sum((1, 2)), (predictor * target).sum((1, 2))
        self.gain = covariance / (variance + 1e-6)
        self.difference = target - self.gain[:, None, None] * predictor
        self.r_squared = covariance**2 / (variance * (target**2).sum((1, 2)) + 1e-3)
        self.overlap = inside.mean((1, 2))

    def _center(self, images: Floats) -> Floats:
        mean = (images * self.mask).sum((1, 2)) / self.area
        return np.asarray((images - mean[:, None, None]) * self.mask)

    def residual(self, pixels: _Images) -> Floats:
        """Mean squared difference where there is structure, in units of the local detail that the blur removes, (n,).

        Args:
            pixels: the images before the blur.
        """
        smooth = gaussian_filter(pixels.second, (0, FINE_BLUR, FINE_BLUR), mode="nearest")
        detail = gaussian_filter(((pixels.second - smooth) * self.mask) ** 2, (0, DETAIL_RADIUS, DETAIL_RADIUS))
        relative = np.minimum(self.difference**2 / (detail + RESIDUAL_FLOOR**2), RESIDUAL_CAP)
        explained = self.gain[:, None, None] * self.moved
        slopes = [*np.gradient(smooth, axis=(1, 2)), *np.gradient(explained, axis=(1, 2))]
        steepness = gaussian_filter(sum(slope**2 for slope in slopes), (0, DETAIL_RADIUS, DETAIL_RADIUS))
        structured = self.mask * (steepness > MIN_GRADIENT**2)
        return np.asarray((relative * structured).sum((1, 2)) / (structured.sum((1, 2)) + 1e-6))


def _refine(images: _Images, transformation: Transformation) -> Transformation:
    """Take Gauss-Newton steps toward the affine transformation with the least squared difference."""
    y, x = _grid(images.first.shape[1])
    for _ in range(STEPS):
        fit = _Fit(images, transformation)
        down, right = np.gradient(fit.moved, axis=(1, 2))
        gradients = np.stack([down, right, down * y, down * x, right * y, right * x], axis=1)
        gradients = gradients * (fit.gain[:, None, None] * fit.mask)[:, None]
        jacobian = gradients.reshape(len(gradients), 6, y.size)
        normal = jacobian @ jacobian.swapaxes(1, 2)
        damping = DAMPING * np.trace(normal, axis1=1, axis2=2) / 6 + 1e-6
        normal += damping[:, None, None] * np.eye(6, dtype=np.float32)
        step = np.linalg.solve(normal, jacobian @ fit.difference.reshape(len(normal), y.size, 1))[..., 0]
        move = np.clip(step[:, :2], -MAX_STEP[0], MAX_STEP[0])
        change = np.eye(2) + np.clip(step[:, 2:], -MAX_STEP[1], MAX_STEP[1]).reshape(-1, 2, 2)
        transformation = Transformation(
            (transformation.matrix @ change).astype(np.float32),
            (transformation.offset + np.einsum("nij,nj->ni", transformation.matrix, move)).astype(np.float32),
        )
    return transformation


def _is_plausible(transformation: Transformation, aspects: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return True where a transformation is a rotation or reflection with about the same scale in all directions.

    Args:
        transformation: of square thumbnails.
        aspects: width divided by height of both images, (2, n).
    """
    first, second = (np.stack([aspect**-0.5, aspect**0.5], axis=1) for aspect in aspects)
    scales = np.linalg.svd(transformation.matrix * first[:, :, None] / second[:, None, :], compute_uv=False)
    mean = np.sqrt(scales.prod(axis=1))
    is_scaled = (mean >= SCALES[0]) & (mean <= SCALES[1])
    return np.asarray(is_scaled & (scales[:, 0] <= MAX_STRETCH * scales[:, 1]))
