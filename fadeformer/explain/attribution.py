"""Maps that say where in an image a network's logit of a class comes from.

`fade_maps` takes the published FadeNet apart, exactly. With V the values, w the attention weights averaged over queries
(they sum to 1 in each head), N patches and u = W_proj^T W_classifier[class], whose part for a head meets that head's V,

    logit = sum_n alpha sum_heads w_n u . V_n  +  sum_n (-1)^K (1 - alpha) u . V_n / N  +  bias

where the second sum is that of (1 - alpha) u . (L^^K V)_n / N over the grid (docs/explanation/fade_attention.md). `grad_cam` needs no
layer of its own and works on every network (Selvaraju et al. 2017, arXiv:1610.02391; by captum). Whether a map depends
on what was learned is a question for `fadeformer.explain.sanity_checks`; whether it points at a lesion, for
`fadeformer.explain.pointing_game`.

All maps are on the grid of patches; `upsample` brings them to the image's side. A patch's token has seen the whole
image by the time that it gets here, so a map says at which place the network holds what it decides by, which need not
be where that lies in the image. Small FadeNets that had learned to see a bright square, without error, pointed at it in
62 % of the images by the attention map and in 20 % by Grad-CAM, where chance is 8 %; in single ones of ten trainings
that was anything from none to all. A small CNN did in all (ten trainings). So measure it (`fadeformer.explain.pointing_game`) before
a map is shown to anyone as the place of a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fadeformer.data.normalization import Normalization
from fadeformer.models.fade_attention import mean_attention_weights, split_heads
from fadeformer.models.fadenet import FadeNet, is_vit
from fadeformer.models.grid_laplacian import rescaled_laplacian_power

FloatArray = NDArray[np.float64]

BATCH_SIZE = 16  # images at once
FLAT_TOLERANCE = 1e-12  # differences up to this share of a map's largest value are rounding


@dataclass(frozen=True)
class FadeAttribution:
    """What each patch adds to the logit of a class, through each of FadeAttn's two branches.

    `attention.sum() + laplacian.sum() + bias` of an image is its logit, and so it is with `laplacian_outputs` for
    `laplacian`.

    Attributes:
        attention: (images, grid height, grid width), of the value of each patch through the attention.
        laplacian: the same shape, of the value of each patch through the Laplacian: what the logit would lose without
            that value. It is (-1)^K (1 - alpha) / N of what the value says of the class, and nothing else: it has no
            neighbours in it, since none reach the logit. With odd K, what speaks for the class is counted against it.
        laplacian_outputs: the same shape, of the Laplacian's output at each place, before the mean over the grid. It
            shows what the branch computes, which are differences between neighbours, but not what the network decides
            by: the differences cancel in the mean, and what they leave is the sum of `laplacian`.
        alpha: the weight of attention against the Laplacian, which both maps contain.
        bias: (images,), what the projection's and the classifier's bias add, whatever the image.
        logits: (images,), the network's own, in its own precision.
    """

    attention: FloatArray
    laplacian: FloatArray
    laplacian_outputs: FloatArray
    alpha: float
    bias: FloatArray
    logits: FloatArray


def fade_attribution(
    model: nn.Module, pixels: NDArray[np.uint8], normalisation: Normalization, classes: NDArray[np.int64]
) -> FadeAttribution:
    """Takes the logit of a published FadeNet apart by patch and branch.

    The attention weights are taken as they are: that they would change with the tokens is not in the maps. From the map
    that the ViT leaves onwards all is computed in float64, so the maps sum to the logit as exactly as the network's own
    precision allows.

    Args:
        model: a FadeNet of the variant `published`, in evaluation mode; nothing of it is changed.
        pixels: uint8, (images, side, side, channels).
        normalisation: of the images.
        classes: (images,), which output is explained for each image. It is the class or finding; of a cumulative head,
            the outputs are thresholds between grades.

    Raises:
        ValueError: the model is another network, or the variant `diffusion`, whose residual and read-out leave no two
            such maps; it has no classifier or is in training mode; or images and classes do not fit.
    """
    if not isinstance(model, FadeNet) or model.variant != "published":
        raise ValueError("only a FadeNet of the variant published has fade maps; use grad_cam for other networks")
    if not isinstance(model.classifier, nn.Linear):
        raise ValueError("the model has no classifier, so there is no logit to explain")
    parts = []
    with torch.no_grad():
        for images, wanted in _iter_batches(model, pixels, normalisation, classes):
            features = model.forward_features(images)  # B, C, H, W
            logits = _select_logits(model.forward_head(features), wanted)
            parts.append([*_branch_attributions(model, features, wanted), logits])
    joined = [torch.cat(part).double().cpu().numpy() for part in zip(*parts, strict=True)]
    names = [field.name for field in fields(FadeAttribution) if field.name != "alpha"]
    return FadeAttribution(alpha=model.attn.alpha.item(), **dict(zip(names, joined, strict=True)))


def _branch_attributions(model: Any, features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (B, C, H, W) to the attention part, the Laplacian's by patch and by output (B, H, W), and bias (B,)."""
    layer, batch, grid = model.attn, len(features), features.shape[2:]
    weight, bias, project, project_bias, classify, classify_bias = (
        parameter.double()
        for part in (layer.qkv, layer.proj, model.classifier)
        for parameter in (part.weight.flatten(1), part.bias)
    )
    tokens = features.double().permute(0, 2, 3, 1)  # B, H, W, C
    q, k, v = split_heads(tokens @ weight.T + bias, 3, layer.num_heads)  # each B, heads, N, d
    toward = (classify[wanted] @ project).reshape(batch, layer.num_heads, 1, layer.head_dim)
    said = (v * toward).sum(dim=-1)  # B, heads, N: what the value of each patch says of the class
    alpha = layer.alpha.double()
    attention = alpha * (mean_attention_weights(q, k) * said).sum(dim=1)  # B, N
    evenly = ((1 - alpha) * said.sum(dim=1) / said.shape[2]).reshape(batch, *grid)  # B, H, W
    # L^ acts on each channel alone, so on u . V as on V
    outputs = rescaled_laplacian_power(evenly.unsqueeze(-1), layer.K).squeeze(-1)  # B, H, W
    constant = classify[wanted] @ project_bias + classify_bias[wanted]
    return attention.reshape(evenly.shape), (-1) ** layer.K * evenly, outputs, constant


def grad_cam(
    model: nn.Module, pixels: NDArray[np.uint8], normalisation: Normalization, classes: NDArray[np.int64]
) -> FloatArray:
    """Grad-CAM on the last map of places from which gradients come in every network of its kind.

    Of a ViT, and so of every FadeNet, that is what goes into its last block, without tokens that are no patches: behind
    that block none reach the patches of a network that reads its class token alone. (The published FadeNet pointed no
    better from behind it, the diffusion variant worse.) Of all other networks it is the map that `forward_features`
    hands to `forward_head`: of a CNN, what its last layer leaves before the pooling.

    Each channel weighs as much as its mean gradient, and only what speaks for the class is kept.

    Args:
        model: of timm's kind, in evaluation mode; nothing of it is changed.
        pixels: uint8, (images, side, side, channels).
        normalisation: of the images.
        classes: (images,), as in `fade_maps`.

    Returns:
        (images, grid height, grid width), 0 or more. All 0 where nothing speaks for the class. A CNN that shrinks 32
        times leaves a single place of a small image, which says nothing.

    Raises:
        ValueError: the model has no such map, or is in training mode, or images and classes do not fit.
    """
    maps = []
    for images, wanted in _iter_batches(model, pixels, normalisation, classes):
        with torch.inference_mode(False), torch.enable_grad():
            tap = nn.Identity()
            cam = LayerGradCam(partial(_logits_through_tap, model, tap, wanted), tap)
            found = cam.attribute(images, wanted, relu_attributions=True)  # B, 1, H, W
        maps.append(found[:, 0].detach().double().cpu().numpy())
    return np.concatenate(maps)


def _logits_through_tap(model: Any, tap: nn.Module, wanted: Tensor, images: Tensor) -> Tensor:
    """The model's logits, their last map led through a module to which captum can listen."""
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(f"{type(model).__name__} is no network of timm's kind, with forward_features and forward_head")
    if is_vit(model):

        def lead(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _tap_features(model, tap, inputs[0], images), *inputs[1:]

        hook = model.blocks[-1].register_forward_pre_hook(lead)
        try:
            logits: Tensor = model(images)
        finally:
            hook.remove()
    else:
        with torch.no_grad():
            features = model.forward_features(images)
        logits = model.forward_head(_tap_features(model, tap, features, images))
    _select_logits(logits, wanted)
    return logits


def _tap_features(model: Any, tap: nn.Module, features: Any, images: Tensor) -> Tensor:
    """Features of the same shape, cut off from what made them, and their places led through `tap` as (B, C, H, W)."""
    features = features.detach() if isinstance(features, Tensor) else None  # some networks have several maps at once
    dimensions = 0 if features is None else features.ndim
    if dimensions == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        return tap(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
    if dimensions == 4:
        return tap(features)  # type: ignore[no-any-return]
    if dimensions == 3 and hasattr(model, "num_prefix_tokens") and is_vit(model):
        height, width = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        prefix, patches = features[:, : model.num_prefix_tokens], features[:, model.num_prefix_tokens :]
        if patches.shape[1] == height * width:
            mapped = tap(patches.transpose(1, 2).unflatten(2, (height, width)))  # B, C, H, W
            return torch.cat([prefix, mapped.flatten(2).transpose(1, 2)], dim=1)
    raise ValueError(f"the features of {type(model).__name__} are no map of places, which Grad-CAM needs")


def upsample(maps: FloatArray, side: int) -> FloatArray:
    """Maps of a grid to maps of an image, bilinear; a patch's value stands at its middle.

    Args:
        maps: (images, grid height, grid width).
        side: of the image, pixels.

    Returns:
        (images, side, side).
    """
    whole = torch.from_numpy(np.array(maps, dtype=np.float64)).unsqueeze(1)
    return functional.interpolate(whole, (side, side), mode="bilinear", align_corners=False)[:, 0].numpy()


def is_constant(maps: FloatArray) -> NDArray[np.bool_]:
    """Whether each of the maps (images, height, width) has the same value everywhere, and so points nowhere."""
    return np.asarray(np.ptp(maps, axis=(1, 2)) <= FLAT_TOLERANCE * np.abs(maps).max(axis=(1, 2)))


def _iter_batches(
    model: nn.Module, pixels: NDArray[np.uint8], normalisation: Normalization, classes: NDArray[np.int64]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as the model sees them, of its type and on its device, with their classes."""
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first")
    wanted = np.asarray(classes)
    if len(pixels) == 0 or wanted.shape != (len(pixels),) or not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(f"classes must be one integer for each of 1 or more images, not {wanted.dtype} {wanted.shape}")
    if wanted.min() < 0:
        raise ValueError(f"classes holds {wanted.min()}; they count from 0")
    parameter = next(model.parameters())
    for start in range(0, len(pixels), BATCH_SIZE):
        images = normalisation(torch.from_numpy(np.array(pixels[start : start + BATCH_SIZE])).to(parameter.device))
        yield images.to(parameter.dtype), torch.tensor(wanted[start : start + BATCH_SIZE]).long().to(parameter.device)


def _select_logits(logits: Tensor, wanted: Tensor) -> Tensor:
    """The logit of the wanted class of each image, (B, outputs) to (B,)."""
    if int(wanted.max()) >= logits.shape[1]:
        raise ValueError(f"classes holds {int(wanted.max())}, but the model has {logits.shape[1]} outputs")
    return logits.gather(1, wanted[:, None])[:, 0]
