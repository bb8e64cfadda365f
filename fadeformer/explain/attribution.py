"""Attribution maps: which image regions contribute to a class logit.

`fade_attribution` decomposes a logit of the published FadeNet exactly. With V the values, w the attention weights
averaged over queries (they sum to 1 in each head), N patches and u = W_proj^T W_classifier[class], split over heads
like V,

    logit = sum_n alpha sum_heads w_n u . V_n  +  sum_n (-1)^K (1 - alpha) u . V_n / N  +  bias

where the second sum equals that of (1 - alpha) u . (L^^K V)_n / N over the grid (docs/explanation/fade_attention.md).
`grad_cam` is independent of the architecture (Selvaraju et al. 2017, arXiv:1610.02391; implemented by captum). Whether
a map depends on the learned weights is tested by `fadeformer.explain.sanity_checks`; whether it points at a lesion, by
`fadeformer.explain.pointing_game`.

All maps are on the patch grid; `upsample` resizes them to the image. At this depth a patch token has attended to the
whole image, so a map shows where in the network the evidence is held, which need not be its location in the image. In
an experiment with small FadeNets that classify a bright square without error, the attention map pointed at the square
in 62 % of the images and Grad-CAM in 20 %, where chance is 8 %; single trainings out of ten ranged from none to all. A
small CNN pointed at it in all images (ten trainings). So run the pointing game before showing a map to anyone as the
location of a finding.
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

BATCH_SIZE = 16  # images
CONSTANT_TOLERANCE = 1e-12  # a map counts as constant if its range relative to its largest value is below this


@dataclass(frozen=True)
class FadeAttribution:
    """Contribution of each patch to a class logit through FadeAttn's two branches.

    For each image `attention.sum() + laplacian.sum() + bias` is the logit; the same holds with `laplacian_outputs` in
    place of `laplacian`.

    Attributes:
        attention: contribution of each patch's value through attention, (images, grid height, grid width).
        laplacian: contribution of each patch's value through the Laplacian, same shape: (-1)^K (1 - alpha) u . V_n / N.
            It does not depend on neighboring patches, because differences between neighbors cancel in the mean over the
            grid. With odd K, evidence for the class counts against it.
        laplacian_outputs: contribution of the Laplacian's output at each position before the mean over the grid, same
            shape. It shows the differences between neighbors that the branch computes, but they cancel in the logit;
            their sum is that of `laplacian`.
        alpha: weight of attention; the Laplacian has weight 1 - alpha. Both maps include their weight.
        bias: contribution of the projection and classifier biases, independent of the image, (images,).
        logits: logits computed by the network in its own precision, (images,).
    """

    attention: FloatArray
    laplacian: FloatArray
    laplacian_outputs: FloatArray
    alpha: float
    bias: FloatArray
    logits: FloatArray


def fade_attribution(
    model: nn.Module, pixels: NDArray[np.uint8], normalization: Normalization, classes: NDArray[np.int64]
) -> FadeAttribution:
    """Decompose a class logit of the published FadeNet by patch and branch.

    The attention weights are treated as constants: their dependence on the tokens is not attributed. Everything after
    the ViT features is computed in float64, so the maps sum to the logit up to the network's own precision.

    Args:
        model: a FadeNet of variant `published` in evaluation mode; it is not modified.
        pixels: images, uint8, (images, side, side, channels).
        normalization: normalization of the images.
        classes: index of the output to explain for each image, (images,): the class or finding, or with a cumulative
            head the threshold between two grades.

    Raises:
        ValueError: the model is not a FadeNet of variant `published` (the residual and readout of `diffusion` do not
            decompose this way), has no classifier or is in training mode, or images and classes do not match.
    """
    if not isinstance(model, FadeNet) or model.variant != "published":
        raise ValueError("fade_attribution needs a FadeNet of variant published; use grad_cam for other networks")
    if not isinstance(model.classifier, nn.Linear):
        raise ValueError("the model has no classifier, so there is no logit to explain")
    batches = []
    with torch.no_grad():
        for images, targets in _iter_batches(model, pixels, normalization, classes):
            features = model.forward_features(images)  # B, C, H, W
            logits = _select_logits(model.forward_head(features), targets)
            batches.append([*_branch_attributions(model, features, targets), logits])
    joined = [torch.cat(part).double().cpu().numpy() for part in zip(*batches, strict=True)]
    names = [field.name for field in fields(FadeAttribution) if field.name != "alpha"]
    return FadeAttribution(alpha=model.attn.alpha.item(), **dict(zip(names, joined, strict=True)))


def _branch_attributions(model: Any, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attribute logits to features (B, C, H, W): attention, Laplacian by patch, by output (each B, H, W), bias (B,)."""
    layer, batch, grid = model.attn, len(features), features.shape[2:]
    weight, bias, project, project_bias, classify, classify_bias = (
        parameter.double()
        for module in (layer.qkv, layer.proj, model.classifier)
        for parameter in (module.weight.flatten(1), module.bias)
    )
    tokens = features.double().permute(0, 2, 3, 1)  # B, H, W, C
    q, k, v = split_heads(tokens @ weight.T + bias, 3, layer.num_heads)  # each B, heads, N, d
    class_direction = (classify[targets] @ project).reshape(batch, layer.num_heads, 1, layer.head_dim)
    evidence = (v * class_direction).sum(dim=-1)  # B, heads, N: u . V_n
    alpha = layer.alpha.double()
    attention = alpha * (mean_attention_weights(q, k) * evidence).sum(dim=1)  # B, N
    scaled_evidence = ((1 - alpha) * evidence.sum(dim=1) / evidence.shape[2]).reshape(batch, *grid)  # B, H, W
    # L^ acts on each channel separately, so it commutes with the projection on u
    outputs = rescaled_laplacian_power(scaled_evidence.unsqueeze(-1), layer.K).squeeze(-1)  # B, H, W
    constant = classify[targets] @ project_bias + classify_bias[targets]
    return attention.reshape(scaled_evidence.shape), (-1) ** layer.K * scaled_evidence, outputs, constant


def grad_cam(
    model: nn.Module, pixels: NDArray[np.uint8], normalization: Normalization, classes: NDArray[np.int64]
) -> FloatArray:
    """Compute Grad-CAM maps on the last spatial feature map that receives gradients.

    For a ViT, and so for every FadeNet, these are the patch tokens that enter the last block: after that block no
    gradient reaches the patches if the classifier reads only the class token. (With maps from after the last block, the
    published FadeNet pointed no better and the diffusion variant worse.) For other networks it is the output of
    `forward_features`: for a CNN, the feature map before pooling.

    Channels are weighted by their mean gradient, and negative values are clipped (ReLU).

    Args:
        model: a network with timm's interface, in evaluation mode; it is not modified.
        pixels: images, uint8, (images, side, side, channels).
        normalization: normalization of the images.
        classes: as in `fade_attribution`, (images,).

    Returns:
        Maps (images, grid height, grid width), non-negative; all zero if no region supports the class. For small images
        a CNN of stride 32 has a 1 x 1 map, which has no spatial information.

    Raises:
        ValueError: the model has no spatial feature map or is in training mode, or images and classes do not match.
    """
    maps = []
    for images, targets in _iter_batches(model, pixels, normalization, classes):
        with torch.inference_mode(False), torch.enable_grad():
            tap = nn.Identity()
            cam = LayerGradCam(partial(_logits_through_tap, model, tap, targets), tap)
            cam_maps = cam.attribute(images, targets, relu_attributions=True)  # B, 1, H, W
        maps.append(cam_maps[:, 0].detach().double().cpu().numpy())
    return np.concatenate(maps)


def _logits_through_tap(model: Any, tap: nn.Module, targets: Tensor, images: Tensor) -> Tensor:
    """Compute the logits with the last spatial feature map routed through `tap`, where captum can attach its hooks."""
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise ValueError(f"{type(model).__name__} lacks timm's methods forward_features and forward_head")
    if is_vit(model):

        def route_through_tap(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _tap_features(model, tap, inputs[0], images), *inputs[1:]

        hook = model.blocks[-1].register_forward_pre_hook(route_through_tap)
        try:
            logits: Tensor = model(images)
        finally:
            hook.remove()
    else:
        with torch.no_grad():
            features = model.forward_features(images)
        logits = model.forward_head(_tap_features(model, tap, features, images))
    _select_logits(logits, targets)
    return logits


def _tap_features(model: Any, tap: nn.Module, features: Any, images: Tensor) -> Tensor:
    """Detach the features and pass their spatial positions through `tap` as (B, C, H, W); the shape is unchanged."""
    features = features.detach() if isinstance(features, Tensor) else None  # some networks return several feature maps
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
    raise ValueError(f"the features of {type(model).__name__} have no spatial positions, which Grad-CAM needs")


def upsample(maps: FloatArray, side: int) -> FloatArray:
    """Upsample maps from the patch grid to the image with bilinear interpolation between patch centers.

    Args:
        maps: maps (images, grid height, grid width).
        side: image side in pixels.

    Returns:
        Maps (images, side, side).
    """
    batched = torch.from_numpy(np.array(maps, dtype=np.float64)).unsqueeze(1)
    return functional.interpolate(batched, (side, side), mode="bilinear", align_corners=False)[:, 0].numpy()


def is_constant(maps: FloatArray) -> NDArray[np.bool_]:
    """Return True for each map (images, height, width) that has one value everywhere and so no maximum."""
    return np.asarray(np.ptp(maps, axis=(1, 2)) <= CONSTANT_TOLERANCE * np.abs(maps).max(axis=(1, 2)))


def _iter_batches(
    model: nn.Module, pixels: NDArray[np.uint8], normalization: Normalization, classes: NDArray[np.int64]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of normalized images and classes, with the model's dtype and device."""
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first")
    targets = np.asarray(classes)
    if len(pixels) == 0 or targets.shape != (len(pixels),) or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"classes must have one integer per image and at least one image, not {targets.dtype} {targets.shape}"
        )
    if targets.min() < 0:
        raise ValueError(f"classes contains {targets.min()}; class indices start at 0")
    parameter = next(model.parameters())
    for start in range(0, len(pixels), BATCH_SIZE):
        images = normalization(torch.from_numpy(np.array(pixels[start : start + BATCH_SIZE])).to(parameter.device))
        yield images.to(parameter.dtype), torch.tensor(targets[start : start + BATCH_SIZE]).long().to(parameter.device)


def _select_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Select the logit of each image's class, (B, outputs) to (B,)."""
    if int(targets.max()) >= logits.shape[1]:
        raise ValueError(f"classes contains {int(targets.max())}, but the model has {logits.shape[1]} outputs")
    return logits.gather(1, targets[:, None])[:, 0]
