"""Whether an explanation depends on what the network has learned.

The model parameter randomisation test of Adebayo et al. 2018, "Sanity checks for saliency maps" (arXiv:1810.03292):
maps of the trained network are compared with maps of the same network whose weights are random. A method whose maps
hardly change explains the image, or the architecture, but not the network.

Random is here: the values of each weight tensor are shuffled. Nothing learned outlives that but the tensor's
distribution of values, and with it the scale of what goes through the network; it needs no knowledge of how each kind
of layer is initialised, and weights that no layer can reset (tokens, positions, scales) take part. A tensor of one
value, such as FadeAttn's alpha, keeps it, and running statistics of batch normalisation are left alone.
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

SIMILARITY_LIMIT = 0.5  # our own: the paper looks at the fall of the correlation and draws no line


@dataclass(frozen=True)
class RandomizationResult:
    """How alike a method's maps are before and after the weights were randomised.

    Attributes:
        rho: mean over images of Spearman's rank correlation of the absolute maps; None if no image could be judged.
        magnitude: mean of its absolute value, likewise: maps that turned into their opposite have not changed.
        limit: below which magnitude counts as changed.
        depends_on_weights: whether it does; not so if no image could be judged.
        images: that could be judged.
        constant: images that could not, since a map of them has one value everywhere.
        steps: what was randomised, one after the other and each with all before it, and magnitude after it.
    """

    rho: float | None
    magnitude: float | None
    limit: float
    depends_on_weights: bool
    images: int
    constant: int
    steps: tuple[tuple[str, float | None], ...]


def available_methods(model: nn.Module) -> dict[str, AttributionMethod]:
    """The explanations that a model has, by name: Grad-CAM, and for the published FadeNet its two maps."""
    methods: dict[str, AttributionMethod] = {"grad_cam": grad_cam}
    if isinstance(model, FadeNet) and model.variant == "published":
        methods["attention"] = lambda *given: fade_attribution(*given).attention
        methods["laplacian"] = lambda *given: fade_attribution(*given).laplacian
    return methods


def model_randomization_test(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    normalisation: Normalization,
    classes: NDArray[np.int64],
    *,
    methods: Mapping[str, AttributionMethod] | None = None,
    seed: int = 0,
    cascade: bool = False,
    limit: float = SIMILARITY_LIMIT,
) -> dict[str, RandomizationResult]:
    """Compares maps of a trained model with those of a copy of it whose weights are random.

    The model and the global random state stay as they are. The same seed gives the same numbers, and a cascade ends in
    the same network as the test of all weights at once.

    Args:
        model: trained, in evaluation mode.
        pixels: uint8, (images, side, side, channels).
        normalisation: of the images.
        classes: (images,), which output is explained for each image, for both networks.
        methods: by name, each from these four to maps (images, height, width); `methods_of` the model by default.
        seed: of the shuffling.
        cascade: whether weights are randomised part by part from the classifier down, with a step for each. Parts are
            the model's direct modules, and the members of a sequence of them, in the reverse order of registration.
        limit: of `Randomisation`.

    Raises:
        ValueError: a method cannot explain the model, or images and classes do not fit.
    """
    methods = available_methods(model) if methods is None else methods
    trained = {name: method(model, pixels, normalisation, classes) for name, method in methods.items()}
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    alike: dict[str, list[tuple[str, FloatArray]]] = {name: [] for name in methods}
    parts = _parameter_groups(other)
    for number, (part, parameters) in enumerate(parts, start=1):
        _shuffle_values(parameters, generator)
        if cascade or number == len(parts):
            for name, method in methods.items():
                found = rank_correlations(trained[name], method(other, pixels, normalisation, classes))
                alike[name].append((part if cascade else "all weights", found))
    return {name: _summarize(steps, limit) for name, steps in alike.items()}


def rank_correlations(maps: FloatArray, others: FloatArray) -> FloatArray:
    """Spearman's rank correlation of the absolute values of each two maps, (images, H, W) to (images,); NaN if constant."""
    maps, others = np.abs(maps), np.abs(others)
    found = np.full(len(maps), np.nan)
    for i in np.flatnonzero(~is_constant(maps) & ~is_constant(others)):
        found[i] = spearmanr(maps[i].ravel(), others[i].ravel()).statistic
    return found


def _parameter_groups(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
    """Weights by part of the model, from the last to the first; the model's own (tokens, positions) come last."""
    modules: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        members = child.named_children() if isinstance(child, nn.Sequential | nn.ModuleList) else ()
        modules += [(f"{name}.{member}", module) for member, module in members] or [(name, child)]
    left = {id(parameter): parameter for parameter in model.parameters()}
    parts: list[tuple[str, list[Tensor]]] = []
    for name, module in [*reversed(modules), ("the model's own", model)]:
        own: list[Tensor] = [left.pop(id(parameter)) for parameter in module.parameters() if id(parameter) in left]
        if own:
            parts.append((name, own))
    return parts


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
        steps=tuple((name, _finite_mean(np.abs(found))) for name, found in steps),
    )


def _finite_mean(values: FloatArray) -> float | None:
    judged = values[np.isfinite(values)]
    return float(judged.mean()) if len(judged) else None
