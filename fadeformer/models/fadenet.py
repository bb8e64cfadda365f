"""FadeNet: any timm ViT with a Fade layer on its grid of patch tokens and a linear classifier.

Two variants. `published` is the published model: FadeAttn on the ViT's output feature map, global average pooling,
dropout, classifier; all parameters have the published names. `diffusion` adds a `DiffusionAttn` layer after any of the
ViT's blocks and pools the output tokens by attention pooling.

A FadeNet is an instance of the class of its timm backbone, with extra layers, so timm's methods for a ViT work on it
(`forward_intermediates`, `group_matcher`, `no_weight_decay`, `set_input_size`, ...). Two things differ:
`forward_features` returns a feature map instead of tokens, and `global_pool` is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from fadeformer.models import fadevit, medvit  # noqa: F401  registers their models with timm
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn

TimmViT: Any = nn.Module  # placeholder for the class of the timm backbone, which is known only at construction

# Attributes that timm's ViT, EVA, BEiT, ... have in common.
VIT_ATTRIBUTES = ("patch_embed", "blocks", "norm", "fc_norm", "num_prefix_tokens", "embed_dim")
MIXING_PARAMETERS = ("alpha", "time_logit", "exponent_logit", "gate_logit")  # mix attention and diffusion


class FadeBlock(nn.Module):
    """A ViT block followed by a Fade layer that acts on the patch tokens; prefix tokens bypass the layer.

    Args:
        block: ViT block on tokens (B, N, C).
        fade: layer on feature maps (B, H, W, C).
        num_prefix_tokens: number of leading tokens that are not patches (class, distillation, register tokens).
    """

    def __init__(self, block: nn.Module, fade: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__()
        self.block = block
        self.fade = fade
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_size = (0, 0)  # height and width in patches, set by FadeNet in each forward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (B, num_prefix_tokens + H W, C) to the same shape; further arguments go to the block."""
        x = self.block(x, *args, **kwargs)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        patches = self.fade(patches.reshape(x.shape[0], *self.grid_size, x.shape[2])).flatten(1, 2)  # B, H W, C
        return torch.cat([prefix, patches], dim=1) if self.num_prefix_tokens else patches


class FadeNet(TimmViT):  # type: ignore[misc]
    """A timm ViT with Fade layers.

    Args:
        num_classes: number of classes or findings; 0 removes the classifier, the output is then the pooled features.
        dropout: dropout probability before the classifier.
        fade_attn_params: arguments of the variant's layer, FadeAttn or DiffusionAttn; None for its defaults.
        backbone: name of a timm ViT with one width and one patch grid in all blocks.
        pretrained: load timm's pretrained weights.
        variant: published or diffusion.
        after_blocks: diffusion only: the blocks that a Fade layer follows, numbered from 1, or "last".
        **backbone_kwargs: passed on to timm, such as img_size, in_chans, drop_path_rate, dynamic_img_size.

    Raises:
        ValueError: the backbone is not a ViT, the layer does not fit it, or after_blocks lists an unknown block.
        TypeError: the timm model does not accept an argument.
    """

    def __init__(
        self,
        num_classes: int,
        dropout: float = 0.5,
        fade_attn_params: Mapping[str, Any] | None = None,
        backbone: str = "vit_base_patch16_224",
        pretrained: bool = True,
        variant: Literal["published", "diffusion"] = "published",
        after_blocks: Sequence[int | str] = ("last",),
        **backbone_kwargs: Any,
    ) -> None:
        vit = _create_vit(backbone, pretrained, backbone_kwargs)
        self.__dict__.update(vit.__dict__)  # take over the ViT's parameters, modules and settings
        self.__class__ = _fadenet_class(type(self), type(vit))  # type: ignore[arg-type]
        for unused in ("attn_pool", "head_drop", "head", "head_dist"):
            if isinstance(getattr(self, unused, None), nn.Module):
                setattr(self, unused, nn.Identity() if unused != "attn_pool" else None)
        options = dict(fade_attn_params or {})
        self.variant = variant
        self.dropout = nn.Dropout(dropout)
        self.num_classes = num_classes
        if variant == "published":
            if tuple(after_blocks) != ("last",):
                raise ValueError(
                    "the published variant has one layer, after the last block: set after_blocks to [last]"
                )
            self.attn = FadeAttn(self.embed_dim, **options)
        elif variant == "diffusion":
            for index in _block_indices(after_blocks, len(self.blocks)):
                layer = DiffusionAttn(self.embed_dim, **options)
                self.blocks[index] = FadeBlock(self.blocks[index], layer, self.num_prefix_tokens)
            self.patch_embed.register_forward_pre_hook(self._record_grid_size)  # several timm methods call patch_embed
            self.readout = AttentionPool(self.embed_dim, options.get("num_heads", 8))
        else:
            raise ValueError(f"variant is {variant!r}; it must be published or diffusion")
        self.classifier = _create_classifier(self.embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the feature map of the patch tokens, (B, width, grid height, grid width)."""
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        tokens = self.fc_norm(super().forward_features(x)[:, self.num_prefix_tokens :])  # B, N, width
        return tokens.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits (B, classes), or with pre_logits to pooled features (B, width)."""
        if self.variant == "published":
            pooled = self.attn.forward_pooled(x)
        else:
            pooled = self.readout(x.flatten(2).transpose(1, 2))
        pooled = self.dropout(pooled)
        return pooled if pre_logits else self.classifier(pooled)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def _record_grid_size(self, embed: nn.Module, images: tuple[Tensor]) -> None:
        grid = tuple(self.patch_embed.dynamic_feat_size(tuple(images[0].shape[-2:])))
        for block in self.blocks:
            if isinstance(block, FadeBlock):
                block.grid_size = grid

    def get_classifier(self) -> nn.Module:
        """Return the classification layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new, untrained one; 0 classes remove it.

        Raises:
            ValueError: global_pool is set; FadeNet's pooling is part of its variant.
        """
        if global_pool:
            raise ValueError(f"global_pool is {global_pool!r}, but FadeNet's pooling cannot be changed; leave it out")
        weight = next(self.blocks.parameters())
        self.num_classes = num_classes
        self.classifier = _create_classifier(self.embed_dim, num_classes).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups; untrained Fade layers are grouped with the classifier, not with their block."""
        groups = dict(super().group_matcher(coarse))
        patterns = [(groups["blocks"], None)] if isinstance(groups["blocks"], str) else groups["blocks"]
        return {**groups, "blocks": [(rf"(?!blocks\.\d+\.fade){pattern}", order) for pattern, order in patterns]}

    def no_weight_decay(self) -> set[str]:
        """Return the parameters excluded from weight decay: timm's, and the mixing parameters of the Fade layers."""
        mixing = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in MIXING_PARAMETERS}
        return mixing | set(super().no_weight_decay())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, type(self).__bases__, self.__getstate__()


@cache
def _fadenet_class(fadenet: Any, backbone: Any) -> Any:
    """Return the class that derives from FadeNet, or a subclass of it, and from the class of a timm backbone."""
    namespace = {"__module__": fadenet.__module__, "__doc__": fadenet.__doc__}
    return type(fadenet.__name__, (fadenet, backbone), namespace)


def _unpickle(fadenet: type, backbone: type) -> FadeNet:
    combined = _fadenet_class(fadenet, backbone)
    return combined.__new__(combined)  # type: ignore[no-any-return]


def _create_classifier(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def _create_vit(backbone: str, pretrained: bool, options: dict[str, Any]) -> Any:
    try:
        vit = create_timm_model(backbone, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # a model that is no ViT may lack an argument such as img_size: report that it is no ViT
        vit = create_timm_model(backbone)
        if is_vit(vit):
            raise
    if not is_vit(vit):
        raise ValueError(
            f"{backbone} is not a ViT, which FadeNet needs: the same width and patch grid in all blocks (such as"
            " vit_base_patch16_224, deit3_small_patch16_224, eva02_tiny_patch14_224 or fadevit_nano); set model.fade"
            f" to null for a plain {backbone}"
        )
    if not isinstance(getattr(vit, "patch_drop", None), nn.Identity | None):
        raise ValueError("patch_drop_rate removes patches from the grid that FadeNet needs; set it to 0")
    return vit


def is_vit(model: nn.Module) -> bool:
    """Return True if a model is a timm ViT: the same width and patch grid in all blocks."""
    return all(hasattr(model, name) for name in VIT_ATTRIBUTES) and hasattr(model.patch_embed, "dynamic_feat_size")


def _block_indices(after_blocks: Sequence[int | str], depth: int) -> list[int]:
    """Convert block numbers, counted from 1, and "last" to indices."""
    numbers = [depth if block == "last" else block for block in after_blocks]
    invalid = [number for number in numbers if not isinstance(number, int) or not 1 <= number <= depth]
    if invalid or not numbers or len(set(numbers)) < len(numbers):
        blocks = ", ".join(map(str, after_blocks))
        raise ValueError(f"after_blocks is [{blocks}]; list blocks by number, 1 to {depth}, or last, each once")
    return [int(number) - 1 for number in numbers]


def create_timm_model(name: str, **options: Any) -> Any:
    """Create a timm model by name.

    Raises:
        ValueError: timm has no such model; the message lists similar names.
        TypeError: the model does not accept an argument.
    """
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name}" + (f"; similar names: {', '.join(similar)}" if similar else ""))
    return timm.create_model(name, **options)
