"""What a model looked at in its worst mistakes, and whether those maps depend on what it has learned."""

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
    "A map tells at which place the network holds what it decides by. In a ViT that need not be where it lies in the"
    " image (docs/reference/evaluation.md)."
)


@dataclass(frozen=True)
class CaseExplanations:
    """Maps of some images, and how far they can be trusted.

    Attributes:
        maps: by name in words, (images, side, side); what speaks against the class is below 0.
        numbers: `alpha` (None without a published Fade layer) and `randomization` by method, as plain values.
        sentences: the same for a reader.
    """

    maps: dict[str, FloatArray]
    results: dict[str, Any]
    sentences: list[str]


def explain_cases(
    classifier: Classifier, wrong: pd.DataFrame, pixels: NDArray[np.uint8], called: NDArray[np.int64], seed: int
) -> CaseExplanations:
    """Explains the worst mistakes, and checks the explanations on some images spread over test.

    Args:
        classifier: the model.
        wrong: of `fadeformer.evaluation.error_gallery.most_confident_errors`: rows and classes.
        pixels: of all test images, uint8, (images, side, side, channels).
        called: the class that each test image was called, (images,), or of findings the one of the highest score.
        seed: of the sanity check.
    """
    cumulative = classifier.task.num_omitted_outputs > 0
    model, normalisation = classifier.model, classifier.normalization
    methods = available_methods(model)
    sample = np.unique(np.linspace(0, len(pixels) - 1, SANITY_CHECK_IMAGES).round().astype(int))
    outputs = np.zeros_like(called) if cumulative else called
    try:
        checked = model_randomization_test(
            model, np.array(pixels[sample]), normalisation, outputs[sample], methods=methods, seed=seed
        )
    except ValueError as error:  # a network whose last map has no places
        return CaseExplanations(
            {}, {"alpha": None, "randomization": {}}, [f"This network cannot be explained: {error}."]
        )
    numbers: dict[str, Any] = {"alpha": None, "randomization": {name: asdict(one) for name, one in checked.items()}}
    sentences = [
        _sanity_check_sentence(METHOD_NAMES[name], one.magnitude, one.depends_on_weights, one.images, one.limit)
        for name, one in checked.items()
    ]
    sentences.append(LOCATION_CAVEAT)
    if cumulative:
        sentences.append(
            "Of grades in an order, the maps are of the output that tells the lowest grade from the others."
        )
    maps: dict[str, FloatArray] = {}
    if len(wrong):
        maps = attribution_maps(
            classifier, np.array(pixels[wrong["row"].to_numpy()]), wrong["class"].to_numpy(dtype=np.int64)
        )
        if "attention" in methods:
            numbers["alpha"] = model.attn.alpha.item()  # type: ignore[union-attr, operator]
            sentences.insert(0, _alpha_sentence(numbers["alpha"]))
    return CaseExplanations(maps, numbers, sentences)


def attribution_maps(
    classifier: Classifier, pixels: NDArray[np.uint8], classes: NDArray[np.int64]
) -> dict[str, FloatArray]:
    """Every map that a network has of some images.

    Args:
        classifier: the model.
        pixels: uint8, (images, side, side, channels).
        classes: that are explained, (images,); of a cumulative head the output is that of the lowest grade.

    Returns:
        By name in words, (images, side, side).

    Raises:
        ValueError: it has none, for its last map has no places.
    """
    side = pixels.shape[1]
    outputs = np.zeros_like(classes) if classifier.task.num_omitted_outputs > 0 else classes
    given = pixels, classifier.normalization, outputs
    maps: dict[str, FloatArray] = {}
    if "attention" in available_methods(classifier.model):
        fade = fade_attribution(classifier.model, *given)
        maps[f"{METHOD_NAMES['attention']} (alpha {fade.alpha:.2f})"] = upsample(fade.attention, side)
        maps[METHOD_NAMES["laplacian"]] = upsample(fade.laplacian, side)
    maps[METHOD_NAMES["grad_cam"]] = upsample(grad_cam(classifier.model, *given), side)
    return maps


def _alpha_sentence(alpha: float) -> str:
    return (
        f"FadeAttn weighs attention by alpha = {alpha:.3f} and the Laplacian by {1 - alpha:.3f}. Both maps, and a bias,"
        " sum to the logit of the class: orange speaks for it, purple against it. Under the mean over the grid the"
        " Laplacian part holds no neighbours, only what each patch says of the class (docs/explanation/fade_attention.md)."
    )


def _sanity_check_sentence(name: str, magnitude: float | None, changes: bool, images: int, limit: float) -> str:
    if magnitude is None:
        return f"{name}: its maps are flat, so that nothing can be said of them."
    verdict = "changes, as it should" if changes else "HARDLY CHANGES: it tells of the image more than of the model"
    return (
        f"{name} {verdict} when the weights are shuffled: mean rank correlation {magnitude:.2f} on {images} test images"
        f" (below {limit:g} is taken for a change; Adebayo et al. 2018)."
    )
