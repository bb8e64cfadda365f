"""Attribution maps of the most confident errors, with a sanity check of the attribution methods."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fadeformer.explain.attribution import FloatArray, fade_attribution, grad_cam, upsample
from fadeformer.explain.pointing_game import METHOD_NAMES
from fadeformer.explain.sanity_checks import available_methods, model_randomization_test
from fadeformer.inference.classifier import Classifier

SANITY_CHECK_IMAGES = 16  # test images in the sanity check
LOCATION_CAVEAT = (
    "A map shows at which position the network holds the evidence for its decision. In a ViT this need not be the"
    " position of the evidence in the image (docs/reference/evaluation.md)."
)


@dataclass(frozen=True)
class CaseExplanations:
    """Attribution maps of some images, with the results of the sanity check.

    Attributes:
        maps: maps by display name, each (images, side, side); negative values are evidence against the class.
        results: `alpha` (None without a published Fade layer) and `randomization` by method, ready for JSON.
        sentences: the results as text for the report.
    """

    maps: dict[str, FloatArray]
    results: dict[str, Any]
    sentences: list[str]


def explain_cases(
    classifier: Classifier, errors: pd.DataFrame, pixels: NDArray[np.uint8], predicted: NDArray[np.int64], seed: int
) -> CaseExplanations:
    """Compute maps of the most confident errors, and run the sanity check on evenly spaced test images.

    Args:
        classifier: the model.
        errors: from `fadeformer.evaluation.error_gallery.most_confident_errors`; columns `row` and `class` are used.
        pixels: all test images, uint8, (images, side, side, channels).
        predicted: predicted class of each test image, or the finding with the highest score, (images,).
        seed: random seed of the sanity check.
    """
    is_cumulative = classifier.task.num_omitted_outputs > 0
    model, normalization = classifier.model, classifier.normalization
    methods = available_methods(model)
    sample = np.unique(np.linspace(0, len(pixels) - 1, SANITY_CHECK_IMAGES).round().astype(int))
    outputs = np.zeros_like(predicted) if is_cumulative else predicted
    try:
        checks = model_randomization_test(
            model, np.array(pixels[sample]), normalization, outputs[sample], methods=methods, seed=seed
        )
    except ValueError as error:  # the network has no spatial feature map
        return CaseExplanations(
            {}, {"alpha": None, "randomization": {}}, [f"This network cannot be explained: {error}."]
        )
    results: dict[str, Any] = {"alpha": None, "randomization": {name: asdict(check) for name, check in checks.items()}}
    sentences = [
        _sanity_check_sentence(METHOD_NAMES[name], check.magnitude, check.depends_on_weights, check.images, check.limit)
        for name, check in checks.items()
    ]
    sentences.append(LOCATION_CAVEAT)
    if is_cumulative:
        sentences.append(
            "For ordered grades, the maps explain the output that separates the lowest grade from the others."
        )
    maps: dict[str, FloatArray] = {}
    if len(errors):
        maps = attribution_maps(
            classifier, np.array(pixels[errors["row"].to_numpy()]), errors["class"].to_numpy(dtype=np.int64)
        )
        if "attention" in methods:
            results["alpha"] = model.attn.alpha.item()  # type: ignore[union-attr, operator]
            sentences.insert(0, _alpha_sentence(results["alpha"]))
    return CaseExplanations(maps, results, sentences)


def attribution_maps(
    classifier: Classifier, pixels: NDArray[np.uint8], classes: NDArray[np.int64]
) -> dict[str, FloatArray]:
    """Compute the maps of all available attribution methods.

    Args:
        classifier: the model.
        pixels: images, uint8, (images, side, side, channels).
        classes: class to explain for each image, (images,); with a cumulative head always the lowest grade's output.

    Returns:
        Maps by display name, each (images, side, side).

    Raises:
        ValueError: the network has no spatial feature map.
    """
    side = pixels.shape[1]
    outputs = np.zeros_like(classes) if classifier.task.num_omitted_outputs > 0 else classes
    inputs = pixels, classifier.normalization, outputs
    maps: dict[str, FloatArray] = {}
    if "attention" in available_methods(classifier.model):
        fade = fade_attribution(classifier.model, *inputs)
        maps[f"{METHOD_NAMES['attention']} (alpha {fade.alpha:.2f})"] = upsample(fade.attention, side)
        maps[METHOD_NAMES["laplacian"]] = upsample(fade.laplacian, side)
    maps[METHOD_NAMES["grad_cam"]] = upsample(grad_cam(classifier.model, *inputs), side)
    return maps


def _alpha_sentence(alpha: float) -> str:
    return (
        f"FadeAttn weights attention by alpha = {alpha:.3f} and the Laplacian by {1 - alpha:.3f}. Both maps and a bias"
        " sum to the class logit: orange is evidence for the class, purple against it. Because of the mean over the"
        " grid, the Laplacian part does not depend on neighboring patches (docs/explanation/fade_attention.md)."
    )


def _sanity_check_sentence(
    name: str, magnitude: float | None, depends_on_weights: bool, images: int, limit: float
) -> str:
    if magnitude is None:
        return f"{name}: the maps are constant, so the sanity check is not possible."
    result = "passes" if depends_on_weights else "FAILS: it depends on the image more than on the model"
    return (
        f"{name}, sanity check with shuffled weights: {result}. The mean rank correlation of the maps before and after"
        f" is {magnitude:.2f} on {images} test images (limit: {limit:g}; Adebayo et al. 2018)."
    )
