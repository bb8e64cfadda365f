"""Exact and near-duplicate detection by content hash, perceptual hash and thumbnail regression.

The perceptual hash is the DCT pHash of Zauner (2010, "Implementation and benchmarking of perceptual image hash
functions", section 3.2.1): 64 low DCT frequencies of a grayscale thumbnail, thresholded at their median. It is computed
at nine shifts of one pixel, so that a copy that was shifted or cropped by a pixel matches at one of them. A small
Hamming distance only makes a pair a candidate; the similarity is the share of one thumbnail's variance that a
regression on the other explains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter, minimum_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Pixels = NDArray[np.uint8]
HashArray = NDArray[np.uint64]

THUMBNAIL_SIDE = 64  # pixels, maximum
BLUR_SIGMA = 1 / 64  # fraction of the thumbnail side; without blur, noise would dominate the comparison
NUM_FREQUENCIES = 8  # in each direction
MIN_SIDE = 16  # pixels; smaller images cannot be hashed
BLACK_LEVEL = 12  # of 255; pixels up to this value count as background
MIN_GRAY_RANGE = 64  # of 255; images with a smaller range are contrast-stretched first
MAX_SHIFT = 2  # thumbnail pixels; maximum subpixel shift or crop of a duplicate, in addition to SHIFTS
MIN_VISIBLE_AREA = 0.2  # fraction of the thumbnail area
SHIFTS = [(0, 0), *((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))]
HAMMING_RADIUS = 4  # maximum number of different bits, of 64, in the hashes of a candidate pair
CANDIDATE_CHUNK = 2**21
COMPARISON_CHUNK = 256
CLUSTERING_CHUNK = 2**12
# In thousands of frames of one video all pairs are near-duplicates. Two limits keep the cost linear in the images:
MAX_BUCKET_NEIGHBORS = 512  # images compared per shared hash substring, the nearest in sorted order
MAX_NEAR_DUPLICATES = 8  # pairs per image, after which more pairs within its cluster are skipped


class ImageSignature(NamedTuple):
    """Thumbnail and perceptual hashes of an image.

    Attributes:
        thumbnail: grayscale, (side, side); the side is `THUMBNAIL_SIDE`, or less for a smaller image.
        hashes: 64-bit hash at each of `SHIFTS`, the unshifted one first.
    """

    thumbnail: Pixels
    hashes: HashArray


def drop_equal_channels(pixels: Pixels) -> Pixels:
    """Reduce an image with identical channels to one channel; leave others unchanged."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    return pixels


def content_hash(pixels: Pixels) -> str:
    """SHA-256 of the decoded pixels, independent of the file format and of identical channels."""
    pixels = drop_equal_channels(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def compute_signature(image: Image.Image) -> ImageSignature:
    """Compute the thumbnail and perceptual hashes of an image.

    Raises:
        ValueError: the image is smaller than `MIN_SIDE`.
    """
    side = min(THUMBNAIL_SIDE, *image.size)
    if side < MIN_SIDE:
        raise ValueError(f"an image of {image.height} x {image.width} pixels is too small for a perceptual hash")
    gray = image.convert("L")
    if np.ptp(np.asarray(gray)) < MIN_GRAY_RANGE:  # e.g. 16-bit images that use little of their range
        gray = ImageOps.autocontrast(gray)
    if gray.size != (side, side):
        gray = gray.resize((side, side), Image.Resampling.BOX)
    thumbnail = np.asarray(gray)
    basis = _dct_basis(side)  # (3 shifts * 8 frequencies, side)
    spectrum = basis @ thumbnail.astype(np.float32) @ basis.T
    # (y shift, x shift, frequency, frequency)
    cells = spectrum.reshape(3, NUM_FREQUENCIES, 3, NUM_FREQUENCIES).swapaxes(1, 2)
    shifted = np.stack([cells[1 + y, 1 + x].ravel() for y, x in SHIFTS])
    bits = shifted > np.median(shifted, axis=1, keepdims=True)
    return ImageSignature(thumbnail, np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64))


@cache
def _dct_basis(side: int) -> NDArray[np.float32]:
    """DCT basis over the inner part of the thumbnail at three shifts, (3 * frequencies, side)."""
    margin = _margin(side)
    inner = side - 2 * margin
    angle = np.pi / inner * np.outer(np.arange(1, NUM_FREQUENCIES + 1), np.arange(inner) + 0.5)
    basis = np.zeros((3, NUM_FREQUENCIES, side), np.float32)
    for index, shift in enumerate((-1, 0, 1)):
        basis[index, :, margin + shift : margin + shift + inner] = np.cos(angle)
    return basis.reshape(3 * NUM_FREQUENCIES, side)


def _margin(side: int) -> int:
    """Width of the thumbnail border that hash and comparison leave out, to allow for shifts; pixels."""
    return max(1, round(side / 32))


def find_near_duplicates(signatures: Sequence[ImageSignature], threshold: float) -> pd.DataFrame:
    """Find pairs of near-duplicates: re-encoded, brightened, shifted or cropped by a pixel.

    Args:
        signatures: one per image; without exact duplicates, because each pair of them would be listed.
        threshold: minimum similarity of a pair, 0 to 1.

    Returns:
        One row per pair: `first` and `second` (positions in `signatures`, first < second) and `similarity` (R^2 of the
        thumbnail regression). Pairs may be missing between images that are already connected and both have
        `MAX_NEAR_DUPLICATES` other pairs.
    """
    pairs = _candidate_pairs(
        np.array([signature.hashes for signature in signatures], np.uint64).reshape(-1, len(SHIFTS))
    )
    accepted, similarities = [np.empty((0, 2), np.int64)], [np.empty(0)]
    num_pairs = np.zeros(len(signatures), np.int64)
    component = np.arange(len(signatures))
    start = 0
    while start < len(pairs):
        batch = pairs[start : start + CLUSTERING_CHUNK]
        start += len(batch)
        is_redundant = (num_pairs[batch] >= MAX_NEAR_DUPLICATES).all(axis=1) & (
            component[batch[:, 0]] == component[batch[:, 1]]
        )
        batch = batch[~is_redundant]
        chunks = [batch[i : i + COMPARISON_CHUNK] for i in range(0, len(batch), COMPARISON_CHUNK)]
        similarity = np.concatenate([np.empty(0), *(_pair_similarities(signatures, chunk) for chunk in chunks)])
        accepted.append(batch[similarity >= threshold])
        similarities.append(similarity[similarity >= threshold])
        if len(accepted[-1]):
            num_pairs += np.bincount(accepted[-1].ravel(), minlength=len(signatures))
            graph = coo_array(
                (np.ones(len(accepted[-1])), component[accepted[-1]].T), shape=(len(signatures), len(signatures))
            )
            component = connected_components(graph, directed=False)[1][component]
    result = np.concatenate(accepted)
    return pd.DataFrame({"first": result[:, 0], "second": result[:, 1], "similarity": np.concatenate(similarities)})


def _pair_similarities(signatures: Sequence[ImageSignature], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    return _explained_variance(
        [signatures[i].thumbnail for i in pairs[:, 0]], [signatures[i].thumbnail for i in pairs[:, 1]]
    )


def _candidate_pairs(hashes: HashArray) -> NDArray[np.int64]:
    """Sorted unique pairs with a Hamming distance of at most `HAMMING_RADIUS` at one of the shifts, (pairs, 2).

    If a hash is cut into HAMMING_RADIUS + 1 substrings, such a pair shares at least one, so only images with a common
    substring are compared (multi-index hashing; Norouzi, Punjani and Fleet 2012).
    """
    images = len(hashes)
    codes = np.zeros(0, np.int64)  # first * images + second
    ends = np.linspace(0, 64, HAMMING_RADIUS + 2).round().astype(np.uint64)
    for low, high in pairwise(ends):  # one substring of the hashes, rotated to the front
        rotated = (hashes << (np.uint64(64) - high)) | (hashes >> high) if high < 64 else hashes
        rest = np.uint64(64) - (high - low)
        order = np.argsort(rotated[:, 0], kind="stable")
        ordered = rotated[order, 0]
        new_codes = [codes]
        for shift in range(len(SHIFTS)):
            left = np.searchsorted(ordered >> rest, rotated[:, shift] >> rest, "left")
            right = np.searchsorted(ordered >> rest, rotated[:, shift] >> rest, "right")
            position = np.searchsorted(ordered, rotated[:, shift])
            left = np.maximum(left, np.minimum(position - MAX_BUCKET_NEIGHBORS // 2, right - MAX_BUCKET_NEIGHBORS))
            counts = np.minimum(right - left, MAX_BUCKET_NEIGHBORS)
            for block in _slices_by_total(counts):
                query = np.repeat(np.arange(block.start, block.stop), counts[block])
                before = np.cumsum(counts[block]) - counts[block]
                rank = np.arange(len(query)) - np.repeat(before, counts[block])
                other = order[np.repeat(left[block], counts[block]) + rank]
                is_near = np.bitwise_count(hashes[query, shift] ^ hashes[other, 0]) <= HAMMING_RADIUS
                a, b = query[is_near & (query != other)], other[is_near & (query != other)]
                new_codes.append(np.unique(np.minimum(a, b) * images + np.maximum(a, b)))
        codes = np.unique(np.concatenate(new_codes))
    return np.stack([codes // images, codes % images], axis=1) if images else np.empty((0, 2), np.int64)


def _slices_by_total(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Cut a list of counts into slices that each sum to about `CANDIDATE_CHUNK`."""
    totals = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + CANDIDATE_CHUNK, "right")))
        yield slice(start, stop)
        start = stop


def _explained_variance(predictors: Sequence[Pixels], targets: Sequence[Pixels]) -> NDArray[np.float64]:
    """Share of the variance of each target thumbnail that its predictor explains, (pairs,).

    The largest R^2, over one-pixel shifts, of a linear regression on the smoothed thumbnail, its gradient
    (first-order model of a subpixel shift) and the gradient times the position (of a crop). 0 if the fit needs an
    inverted thumbnail or a larger shift than `MAX_SHIFT`.
    """
    result = np.zeros(len(predictors))
    sides = np.array([min(len(a), len(b)) for a, b in zip(predictors, targets, strict=True)])
    for side in np.unique(sides):
        members = np.flatnonzero(sides == side).tolist()
        a, b = (
            np.stack([_smooth_thumbnail(images[i], int(side)) for i in members]) for images in (predictors, targets)
        )
        down, right = np.gradient(a, axis=(1, 2))
        position = np.linspace(-1, 1, int(side), dtype=np.float32)
        bases = np.stack([a, down, right, down * position[:, None], right * position], axis=1)  # (pairs, 5, side, side)
        margin = _margin(int(side))
        inner = slice(margin, -margin)
        target = b[:, inner, inner].reshape(len(members), 1, -1)
        visible = _visible_mask(a, b)[:, inner, inner].reshape(len(members), 1, -1)
        target = _center(target, visible)
        for y, x in SHIFTS:
            shifted_bases = bases[:, :, margin + y : side - margin + y, margin + x : side - margin + x]
            shifted_bases = _center(shifted_bases.reshape(len(members), len(bases[0]), -1), visible)
            gram = shifted_bases @ shifted_bases.swapaxes(1, 2) + 1e-6 * np.eye(shifted_bases.shape[1])
            weights = np.linalg.solve(gram, shifted_bases @ target.swapaxes(1, 2))[..., 0]  # (pairs, 5)
            residual = target[:, 0] - np.einsum("pk,pkn->pn", weights, shifted_bases)
            explained = 1 - (residual**2).sum(axis=-1) / ((target[:, 0] ** 2).sum(axis=-1) + 1e-9)
            is_valid = (weights[:, 0] > 0) & (np.abs(weights[:, 1:]).max(axis=1) <= MAX_SHIFT * weights[:, 0])
            result[members] = np.maximum(result[members], np.where(is_valid, explained, 0.0))
    return result


def _visible_mask(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mask of pixels where neither thumbnail is black, (pairs, side, side); all pixels if too few remain.

    Otherwise the black border of fundus photographs or collimated radiographs would make any two of them similar.
    """
    visible = minimum_filter(np.minimum(first, second), size=(1, 3, 3)) > BLACK_LEVEL
    return np.asarray(visible | (visible.mean(axis=(1, 2), keepdims=True) < MIN_VISIBLE_AREA))


def _center(values: NDArray[np.float32], visible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Subtract the mean over the mask and set values outside it to 0."""
    mean = (values * visible).sum(axis=-1, keepdims=True) / visible.sum(axis=-1, keepdims=True)
    return np.asarray((values - mean) * visible)


def _smooth_thumbnail(thumbnail: Pixels, side: int) -> NDArray[np.float32]:
    if len(thumbnail) != side:
        thumbnail = np.asarray(Image.fromarray(thumbnail).resize((side, side), Image.Resampling.BOX))
    smooth = thumbnail.astype(np.float32)
    return np.asarray(gaussian_filter(smooth, BLUR_SIGMA * side))
