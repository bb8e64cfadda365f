"""Which images show the same: exact copies by their content, near copies by a perceptual hash and a comparison.

The hash is that of Zauner (2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1),
64 low frequencies of the cosine transform against their median, of a grey thumbnail. It is taken at nine positions a
pixel apart, so that a copy that was shifted or cropped by a pixel has the same hash at one of them. Hashes that differ
in a few bits only bring a pair together; whether it is the same image is told by how much of one thumbnail the other
explains.
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

THUMBNAIL_SIDE = 64  # pixels of a thumbnail at most
BLUR_SIGMA = (
    1 / 64
)  # of a thumbnail's side: how far it is smoothed (sigma) before a comparison, which noise else decides
NUM_FREQUENCIES = 8  # in each direction
MIN_SIDE = 16  # pixels of an image that can be hashed
BLACK_LEVEL = 12  # of 255, at most
MIN_GRAY_RANGE = 64  # of 255: images of fewer greys are stretched before they are compared
MAX_SHIFT = 2  # pixels of a thumbnail, that a copy may be moved between the shifts or at its border
MIN_VISIBLE_AREA = 0.2  # of a thumbnail's area
SHIFTS = [(0, 0), *((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))]
HAMMING_RADIUS = 4  # bits of 64 in which hashes of a pair may differ
CANDIDATE_CHUNK = 2**21
COMPARISON_CHUNK = 256
CLUSTERING_CHUNK = 2**12
# Of thousands of frames of one film each is like each. So that the cost grows with images and not with pairs:
MAX_BUCKET_NEIGHBORS = 512  # at most that share a piece of a hash with an image, those nearest to it in order
MAX_NEAR_DUPLICATES = (
    8  # near duplicates of an image, from which its others are no longer named, if they hang together anyway
)


class ImageSignature(NamedTuple):
    """What is kept of an image to find its copies.

    Attributes:
        thumbnail: grey, (side, side), `SIDE` pixels or as small as the image.
        hashes: of the thumbnail at each of `SHIFTS`, the unshifted one first.
    """

    thumbnail: Pixels
    hashes: HashArray


def drop_equal_channels(pixels: Pixels) -> Pixels:
    """The image with one channel where its three are the same, else as it is."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    return pixels


def content_hash(pixels: Pixels) -> str:
    """SHA-256 of what an image shows, whatever file format or number of equal channels it was stored in."""
    pixels = drop_equal_channels(pixels)
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def compute_signature(image: Image.Image) -> ImageSignature:
    """Thumbnail and hashes of an image.

    Raises:
        ValueError: it is smaller than `LEAST_SIDE`.
    """
    side = min(THUMBNAIL_SIDE, *image.size)
    if side < MIN_SIDE:
        raise ValueError(f"an image of {image.height} x {image.width} pixels is too small for a perceptual hash")
    grey = image.convert("L")
    if np.ptp(np.asarray(grey)) < MIN_GRAY_RANGE:  # as of 16-bit values that fill little of their range
        grey = ImageOps.autocontrast(grey)
    if grey.size != (side, side):
        grey = grey.resize((side, side), Image.Resampling.BOX)
    thumbnail = np.asarray(grey)
    waves = _dct_basis(side)  # three shifts and eight frequencies in a row, side
    spectrum = waves @ thumbnail.astype(np.float32) @ waves.T
    cells = spectrum.reshape(3, NUM_FREQUENCIES, 3, NUM_FREQUENCIES).swapaxes(1, 2)  # y shift, x shift, frequencies
    shifted = np.stack([cells[1 + y, 1 + x].ravel() for y, x in SHIFTS])
    bits = shifted > np.median(shifted, axis=1, keepdims=True)
    return ImageSignature(thumbnail, np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64))


@cache
def _dct_basis(side: int) -> NDArray[np.float32]:
    """Cosines over the thumbnail's inner part, at the three shifts."""
    margin = _margin(side)
    inner = side - 2 * margin
    angle = np.pi / inner * np.outer(np.arange(1, NUM_FREQUENCIES + 1), np.arange(inner) + 0.5)
    waves = np.zeros((3, NUM_FREQUENCIES, side), np.float32)
    for place, shift in enumerate((-1, 0, 1)):
        waves[place, :, margin + shift : margin + shift + inner] = np.cos(angle)
    return waves.reshape(3 * NUM_FREQUENCIES, side)


def _margin(side: int) -> int:
    """Pixels of a thumbnail that the hash and the comparison leave out, so that there is room to shift."""
    return max(1, round(side / 32))


def find_near_duplicates(sketches: Sequence[ImageSignature], threshold: float) -> pd.DataFrame:
    """Pairs of images that show nearly the same: re-encoded, brightened, shifted or cropped by a pixel.

    Args:
        sketches: one of each image; without exact copies, all pairs of which would be named.
        threshold: similarity from which a pair counts, 0 to 1.

    Returns:
        One row per pair, in order: `first` and `second` (positions in `sketches`, first < second) and `similarity`, the
        share of one thumbnail's variance that the other explains. Two images that both have `ENOUGH` others, and are
        joined by pairs already, need not be a row.
    """
    pairs = _candidate_pairs(np.array([one.hashes for one in sketches], np.uint64).reshape(-1, len(SHIFTS)))
    kept, similarities = [np.empty((0, 2), np.int64)], [np.empty(0)]
    partners = np.zeros(len(sketches), np.int64)
    together = np.arange(len(sketches))
    start = 0
    while start < len(pairs):
        some = pairs[start : start + CLUSTERING_CHUNK]
        start += len(some)
        enough = (partners[some] >= MAX_NEAR_DUPLICATES).all(axis=1) & (together[some[:, 0]] == together[some[:, 1]])
        some = some[~enough]
        parts = [some[i : i + COMPARISON_CHUNK] for i in range(0, len(some), COMPARISON_CHUNK)]
        alike = np.concatenate([np.empty(0), *(_pair_similarities(sketches, part) for part in parts)])
        kept.append(some[alike >= threshold])
        similarities.append(alike[alike >= threshold])
        if len(kept[-1]):
            partners += np.bincount(kept[-1].ravel(), minlength=len(sketches))
            graph = coo_array((np.ones(len(kept[-1])), together[kept[-1]].T), shape=(len(sketches), len(sketches)))
            together = connected_components(graph, directed=False)[1][together]
    found = np.concatenate(kept)
    return pd.DataFrame({"first": found[:, 0], "second": found[:, 1], "similarity": np.concatenate(similarities)})


def _pair_similarities(sketches: Sequence[ImageSignature], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    return _explained_variance(
        [sketches[i].thumbnail for i in pairs[:, 0]], [sketches[i].thumbnail for i in pairs[:, 1]]
    )


def _candidate_pairs(hashes: HashArray) -> NDArray[np.int64]:
    """Pairs with hashes within `RADIUS` bits at one of the shifts, (pairs, 2), each once and in order.

    Of RADIUS + 1 pieces of a hash at least one is the same in such a pair, so only images that share a piece are
    compared (multi-index hashing; Norouzi, Punjani and Fleet 2012).
    """
    images = len(hashes)
    codes = np.zeros(0, np.int64)  # first * images + second
    ends = np.linspace(0, 64, HAMMING_RADIUS + 2).round().astype(np.uint64)
    for low, high in pairwise(ends):
        rotated = (hashes << (np.uint64(64) - high)) | (hashes >> high) if high < 64 else hashes  # the piece in front
        rest = np.uint64(64) - (high - low)
        order = np.argsort(rotated[:, 0], kind="stable")
        ordered = rotated[order, 0]
        found = [codes]
        for shift in range(len(SHIFTS)):
            left = np.searchsorted(ordered >> rest, rotated[:, shift] >> rest, "left")
            right = np.searchsorted(ordered >> rest, rotated[:, shift] >> rest, "right")
            place = np.searchsorted(ordered, rotated[:, shift])
            left = np.maximum(left, np.minimum(place - MAX_BUCKET_NEIGHBORS // 2, right - MAX_BUCKET_NEIGHBORS))
            counts = np.minimum(right - left, MAX_BUCKET_NEIGHBORS)
            for some in _slices_by_total(counts):
                mine = np.repeat(np.arange(some.start, some.stop), counts[some])
                before = np.cumsum(counts[some]) - counts[some]
                rank = np.arange(len(mine)) - np.repeat(before, counts[some])
                other = order[np.repeat(left[some], counts[some]) + rank]
                near = np.bitwise_count(hashes[mine, shift] ^ hashes[other, 0]) <= HAMMING_RADIUS
                one, two = mine[near & (mine != other)], other[near & (mine != other)]
                found.append(np.unique(np.minimum(one, two) * images + np.maximum(one, two)))
        codes = np.unique(np.concatenate(found))
    return np.stack([codes // images, codes % images], axis=1) if images else np.empty((0, 2), np.int64)


def _slices_by_total(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Cuts a list of counts into runs of about `PAIRS_AT_ONCE` in sum."""
    totals = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + CANDIDATE_CHUNK, "right")))
        yield slice(start, stop)
        start = stop


def _explained_variance(one: Sequence[Pixels], other: Sequence[Pixels]) -> NDArray[np.float64]:
    """How much of each thumbnail in `other` the one in `one` explains, (pairs,).

    The largest R^2, over shifts of a pixel, of a regression on the thumbnail, smoothed, and what its derivatives along
    the two axes make of it: by themselves they stand for the part of a pixel by which it may be shifted besides, times
    the place for a crop by as much. 0 where the thumbnail would have to be inverted.
    """
    result = np.zeros(len(one))
    sides = np.array([min(len(a), len(b)) for a, b in zip(one, other, strict=True)])
    for side in np.unique(sides):
        of = np.flatnonzero(sides == side).tolist()
        a, b = (np.stack([_smooth_thumbnail(images[i], int(side)) for i in of]) for images in (one, other))
        down, right = np.gradient(a, axis=(1, 2))
        place = np.linspace(-1, 1, int(side), dtype=np.float32)
        bases = np.stack([a, down, right, down * place[:, None], right * place], axis=1)  # pairs, 5, side, side
        margin = _margin(int(side))
        inner = slice(margin, -margin)
        target = b[:, inner, inner].reshape(len(of), 1, -1)
        shown = _visible_mask(a, b)[:, inner, inner].reshape(len(of), 1, -1)
        target = _center(target, shown)
        for y, x in SHIFTS:
            moved = bases[:, :, margin + y : side - margin + y, margin + x : side - margin + x]
            moved = _center(moved.reshape(len(of), len(bases[0]), -1), shown)
            gram = moved @ moved.swapaxes(1, 2) + 1e-6 * np.eye(moved.shape[1])
            weights = np.linalg.solve(gram, moved @ target.swapaxes(1, 2))[..., 0]  # pairs, 5
            residual = target[:, 0] - np.einsum("pk,pkn->pn", weights, moved)
            share = 1 - (residual**2).sum(axis=-1) / ((target[:, 0] ** 2).sum(axis=-1) + 1e-9)
            near = (weights[:, 0] > 0) & (np.abs(weights[:, 1:]).max(axis=1) <= MAX_SHIFT * weights[:, 0])
            result[of] = np.maximum(result[of], np.where(near, share, 0.0))
    return result


def _visible_mask(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where both thumbnails show more than black, (pairs, side, side); everywhere, if that is too little to go by.

    The edge of the round picture of an eye, or of a field of X-rays, would else make any two of them alike.
    """
    shown = minimum_filter(np.minimum(one, other), size=(1, 3, 3)) > BLACK_LEVEL
    return np.asarray(shown | (shown.mean(axis=(1, 2), keepdims=True) < MIN_VISIBLE_AREA))


def _center(values: NDArray[np.float32], shown: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Values less their mean where something is shown, 0 elsewhere."""
    mean = (values * shown).sum(axis=-1, keepdims=True) / shown.sum(axis=-1, keepdims=True)
    return np.asarray((values - mean) * shown)


def _smooth_thumbnail(thumbnail: Pixels, side: int) -> NDArray[np.float32]:
    if len(thumbnail) != side:
        thumbnail = np.asarray(Image.fromarray(thumbnail).resize((side, side), Image.Resampling.BOX))
    smooth = thumbnail.astype(np.float32)
    return np.asarray(gaussian_filter(smooth, BLUR_SIGMA * side))
