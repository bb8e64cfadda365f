"""FadeNet: any ViT of timm with a Fade layer on its grid of patch tokens and a linear classifier.

Two variants. `published` is the published model: FadeAttn on the map that the ViT leaves, its mean over the grid,
dropout, classifier; all weights have the published names. `diffusion` puts a `DiffusionAttn` behind any of the ViT's
blocks, and reads the last tokens by attention pooling.

A FadeNet *is* the timm model that it is built on, of the same class, with layers of its own added: what timm offers for
a ViT works on it (`forward_intermediates`, `group_matcher`, `no_weight_decay`, `set_input_size`, ...). But its features
are a map, and its pooling is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from fadeformer.models import fadevit, medvit  # noqa: F401  make their names known to timm
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn

TimmViT: Any = nn.Module  # stands for the class of timm's that a FadeNet gets, whichever it is

VIT_ATTRIBUTES = (
    "patch_embed",
    "blocks",
    "norm",
    "fc_norm",
    "num_prefix_tokens",
    "embed_dim",
)  # of timm's ViT, EVA, BEiT, ...
MIXING_PARAMETERS = ("alpha", "time_logit", "exponent_logit", "gate_logit")  # weights that say how a Fade layer mixes


class FadeBlock(nn.Module):
    """A block of a ViT with a Fade layer behind it, on the patch tokens; prefix tokens go round it.

    Args:
        block: of tokens (B, N, C).
        fade: of maps (B, H, W, C).
        prefix: number of tokens that are no patches, which come first.
    """

    def __init__(self, block: nn.Module, fade: nn.Module, prefix: int) -> None:
        super().__init__()
        self.block = block
        self.fade = fade
        self.num_prefix_tokens = prefix
        self.grid_size = (0, 0)  # height and width in patches, set by FadeNet when it embeds an image

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps (B, prefix + H W, C) to the same shape; further arguments are the block's."""
        x = self.block(x, *args, **kwargs)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        faded = self.fade(patches.reshape(x.shape[0], *self.grid_size, x.shape[2])).flatten(1, 2)  # B, H W, C
        return torch.cat([prefix, faded], dim=1) if self.num_prefix_tokens else faded


class FadeNet(TimmViT):  # type: ignore[misc]
    """A timm ViT with Fade layers.

    Args:
        num_classes: classes or findings; 0 for none, the output is then what the classifier would see.
        dropout: before the classifier.
        fade_attn_params: arguments of the variant's layer, FadeAttn or DiffusionAttn; None for its defaults.
        backbone: name of a ViT of timm's: one width, one grid of patches, any number of prefix tokens.
        pretrained: whether it starts from timm's published weights.
        variant: published or diffusion.
        after_blocks: diffusion only: behind which blocks, counted from 1, or "last".
        **backbone_kwargs: passed on to timm, such as img_size, in_chans, drop_path_rate, dynamic_img_size.

    Raises:
        ValueError: the backbone is no ViT, the layer does not fit it, or there is no such block.
        TypeError: an argument that timm's model does not have.
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
        self.__dict__.update(vit.__dict__)  # its parameters, modules and settings are this model's from here on
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
                raise ValueError("the published layer stands behind the last block only: after_blocks must be [last]")
            self.attn = FadeAttn(self.embed_dim, **options)
        elif variant == "diffusion":
            for place in _block_indices(after_blocks, len(self.blocks)):
                layer = DiffusionAttn(self.embed_dim, **options)
                self.blocks[place] = FadeBlock(self.blocks[place], layer, self.num_prefix_tokens)
            self.patch_embed.register_forward_pre_hook(self._record_grid_size)  # whichever of timm's methods embeds
            self.readout = AttentionPool(self.embed_dim, options.get("num_heads", 8))
        else:
            raise ValueError(f"variant is {variant!r}; it is published or diffusion")
        self.classifier = _create_classifier(self.embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the map of the last tokens, (B, width, grid height, grid width)."""
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        tokens = self.fc_norm(super().forward_features(x)[:, self.num_prefix_tokens :])  # B, N, width
        return tokens.transpose(1, 2).unflatten(2, grid)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits, (B, classes), or to what the classifier sees, (B, width)."""
        if self.variant == "published":
            pooled = self.attn.forward_pooled(x)
        else:
            pooled = self.readout(x.flatten(2).transpose(1, 2))
        pooled = self.dropout(pooled)
        return pooled if pre_logits else self.classifier(pooled)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised, to logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def _record_grid_size(self, embed: nn.Module, images: tuple[Tensor]) -> None:
        grid = tuple(self.patch_embed.dynamic_feat_size(tuple(images[0].shape[-2:])))
        for block in self.blocks:
            if isinstance(block, FadeBlock):
                block.grid_size = grid

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new, untrained classifier in place; 0 classes leave none.

        Raises:
            ValueError: another pooling than FadeNet's own is asked for.
        """
        if global_pool:
            raise ValueError(f"global_pool is {global_pool!r}, but FadeNet pools in its own way")
        weight = next(self.blocks.parameters())
        self.num_classes = num_classes
        self.classifier = _create_classifier(self.embed_dim, num_classes).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Weights by layer, as timm groups them; Fade layers behind blocks go with the classifier, new as it is."""
        groups = dict(super().group_matcher(coarse))
        known = [(groups["blocks"], None)] if isinstance(groups["blocks"], str) else groups["blocks"]
        return {**groups, "blocks": [(rf"(?!blocks\.\d+\.fade){pattern}", place) for pattern, place in known]}

    def no_weight_decay(self) -> set[str]:
        """Names of the weights that must not decay: timm's, and those that say how a Fade layer mixes."""
        own = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in MIXING_PARAMETERS}
        return own | set(super().no_weight_decay())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, type(self).__bases__, self.__getstate__()


@cache
def _fadenet_class(kind: Any, base: Any) -> Any:
    """The class of a FadeNet, or of a subclass of it, on a backbone of a class of timm's."""
    return type(kind.__name__, (kind, base), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _unpickle(kind: type, base: type) -> FadeNet:
    joined = _fadenet_class(kind, base)
    return joined.__new__(joined)  # type: ignore[no-any-return]


def _create_classifier(width: int, num_classes: int) -> nn.Module:
    return nn.Linear(width, num_classes) if num_classes else nn.Identity()


def _create_vit(backbone: str, pretrained: bool, options: dict[str, Any]) -> Any:
    try:
        vit = create_timm_model(backbone, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # an argument that this network lacks, such as img_size, or that no network has
        vit = create_timm_model(backbone)
        if is_vit(vit):
            raise
    if not is_vit(vit):
        raise ValueError(
            f"{backbone} is not a ViT, which FadeNet needs: one width and one grid of patches through all blocks (such"
            " as vit_base_patch16_224, deit3_small_patch16_224, eva02_tiny_patch14_224 or fadevit_nano); set model.fade"
            f" to null for a plain {backbone}"
        )
    if not isinstance(getattr(vit, "patch_drop", None), nn.Identity | None):
        raise ValueError("patch_drop_rate leaves no grid of patches, which FadeNet needs; leave it at 0")
    return vit


def is_vit(model: nn.Module) -> bool:
    """Whether a network is a ViT of timm's: one width and one grid of patches through all blocks."""
    return all(hasattr(model, name) for name in VIT_ATTRIBUTES) and hasattr(model.patch_embed, "dynamic_feat_size")


def _block_indices(after_blocks: Sequence[int | str], depth: int) -> list[int]:
    """Indices of blocks, from their numbers, which count from 1, and "last"."""
    numbers = [depth if place == "last" else place for place in after_blocks]
    wrong = [number for number in numbers if not isinstance(number, int) or not 1 <= number <= depth]
    if wrong or not numbers or len(set(numbers)) < len(numbers):
        told = ", ".join(str(place) for place in after_blocks)
        raise ValueError(f"after_blocks is [{told}]; it lists blocks by number, 1 to {depth}, or last, each once")
    return [int(number) - 1 for number in numbers]


def create_timm_model(name: str, **options: Any) -> Any:
    """A model of timm's by name.

    Raises:
        ValueError: timm has none of that name; tells names near it.
        TypeError: an argument that it does not have.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm has no model {name}" + (f"; near it: {', '.join(near)}" if near else ""))
    return timm.create_model(name, **options)
