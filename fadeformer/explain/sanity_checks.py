"""Sanity check of attribution methods: do the maps depend on the learned weights?

This is the model parameter randomization test of Adebayo et al. 2018, "Sanity checks for saliency maps"
(arXiv:1810.03292): maps of the trained network are compared with maps of the same network with random weights. If the
maps of a method hardly change, they explain the image or the architecture, but not the trained network.

Weights are randomized by shuffling the values of each tensor. This destroys everything learned except the distribution
of values, and so keeps the scale of the activations; it works for all layer types and also for parameters without a
reset method (tokens, position embeddings, scales). A tensor with a single value, such as FadeAttn's alpha, and the
running statistics of batch normalization do not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from fadeformer.data.normalization import Normalization
from fadeformer.explain.attribution import FloatArray, fade_attribution, grad_cam, is_constant
from fadeformer.models.fadenet import FadeNet

AttributionMethod = Callable[[nn.Module, NDArray[np.uint8], Normalization, NDArray[np.int64]], FloatArray]

SIMILARITY_LIMIT = 0.5  # our choice: the paper plots the correlation and sets no threshold


@dataclass(frozen=True)
class RandomizationResult:
    """Similarity of a method's maps before and after the weights were randomized.

    Attributes:
        rho: mean over images of Spearman's rank correlation of the absolute maps (None: no valid image).
        magnitude: mean absolute rank correlation, so that inverted maps count as unchanged (None: no valid image).
        limit: the maps depend on the weights if `magnitude` is below this.
        depends_on_weights: result of the check; False without any valid image.
        images: number of valid images.
        constant: number of images left out because one of their maps is constant.
        steps: (name, magnitude) after each cumulative randomization step.
    """

    rho: float | None
    magnitude: float | None
    limit: float
    depends_on_weights: bool
    images: int
    constant: int
    steps: tuple[tuple[str, float | None], ...]


def available_methods(model: nn.Module) -> dict[str, AttributionMethod]:
    """Return the attribution methods of a model by name: Grad-CAM, and the two branches of the published FadeNet."""
    methods: dict[str, AttributionMethod] = {"grad_cam": grad_cam}
    if isinstance(model, FadeNet) and model.variant == "published":
        methods["attention"] = lambda *inputs: fade_attribution(*inputs).attention
        methods["laplacian"] = lambda *inputs: fade_attribution(*inputs).laplacian
    return methods


def model_randomization_test(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    normalization: Normalization,
    classes: NDArray[np.int64],
    *,
    methods: Mapping[str, AttributionMethod] | None = None,
    seed: int = 0,
    cascade: bool = False,
    limit: float = SIMILARITY_LIMIT,
) -> dict[str, RandomizationResult]:
    """Compare maps of a trained model with those of a copy with randomized weights.

    The model and the global random state are not modified. The same seed gives the same results, and the last step of a
    cascade is the same network as without a cascade.

    Args:
        model: trained model in evaluation mode.
        pixels: images, uint8, (images, side, side, channels).
        normalization: normalization of the images.
        classes: index of the output to explain for each image, (images,).
        methods: functions of these four arguments that return maps (images, height, width), by name; by default
            `available_methods(model)`.
        seed: random seed.
        cascade: True to randomize the modules one after the other from the classifier down, with one step per module.
            These are the model's direct children, or the members of a `Sequential` or `ModuleList`, in reverse order.
        limit: see `RandomizationResult`.

    Raises:
        ValueError: a method cannot explain the model, or images and classes do not match.
    """
    methods = available_methods(model) if methods is None else methods
    trained = {name: method(model, pixels, normalization, classes) for name, method in methods.items()}
    randomized = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    correlations: dict[str, list[tuple[str, FloatArray]]] = {name: [] for name in methods}
    groups = _parameter_groups(randomized)
    for number, (group, parameters) in enumerate(groups, start=1):
        _shuffle_values(parameters, generator)
        if cascade or number == len(groups):
            for name, method in methods.items():
                step = rank_correlations(trained[name], method(randomized, pixels, normalization, classes))
                correlations[name].append((group if cascade else "all weights", step))
    return {name: _summarize(steps, limit) for name, steps in correlations.items()}


def rank_correlations(maps: FloatArray, others: FloatArray) -> FloatArray:
    """Compute Spearman's rank correlation of the absolute maps, (images, H, W) to (images,); NaN for constant maps."""
    maps, others = np.abs(maps), np.abs(others)
    correlations = np.full(len(maps), np.nan)
    for i in np.flatnonzero(~is_constant(maps) & ~is_constant(others)):
        correlations[i] = spearmanr(maps[i].ravel(), others[i].ravel()).statistic
    return correlations


def _parameter_groups(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
    """Group the parameters by module from last to first; the model's direct parameters (tokens, ...) come last."""
    modules: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        members = child.named_children() if isinstance(child, nn.Sequential | nn.ModuleList) else ()
        modules += [(f"{name}.{member}", module) for member, module in members] or [(name, child)]
    remaining = {id(parameter): parameter for parameter in model.parameters()}
    groups: list[tuple[str, list[Tensor]]] = []
    for name, module in [*reversed(modules), ("direct parameters", model)]:
        parameters: list[Tensor] = [
            remaining.pop(id(parameter)) for parameter in module.parameters() if id(parameter) in remaining
        ]
        if parameters:
            groups.append((name, parameters))
    return groups


def _shuffle_values(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in parameters:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _summarize(steps: list[tuple[str, FloatArray]], limit: float) -> RandomizationResult:
    last = steps[-1][1]
    magnitude = _finite_mean(np.abs(last))
    return RandomizationResult(
        rho=_finite_mean(last),
        magnitude=magnitude,
        limit=limit,
        depends_on_weights=magnitude is not None and magnitude < limit,
        images=int(np.isfinite(last).sum()),
        constant=int(np.isnan(last).sum()),
        steps=tuple((name, _finite_mean(np.abs(correlations))) for name, correlations in steps),
    )


def _finite_mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
