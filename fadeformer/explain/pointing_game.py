"""Pointing game: is the maximum of an attribution map inside the bounding box of the lesion?

Zhang et al. 2018, "Top-down neural attention by excitation backprop", Int. J. Comput. Vis. 126,
doi:10.1007/s11263-017-1059-x. A case is an (image, finding) pair with one or more boxes x, y, w, h: left and upper
edge, width and height in pixels of the preprocessed image (`fadeformer.data.boxes`).
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

MAX_CASES = 1000  # NIH has 984 boxes
METHOD_NAMES = {"grad_cam": "Grad-CAM", "attention": "Attention part", "laplacian": "Laplacian part"}


@dataclass(frozen=True)
class PointingHits:
    """Outcome of each case, arrays of shape (cases,).

    Attributes:
        hit: True if the maximum of the map is inside a box.
        chance: fraction of the grid positions inside a box, NaN if no box is inside the image.
        constant: True if the map has one value everywhere and so no maximum; this counts as no hit.
    """

    hit: NDArray[np.bool_]
    chance: FloatArray
    constant: NDArray[np.bool_]


@dataclass(frozen=True)
class PointingScore:
    """Hit rate of the pointing game.

    Attributes:
        hits: number of cases whose map has its maximum inside a box.
        cases: number of evaluated cases.
        share: hits / cases; None without any case.
        interval: confidence interval of `share`; None without any case or if all cases are of one patient.
        chance: expected hit rate of a random grid position; None without any case.
        constant: evaluated cases with a constant map, which count as no hit.
        unreachable: evaluated cases with no patch center inside a box, which no map on this grid can hit.
        outside: cases left out because their boxes are entirely outside the image (aspect `crop`).
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
    """Test for each map whether its maximum is inside one of the case's boxes.

    The maximum is located at the center of its patch, as in the bilinearly upsampled map; of several maxima, the first
    in row-major order counts.

    Args:
        maps: maps on the patch grid or upsampled, (cases, height, width).
        boxes: boxes of each case, (boxes, 4), in pixels of the preprocessed image; NaN for a box outside it.
        side: side of the preprocessed images in pixels.
        margin: pixels around a box that also count as a hit; Zhang et al. allow 15 pixels of the original image.

    Raises:
        ValueError: the number of box arrays is not that of the maps, or their shape is not (boxes, 4).
    """
    box_arrays = [np.asarray(array, dtype=np.float64) for array in boxes]
    if len(box_arrays) != len(maps) or any(
        array.ndim != 2 or array.shape[1] != len(BOX_COLUMNS) for array in box_arrays
    ):
        raise ValueError(f"{len(maps)} maps need as many box arrays of shape (boxes, 4), got {len(box_arrays)}")
    height, width = maps.shape[1:]
    row_centers, column_centers = ((np.arange(n) + 0.5) * side / n for n in (height, width))  # patch centers
    constant = is_constant(maps)
    hit, chance = np.zeros(len(maps), dtype=bool), np.full(len(maps), np.nan)
    for case, (heatmap, all_boxes) in enumerate(zip(maps, box_arrays, strict=True)):
        visible = all_boxes[np.isfinite(all_boxes).all(axis=1)]
        if not len(visible):
            continue
        x, y, w, h = visible.T[..., None]  # each (boxes, 1)
        in_rows = (row_centers >= y - margin) & (row_centers < y + h + margin)  # boxes, height
        in_columns = (column_centers >= x - margin) & (column_centers < x + w + margin)  # boxes, width
        inside = (in_rows[:, :, None] & in_columns[:, None, :]).any(axis=0)  # height, width
        chance[case] = inside.mean()
        hit[case] = not constant[case] and inside.flat[heatmap.argmax()]
    return PointingHits(hit, chance, constant)


def score_hits(outcomes: PointingHits, groups: NDArray[np.int64], confidence: float) -> PointingScore:
    """Compute the hit rate with its confidence interval.

    Args:
        outcomes: outcome of each case.
        groups: group index (patient or lesion) of each case, (cases,); one image can have several cases.
        confidence: confidence level; the interval is Wilson's, or adjusted for clustering if cases share a group
            (`proportion_interval`).
    """
    evaluated = np.isfinite(outcomes.chance)
    cases, hits = int(evaluated.sum()), int(outcomes.hit[evaluated].sum())
    return PointingScore(
        hits=hits,
        cases=cases,
        share=hits / cases if cases else None,
        interval=proportion_interval(outcomes.hit, evaluated, groups, confidence),
        chance=float(outcomes.chance[evaluated].mean()) if cases else None,
        constant=int(outcomes.constant[evaluated].sum()),
        unreachable=int((outcomes.chance[evaluated] == 0).sum()),
        outside=int((~evaluated).sum()),
    )


def evaluate_pointing(
    classifier: Classifier,
    boxes: pd.DataFrame,
    index: pd.DataFrame,
    pixels: NDArray[np.uint8],
    classes: Sequence[str],
    confidence: float,
) -> dict[str, Any] | None:
    """Play the pointing game with each attribution method, overall and per finding.

    A map explains the finding of its box, whatever the network predicted. If there are more than `MAX_CASES` cases, an
    evenly spaced sample is evaluated.

    Args:
        classifier: the model.
        boxes: boxes of these images, from `fadeformer.data.arrays.read_boxes`.
        index: `id` and `group` of each image.
        pixels: images, uint8, (images, side, side, channels).
        classes: names of the findings.
        confidence: confidence level of the intervals.

    Returns:
        A dictionary for JSON: `confidence`, `total_cases`, `cases` (evaluated), `images` (evaluated) and `methods`, for
        each its `name`, `overall` and `per_class` with the fields of `PointingScore`. None if there are no boxes.

    Raises:
        ValueError: the network has no spatial feature map.
    """
    if boxes.empty:
        return None
    row_by_id = pd.Series(np.arange(len(index)), index=index["id"])
    pairs = np.stack([row_by_id.loc[boxes["id"]].to_numpy(), boxes["class"].to_numpy(dtype=np.int64)], axis=1)
    cases, case_of = np.unique(pairs, axis=0, return_inverse=True)
    total_cases = len(cases)
    sample = np.unique(np.linspace(0, total_cases - 1, min(total_cases, MAX_CASES)).round().astype(int))
    rows, findings = cases[sample].T
    box_values = boxes[BOX_COLUMNS].to_numpy(dtype=np.float64)
    case_boxes = [box_values[case_of == case] for case in sample]
    groups = encode_groups(index["group"])[rows]
    inputs = np.array(pixels[rows]), classifier.normalization, findings
    methods: dict[str, Any] = {}
    for name, method in available_methods(classifier.model).items():
        hits = find_hits(method(classifier.model, *inputs), case_boxes, pixels.shape[1])
        methods[name] = {
            "name": METHOD_NAMES[name],
            "overall": asdict(score_hits(hits, groups, confidence)),
            "per_class": {
                classes[label]: asdict(
                    score_hits(_select_cases(hits, findings == label), groups[findings == label], confidence)
                )
                for label in np.unique(findings)
            },
        }
    return {
        "confidence": confidence, "total_cases": total_cases, "cases": len(sample), "images": len(np.unique(rows)),
        "methods": methods,
    }  # fmt: skip


def _select_cases(hits: PointingHits, rows: NDArray[np.bool_]) -> PointingHits:
    return PointingHits(hits.hit[rows], hits.chance[rows], hits.constant[rows])


def describe_results(results: dict[str, Any]) -> list[str]:
    """Describe the results of `evaluate_pointing` in sentences for the report."""
    total = results["total_cases"]
    sampled = f", an evenly spaced sample of {total:,}" if results["cases"] < total else ""
    sentences = [
        f"Pointing game with hand-drawn boxes (Zhang et al. 2018): {results['cases']:,} findings in"
        f" {results['images']:,} test images{sampled}. A map hits if its maximum is inside a box of the finding."
    ]
    for method in results["methods"].values():
        name, score = method["name"], method["overall"]
        if score["share"] is None:
            sentences.append(f"{name}: no box is in the part of an image that the network sees.")
            continue
        bounds = ""
        if score["interval"] is not None:
            low, high = (f"{100 * bound:.0f}" for bound in score["interval"])
            bounds = f" ({100 * results['confidence']:g} % interval {low} to {high} %)"
        is_above_chance = score["interval"] is not None and score["interval"][0] > score["chance"]
        sentences.append(
            f"{name} hits in {100 * score['share']:.0f} % of {score['cases']:,} cases{bounds}; the chance level is"
            f" {100 * score['chance']:.0f} %: {'above' if is_above_chance else 'NOT CLEARLY ABOVE'} chance."
        )
    return sentences
