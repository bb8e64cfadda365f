"""The pointing game: whether the largest value of a map lies on the lesion (Zhang et al. 2018).

"Top-down neural attention by excitation backprop", Int. J. Comput. Vis. 126, doi:10.1007/s11263-017-1059-x. A case is
an image with one of its findings, of which there are one or more boxes: x, y, w, h, that is left and upper edge, width
and height, in pixels of the array (`fadeformer.data.boxes` brings them there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fadeformer.data.boxes import BOX_COLUMNS
from fadeformer.evaluation.intervals.bootstrap import encode_groups
from fadeformer.evaluation.intervals.proportions import proportion_interval
from fadeformer.explain.attribution import FloatArray, is_constant
from fadeformer.explain.sanity_checks import available_methods
from fadeformer.inference.classifier import Classifier

MAX_CASES = 1000  # cases at most; NIH has 984 boxes
METHOD_NAMES = {"grad_cam": "Grad-CAM", "attention": "Attention part", "laplacian": "Laplacian part"}


@dataclass(frozen=True)
class PointingHits:
    """Where the map of each case points; arrays of (cases,).

    Attributes:
        hit: whether it is largest inside a box.
        chance: the share of the places of its grid at which it would be; NaN where no box is in the array.
        constant: whether it has one value everywhere, and so points nowhere: no hit.
    """

    hit: NDArray[np.bool_]
    chance: FloatArray
    constant: NDArray[np.bool_]


@dataclass(frozen=True)
class PointingScore:
    """How often maps point at the right place.

    Attributes:
        hits: cases whose map is largest inside a box.
        cases: that were judged.
        share: hits of them; None if there are none.
        interval: of the share; None likewise, or if all cases are of one patient.
        chance: the share to expect of maps that point anywhere on their grid; None likewise.
        constant: judged cases whose map has one value everywhere: no hits.
        unreachable: judged cases in whose boxes no middle of a patch lies, so that no map of this grid could hit.
        outside: cases that are not judged, since nothing of their boxes is in the array (aspect `crop`).
    """

    hits: int
    cases: int
    share: float | None
    interval: tuple[float, float] | None
    chance: float | None
    constant: int
    unreachable: int
    outside: int


def find_hits(maps: FloatArray, boxes: Sequence[ArrayLike], side: int, margin: float = 0.0) -> PointingHits:
    """Whether each map is largest inside one of its boxes.

    The map's largest value stands at the middle of its patch, and so does that of its bilinear upsampling; of equal
    ones the first in reading order counts.

    Args:
        maps: (cases, height, width), of a grid of patches or upsampled.
        boxes: of each case, (boxes, 4), in pixels of the array; NaN where nothing of a box is in it.
        side: of the arrays that the maps were made from, pixels.
        margin: pixels of the array around a box that count as well; Zhang et al. allow 15 pixels of the original.

    Raises:
        ValueError: boxes do not fit the maps, or are no boxes.
    """
    given = [np.asarray(of, dtype=np.float64) for of in boxes]
    if len(given) != len(maps) or any(of.ndim != 2 or of.shape[1] != len(BOX_COLUMNS) for of in given):
        raise ValueError(
            f"{len(maps)} maps need as many tables of boxes, rows of x, y, w and h; there are {len(given)}"
        )
    height, width = maps.shape[1:]
    down, across = ((np.arange(n) + 0.5) * side / n for n in (height, width))  # middles of the patches
    constant = is_constant(maps)
    hit, chance = np.zeros(len(maps), dtype=bool), np.full(len(maps), np.nan)
    for case, (one, all_boxes) in enumerate(zip(maps, given, strict=True)):
        kept = all_boxes[np.isfinite(all_boxes).all(axis=1)]
        if not len(kept):
            continue
        x, y, w, h = kept.T[..., None]  # each boxes, 1
        in_rows = (down >= y - margin) & (down < y + h + margin)  # boxes, height
        in_columns = (across >= x - margin) & (across < x + w + margin)  # boxes, width
        inside = (in_rows[:, :, None] & in_columns[:, None, :]).any(axis=0)  # height, width
        chance[case] = inside.mean()
        hit[case] = not constant[case] and inside.flat[one.argmax()]
    return PointingHits(hit, chance, constant)


def score_hits(of: PointingHits, groups: NDArray[np.int64], confidence: float) -> PointingScore:
    """Counts the cases.

    Args:
        of: the cases.
        groups: number of each case's patient or lesion, (cases,); one image can be several cases.
        confidence: of the interval, which is Wilson's, or where cases share a patient what `share_interval` says.
    """
    judged = np.isfinite(of.chance)
    cases, hits = int(judged.sum()), int(of.hit[judged].sum())
    return PointingScore(
        hits=hits,
        cases=cases,
        share=hits / cases if cases else None,
        interval=proportion_interval(of.hit, judged, groups, confidence),
        chance=float(of.chance[judged].mean()) if cases else None,
        constant=int(of.constant[judged].sum()),
        unreachable=int((of.chance[judged] == 0).sum()),
        outside=int((~judged).sum()),
    )


def evaluate_pointing(
    classifier: Classifier,
    boxes: pd.DataFrame,
    index: pd.DataFrame,
    pixels: NDArray[np.uint8],
    classes: Sequence[str],
    confidence: float,
) -> dict[str, Any] | None:
    """The pointing game of each explanation that a network has, over all findings and for each.

    A map is of the finding that the box is of, whatever the network thought of it. Of more than `MOST` cases, so many
    are judged that are spread evenly over the images.

    Args:
        classifier: the model.
        boxes: of these images, as `fadeformer.data.arrays.read_boxes` gives them.
        index: `id` and `group` of each image.
        pixels: uint8, (images, side, side, channels).
        classes: names of the findings.
        confidence: of the intervals.

    Returns:
        `confidence`, `known` and `cases` (of an image and a finding: how many there are, and how many were looked at),
        `images` (of these) and `methods`: by key, its `name`, `overall` and `per_class`, which are `Pointing`s as plain
        values. None if there are no boxes.

    Raises:
        ValueError: the network cannot be explained.
    """
    if boxes.empty:
        return None
    row_of = pd.Series(np.arange(len(index)), index=index["id"])
    pairs = np.stack([row_of.loc[boxes["id"]].to_numpy(), boxes["class"].to_numpy(dtype=np.int64)], axis=1)
    cases, case_of = np.unique(pairs, axis=0, return_inverse=True)
    known = len(cases)
    chosen = np.unique(np.linspace(0, known - 1, min(known, MAX_CASES)).round().astype(int))
    rows, of_finding = cases[chosen].T
    values = boxes[BOX_COLUMNS].to_numpy(dtype=np.float64)
    places = [values[case_of == case] for case in chosen]
    groups = encode_groups(index["group"])[rows]
    given = np.array(pixels[rows]), classifier.normalization, of_finding
    methods: dict[str, Any] = {}
    for name, method in available_methods(classifier.model).items():
        of = find_hits(method(classifier.model, *given), places, pixels.shape[1])
        methods[name] = {
            "name": METHOD_NAMES[name],
            "overall": asdict(score_hits(of, groups, confidence)),
            "per_class": {
                classes[label]: asdict(
                    score_hits(_select_cases(of, of_finding == label), groups[of_finding == label], confidence)
                )
                for label in np.unique(of_finding)
            },
        }
    return {
        "confidence": confidence, "total_cases": known, "cases": len(chosen), "images": len(np.unique(rows)),
        "methods": methods,
    }  # fmt: skip


def _select_cases(of: PointingHits, rows: NDArray[np.bool_]) -> PointingHits:
    return PointingHits(of.hit[rows], of.chance[rows], of.constant[rows])


def describe_results(found: dict[str, Any]) -> list[str]:
    """What `points_at_boxes` found, for a reader."""
    some = f", spread over the {found['total_cases']:,} that are known" if found["cases"] < found["known"] else ""
    told = [
        f"Where people drew boxes: {found['cases']:,} findings in {found['images']:,} test images{some}; a map points"
        " where it is largest (the pointing game, Zhang et al. 2018)."
    ]
    for of in found["methods"].values():
        name, one = of["name"], of["overall"]
        if one["share"] is None:
            told.append(f"{name}: no box lies in the part of an image that the network sees.")
            continue
        bounds = ""
        if one["interval"] is not None:
            low, high = (f"{100 * bound:.0f}" for bound in one["interval"])
            bounds = f" ({100 * found['confidence']:g} % interval {low} to {high} %)"
        beyond = one["interval"] is not None and one["interval"][0] > one["chance"]
        told.append(
            f"{name} points into the box in {100 * one['share']:.0f} % of {one['cases']:,}{bounds}, where pointing"
            f" anywhere would in {100 * one['chance']:.0f} %: {'more' if beyond else 'NOT SURELY MORE'} than chance."
        )
    return told
