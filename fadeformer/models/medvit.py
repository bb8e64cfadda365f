"""MedViT, a convolution-attention hybrid for medical images; importing this module registers it with timm.

Source: Manzari et al., "MedViT: A robust vision transformer for generalized medical image classification", Comput.
Biol. Med. 157 (2023) 106791, arXiv:2302.09462, and the authors' code, Omid-Nejati/MedViT; parameter names and shapes
are those of their code. With BN for batch normalization and [,] for concatenation over channels:

    ECB(x):   x <- embed(x);  x <- x + MHCA(x);  x + LFFN(BN(x))
    LTB(x):   x <- embed(x);  x <- x + ESA(BN(x));  y <- embed(x);  y <- y + MHCA(y);  z <- [x, y];  z + LFFN(BN(z))
    MHCA(x) = conv1x1(ReLU(BN(conv3x3(x)))), the 3 x 3 with one group of channels per head
    ESA(x)  = softmax(q(x) k(p(x))^T / sqrt(d)) v(p(x)), p the mean of r^2 tokens and a BN
    LFFN(x) = x + BN(conv1x1(SE(s(BN(depthwise3x3(s(BN(conv1x1(x)))))))))

s is the hard swish, SE squeeze-and-excitation, d the channels of a head and r the spatial reduction.

Where paper and code differ, this module follows the code:

- LFFN has SE and a residual connection, so a block adds BN(x) twice; the paper's figure shows neither.
- p averages r^2 consecutive tokens in row order, not r x r squares; leftover tokens at the end of the map give no key
  (there are none if both image sides are multiples of 32).
- The Patch Momentum Changer, which augments features in training, is not in the code.
- The paper has the sizes T, S and L, with 10.8, 23.6 and 45.8 M parameters and 1.3, 4.9 and 13.4 G multiply-adds; the
  code has small, base and large, with 32.2, 45.4 and 58.7 M and 5.9, 8.4 and 10.9 G. Issue 19 of its repository states
  that these are the paper's three. No choice of depths gives the published T: the smallest possible network has 15.6 M
  parameters and 2.8 G multiply-adds. So this module defines no medvit_tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fadeformer.models.fadevit import drop_timm_factory_args

BLOCKS_PER_GROUP = 5  # the third stage repeats groups of four ECB and one LTB
SPATIAL_REDUCTIONS = (8, 4, 2, 1)  # r of each stage; the first has no attention
ECB_EXPANSION = 3  # hidden channels of LFFN / channels
LTB_EXPANSION = 2
ATTENTION_RATIO = 0.75  # ESA's fraction of an LTB's channels, and of its stochastic depth


class ConvNormAct(nn.Module):
    """A 3 x 3 convolution, batch normalization and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """2 x 2 average pooling for stride 2, then a 1 x 1 convolution and batch normalization unless the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        keep_shape = stride == 1 and in_channels == out_channels
        self.conv = nn.Identity() if keep_shape else nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.Identity() if keep_shape else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        return self.norm(self.conv(self.pool(x)))  # type: ignore[no-any-return]


class MHCA(nn.Module):
    """Multi-head convolutional attention: each head is a 3 x 3 convolution of its channels; a 1 x 1 mixes the heads."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(
            channels, channels, kernel_size=3, padding=1, groups=channels // head_dim, bias=False
        )
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.projection = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, channels, H, W)."""
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale channels by gates computed from the global average of the feature map."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, bottleneck), nn.ReLU(inplace=True), nn.Linear(bottleneck, channels), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, channels, H, W)."""
        weights: Tensor = self.fc(x.mean(dim=(2, 3)))  # B, channels
        return x * weights[:, :, None, None]


class LFFN(nn.Module):
    """Locally feed-forward network: a transformer's MLP with a depthwise convolution between its linear layers."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.conv = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, bottleneck=expansion),  # hidden // channels in the authors' code
            nn.Conv2d(hidden, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, channels, H, W)."""
        return x + self.conv(x)  # type: ignore[no-any-return]


class ESA(nn.Module):
    """Efficient self-attention: keys and values are computed from means of reduction^2 tokens.

    Args:
        channels: channels of a token.
        head_dim: channels of a head.
        reduction: r; 1 for plain self-attention.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
    """

    def __init__(
        self, channels: int, head_dim: int, reduction: int, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.reduction = reduction
        self.attn_drop = attn_drop
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm = nn.BatchNorm1d(channels) if reduction > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, channels) to (B, N, channels)."""
        context = x
        if self.reduction > 1:
            window = min(self.reduction**2, x.shape[1])  # a smaller map gives one key, its mean
            context = self.norm(functional.avg_pool1d(x.transpose(1, 2), window)).transpose(1, 2)  # B, N/r^2, channels
        q, k, v = self._split_heads(self.q(x)), self._split_heads(self.k(context)), self._split_heads(self.v(context))
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]  # B, N, channels

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # B, heads, tokens, head_dim


class ECB(nn.Module):
    """Efficient convolution block: MHCA, then LFFN.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        stride: 1, or 2 to halve the resolution.
        head_dim: channels of a head.
        drop_path: stochastic depth of MHCA; LFFN has none.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, head_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, out_channels, stride)
        self.mhca = MHCA(out_channels, head_dim)
        self.drop_path = DropPath(drop_path)
        self.conv = LFFN(out_channels, ECB_EXPANSION)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.conv(self.norm(x))  # type: ignore[no-any-return]


class LTB(nn.Module):
    """Local transformer block: ESA computes 3/4 of the channels, MHCA the other 1/4 from them, then LFFN.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        stride: 1, or 2 to halve the resolution.
        head_dim: channels of a head.
        reduction: r of ESA.
        drop_path: stochastic depth; ESA gets 3/4 of the rate, MHCA 1/4.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of ESA's output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        head_dim: int,
        reduction: int,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        attended = int(ATTENTION_RATIO * out_channels)
        convolved = out_channels - attended
        self.patch_embed = PatchEmbed(in_channels, attended, stride)
        self.norm1 = nn.BatchNorm2d(attended)
        self.e_mhsa = ESA(attended, head_dim, reduction, attn_drop, proj_drop)
        self.drop_path1 = DropPath(ATTENTION_RATIO * drop_path)
        self.projection = PatchEmbed(attended, convolved)
        self.mhca = MHCA(convolved, head_dim)
        self.drop_path2 = DropPath((1 - ATTENTION_RATIO) * drop_path)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv = LFFN(out_channels, LTB_EXPANSION)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        x = self.patch_embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # B, H W, attended
        attention = self.drop_path1(self.e_mhsa(tokens))
        x = x + attention.transpose(1, 2).reshape(x.shape)  # B, attended, H, W
        local = self.projection(x)
        local = local + self.drop_path2(self.mhca(local))
        x = torch.cat([x, local], dim=1)  # B, out_channels, H, W
        return x + self.conv(self.norm2(x))  # type: ignore[no-any-return]


class MedViT(nn.Module):
    """Four-convolution stem, four stages of blocks, batch normalization, global average pooling, linear classifier.

    All blocks of the first stage are ECB; the last block of the second and of the fourth stage is an LTB, and so is
    every fifth block of the third. An LTB outputs 4/3 of the channels of its stage's ECB. Module names follow the
    authors' code, so their weights load: `model.load_state_dict(torch.load(file)["model"])`.

    Images may have any size. In training, batch normalization needs two or more images if a feature map has one pixel;
    that of the fourth stage has for images of up to 32 pixels.

    Args:
        depths: number of blocks of each stage.
        widths: channels of each stage's ECB.
        stem_widths: channels of the stem's first, second and last two convolutions.
        head_dim: channels of a head.
        num_classes: number of classes or findings; 0 for no classifier.
        in_chans: image channels.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it increases linearly from 0 at the first.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the attention output.

    Raises:
        ValueError: the depth of the third stage is not a multiple of 5, another depth is below 1, or widths cannot be
            divided into heads.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int] = (3, 4, 10, 3),
        widths: tuple[int, int, int, int] = (96, 192, 384, 768),
        stem_widths: tuple[int, int, int] = (64, 32, 64),
        head_dim: int = 32,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if min(depths) < 1 or depths[2] % BLOCKS_PER_GROUP:
            raise ValueError(
                f"depths are {depths}; each must be 1 or more, and the third a multiple of {BLOCKS_PER_GROUP}"
            )
        if widths[0] % head_dim or any(width % (3 * head_dim) for width in widths[1:]):
            raise ValueError(
                f"widths are {widths}; with head_dim {head_dim} the first must be a multiple of {head_dim} and the"
                f" others of {3 * head_dim}"
            )
        first, second, last = stem_widths
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, first, stride=2),
            ConvNormAct(first, second, stride=1),
            ConvNormAct(second, last, stride=1),
            ConvNormAct(last, last, stride=2),
        )
        blocks: list[nn.Module] = []
        in_width = last
        for stage, (depth, width, reduction) in enumerate(zip(depths, widths, SPATIAL_REDUCTIONS, strict=True)):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                drop_path = drop_path_rate * len(blocks) / (sum(depths) - 1)
                group = BLOCKS_PER_GROUP if stage == 2 else depth
                if stage > 0 and i % group == group - 1:
                    out_width = 4 * width // 3
                    blocks.append(
                        LTB(
                            in_width, out_width, stride, head_dim, reduction, drop_path,
                            attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
                        )
                    )  # fmt: skip
                else:
                    out_width = width
                    blocks.append(ECB(in_width, out_width, stride, head_dim, drop_path))
                in_width = out_width
        self.features = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(in_width)
        self.head_drop = nn.Dropout(drop_rate)
        self.depths = depths
        self.num_features = in_width
        self.grad_checkpointing = False
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the feature map (B, num_features, H / 32, W / 32), rounded up."""
        x = self.stem(x)
        for block in self.features:
            checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
            x = _checkpointed_forward(block, x) if checkpointing else block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits (B, num_classes), or with pre_logits to pooled features (B, num_features)."""
        x = self.head_drop(x.mean(dim=(2, 3)))  # B, num_features
        return x if pre_logits else self.proj_head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes); without a classifier (B, num_features)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or nn.Identity if num_classes is 0."""
        return self.proj_head[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new, untrained one; 0 classes remove it.

        Raises:
            ValueError: global_pool is not avg.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; MedViT supports avg only")
        self.num_classes = num_classes
        weight = self.norm.weight
        classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            classifier = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init_weights(classifier)
        self.proj_head = nn.Sequential(classifier)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters excluded from weight decay in addition to timm's own rule: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions for timm's layer groups: the stem, then each block, or each stage if coarse."""
        blocks: list[tuple[str, tuple[int, ...] | None]] = [(r"^features\.(\d+)", None)]
        if coarse:
            ends = [sum(self.depths[: stage + 1]) for stage in range(len(self.depths))]
            blocks = [
                (rf"^features\.(?:{'|'.join(map(str, range(end - depth, end)))})\.", (stage,))
                for stage, (depth, end) in enumerate(zip(self.depths, ends, strict=True))
            ]
        # 99999 is timm's marker for "same group as the last block"
        return {"stem": r"^stem", "blocks": [*blocks, (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing of each block."""
        self.grad_checkpointing = enable


@register_model
def medvit_small(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """The authors' MedViT_small: 32.2 M parameters and 5.9 G multiply-adds with 1000 classes at 224 pixels.

    Args:
        pretrained: must be false.
        **kwargs: passed on to MedViT; drop_path_rate defaults to 0.1 here.

    Raises:
        ValueError: pretrained is true, or MedViT rejects an argument.
    """
    return _create_medvit("medvit_small", (3, 4, 10, 3), pretrained, {"drop_path_rate": 0.1, **kwargs})


@register_model
def medvit_base(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """The authors' MedViT_base: 45.4 M parameters and 8.4 G multiply-adds with 1000 classes at 224 pixels.

    Args:
        pretrained: must be false.
        **kwargs: passed on to MedViT; drop_path_rate defaults to 0.2 here.

    Raises:
        ValueError: pretrained is true, or MedViT rejects an argument.
    """
    return _create_medvit("medvit_base", (3, 4, 20, 3), pretrained, {"drop_path_rate": 0.2, **kwargs})


@register_model
def medvit_large(pretrained: bool = False, **kwargs: Any) -> MedViT:
    """The authors' MedViT_large: 58.7 M parameters and 10.9 G multiply-adds with 1000 classes at 224 pixels.

    Args:
        pretrained: must be false.
        **kwargs: passed on to MedViT; drop_path_rate defaults to 0.2 here.

    Raises:
        ValueError: pretrained is true, or MedViT rejects an argument.
    """
    return _create_medvit("medvit_large", (3, 4, 30, 3), pretrained, {"drop_path_rate": 0.2, **kwargs})


def _create_medvit(name: str, depths: tuple[int, int, int, int], pretrained: bool, options: dict[str, Any]) -> MedViT:
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights in timm; set model.pretrained to false")
    return MedViT(depths=depths, **drop_timm_factory_args(options))


def _init_weights(module: nn.Module) -> None:
    """Initialize convolutions and linear layers as the authors do."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _checkpointed_forward(block: nn.Module, x: Tensor) -> Tensor:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_running_stats(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@contextmanager
def _frozen_running_stats(block: nn.Module) -> Iterator[None]:
    """Freeze batch-normalization statistics while a forward pass is recomputed, so that a batch counts only once."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, batches) in zip(norms, saved, strict=True):
        # momentum 0 instead of track_running_stats=False, which would change the tensors that autograd saves
        norm.momentum = 0.0
        norm.num_batches_tracked = None if batches is None else batches.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
