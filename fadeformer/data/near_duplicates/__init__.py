"""Exact and near-duplicate detection, including copies that were augmented before they were published.

Each image is described by features of its thumbnail that rotations, reflections, shifts and changes of contrast keep
(`spectra`). Only images with similar descriptors are candidates (`candidates`); a pair of candidates is registered and
compared pixel by pixel (`registration`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from PIL import Image

from fadeformer.data.near_duplicates import candidates, registration
from fadeformer.data.near_duplicates.signature import (
    MIN_SIDE,
    ImageSignature,
    compute_signature,
    content_hash,
    drop_equal_channels,
)
from fadeformer.data.near_duplicates.spectra import SIDE

__all__ = [
    "MIN_SIDE",
    "SEARCHED_COPIES",
    "ImageSignature",
    "compute_signature",
    "content_hash",
    "drop_equal_channels",
    "find_near_duplicates",
]

SEARCHED_COPIES = (
    "identical images in any file format, and copies that were re-encoded, mirrored, rotated by right angles or up to"
    " 15 degrees, shifted or cropped by up to 10 %, inverted, or changed in brightness and contrast; not searched for:"
    " stronger crops, elastic deformations, and other photographs of the same patient"
)


def find_near_duplicates(signatures: Sequence[ImageSignature], threshold: float) -> pd.DataFrame:
    """Find pairs of near-duplicates: re-encoded or augmented copies, see `SEARCHED_COPIES`.

    Copies of one image are connected by such pairs, but not every two of them: each image is compared with at most
    `candidates.MAX_CANDIDATES` others, so that the cost grows with the number of images.

    Args:
        signatures: one per image; without exact duplicates, because they would use up the compared pairs.
        threshold: minimum similarity of a pair, 0 to 1.

    Returns:
        One row per pair: `first` and `second` (positions in `signatures`, first < second) and `similarity` (R^2 of one
        image on the other after registration), sorted.
    """
    images = np.zeros((len(signatures), SIDE, SIDE), np.uint8)
    for index, signature in enumerate(signatures):
        thumbnail = Image.fromarray(signature.thumbnail).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        images[index] = np.asarray(thumbnail)
    pairs = candidates.candidate_pairs(images)
    similarity = registration.pair_similarities(signatures, images, pairs, threshold)
    ends = np.sort(pairs[["first", "second"]].to_numpy(), axis=1)
    result = pd.DataFrame({"first": ends[:, 0], "second": ends[:, 1], "similarity": similarity.astype(np.float64)})
    return result[similarity >= threshold].sort_values(["first", "second"], ignore_index=True)
