"""FadeNet, a timm ViT whose patch tokens pass through one FadeAttn layer, and every baseline by its timm name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fadeformer import backbones  # noqa: F401  makes its names known to timm
from fadeformer.attention import FadeAttn


class FadeNet(nn.Module):
    """The published model: ViT, FadeAttn on the grid of patch tokens, mean over the grid, dropout, linear classifier.

    The modules have the published names, so a published `best_model.pth` loads.

    Args:
        num_classes: classes or findings.
        dropout: before the classifier.
        fade_attn_params: arguments of FadeAttn; None for the published ones, which are its defaults.
        backbone: name of a timm VisionTransformer.
        pretrained: whether it starts from timm's published weights.
        **backbone_kwargs: passed on to timm, such as img_size, in_chans, drop_path_rate.

    Raises:
        ValueError: the backbone is not a timm VisionTransformer with learned positions, or FadeAttn does not fit it.
        TypeError: an argument that timm's VisionTransformer does not have.
    """

    def __init__(
        self,
        num_classes: int,
        dropout: float = 0.5,
        fade_attn_params: Mapping[str, Any] | None = None,
        backbone: str = "vit_base_patch16_224",
        pretrained: bool = True,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        try:
            vit = _timm_model(backbone, pretrained=pretrained, num_classes=0, **backbone_kwargs)
        except TypeError:  # an argument that this network lacks, such as img_size, or that no network has
            vit = _timm_model(backbone)
            if isinstance(vit, VisionTransformer):
                raise
        if (
            not isinstance(vit, VisionTransformer)
            or vit.cls_token is None
            or vit.pos_embed is None
            or vit.num_prefix_tokens != 1
        ):
            raise ValueError(
                f"{backbone} is not a timm VisionTransformer with a class token, which FadeNet needs (such as"
                " vit_base_patch16_224, deit_small_patch16_224 or fadevit_nano); set model.fade to null for a plain"
                f" {backbone}"
            )
        self.patch_embed = vit.patch_embed
        self.cls_token: nn.Parameter = vit.cls_token
        self.pos_embed: nn.Parameter = vit.pos_embed
        self.pos_drop = vit.pos_drop
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        self.attn = FadeAttn(vit.embed_dim, **(fade_attn_params or {}))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(vit.embed_dim, num_classes)
        self.num_classes = num_classes
        self.num_features = vit.embed_dim
        self._embeds_class = not vit.no_embed_class

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the map that FadeAttn reads, (B, width, grid height, grid width)."""
        x = self.patch_embed(x)  # B, N, width
        tokens = self.cls_token.expand(len(x), -1, -1)
        if self._embeds_class:
            x = torch.cat([tokens, x], dim=1) + self.pos_embed  # B, 1 + N, width
        else:
            x = torch.cat([tokens, x + self.pos_embed], dim=1)
        x = self.norm(self.blocks(self.norm_pre(self.pos_drop(x))))
        height, width = self.patch_embed.grid_size
        return x[:, 1:].transpose(1, 2).reshape(len(x), -1, height, width)  # B, width, H, W

    def forward_head(self, x: Tensor) -> Tensor:
        """The map of `forward_features` to logits, (B, classes)."""
        return self.classifier(self.dropout(self.attn.forward_pooled(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised, to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))


def create_model(
    *,
    backbone: str,
    num_classes: int,
    image_size: int,
    in_chans: int,
    pretrained: bool,
    dropout: float,
    drop_path: float,
    fade: Mapping[str, Any] | None,
) -> nn.Module:
    """The network that the keys of `model:` in params.yaml describe.

    Args:
        backbone: timm's name.
        num_classes: classes or findings.
        image_size: side of the images, pixels.
        in_chans: channels of the images.
        pretrained: whether it starts from timm's published weights.
        dropout: before the classifier.
        drop_path: stochastic depth.
        fade: arguments of FadeAttn; None for the plain backbone.

    Raises:
        ValueError: timm has no such model, or it cannot be what is asked for.
    """
    size, depth = {"img_size": image_size}, {"drop_path_rate": drop_path}
    if fade is not None:
        return FadeNet(num_classes, dropout, fade, backbone, pretrained, in_chans=in_chans, **size, **depth)
    options = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_chans, "drop_rate": dropout}
    # a network that takes any size has no img_size; one without stochastic depth has no drop_path_rate
    attempts: list[dict[str, Any]] = [size | depth, depth]
    if drop_path == 0:
        attempts += [size, {}]
    for extra in attempts:
        try:
            model: nn.Module = _timm_model(backbone, **options, **extra)
        except TypeError as error:
            reason = error
        else:
            return model
    hint = "; set model.drop_path to 0" if "drop_path_rate" in str(reason) else ""
    raise ValueError(f"{backbone} cannot be built as asked: {reason}{hint}") from reason


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads weights from a .pth of tensors or a .safetensors into a model.

    Raises:
        ValueError: the file is not a state dict; or names what is missing, left over or of another shape.
    """
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds no named tensors but a {type(state).__name__}")
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{path}: does not fit the model; {told}")
    model.load_state_dict(state)


def _timm_model(name: str, **options: Any) -> Any:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name}" + (f"; near it: {', '.join(near)}" if near else ""))
    return timm.create_model(name, **options)
