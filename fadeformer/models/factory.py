"""Create a model, FadeNet or a timm baseline, by name, and load its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.fadenet import FadeNet, create_timm_model
from fadeformer.models.heat_diffusion import AttentionPool, DiffusionAttn

__all__ = [
    "FadeNet", "create_model", "features_and_logits", "load_weights", "newly_initialized_modules", "set_probe_mode",
]  # fmt: skip

POSITION_DROPOUT = "pos_drop"  # timm's name of the dropout of the frozen position embedding
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")  # of checkpoints that nest the state dict


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
    """Create the model that section `model` of params.yaml describes.

    Args:
        backbone: name of a timm model.
        num_classes: number of classes or findings.
        image_size: side of the images, pixels.
        in_chans: image channels.
        pretrained: load timm's pretrained weights.
        dropout: dropout probability before the classifier.
        drop_path: rate of stochastic depth.
        fade: FadeNet options: `variant`, `after_blocks`, and `num_heads` and `dropout` of the Fade layers; `K` and
            `alpha` apply to the published variant only. None creates the plain backbone.

    Raises:
        ValueError: timm has no such model, or it does not accept an option.
    """
    size, depth = {"img_size": image_size}, {"drop_path_rate": drop_path}
    if fade is not None:
        layer = dict(fade)
        placement: dict[str, Any] = {name: layer.pop(name) for name in ("variant", "after_blocks") if name in layer}
        if placement.get("variant") == "diffusion":
            layer = {name: value for name, value in layer.items() if name not in ("K", "alpha")}
        options = {"in_chans": in_chans, **placement, **size, **depth}
        return FadeNet(num_classes, dropout, layer, backbone, pretrained, **options)
    common = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_chans, "drop_rate": dropout}
    # Models for any image size have no img_size; models without stochastic depth have no drop_path_rate.
    attempts: list[dict[str, Any]] = [size | depth, depth]
    if drop_path == 0:
        attempts += [size, {}]
    for extra in attempts:
        try:
            model: nn.Module = create_timm_model(backbone, **common, **extra)
        except TypeError as error:
            reason = error
        else:
            return model
    hint = "; set model.drop_path to 0" if "drop_path_rate" in str(reason) else ""
    raise ValueError(f"{backbone} cannot be created with these options: {reason}{hint}") from reason


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights from a .safetensors file or a .pth state dict (such as a published `best_model.pth`) into a model.

    A state dict nested under `model`, `state_dict` or `model_state_dict`, as in many checkpoints, is unwrapped, and the
    prefix `module.` of data-parallel training is removed.

    Raises:
        ValueError: the file cannot be read, is not a state dict, or does not match the model; the message lists the
            missing, unexpected and mismatched parameters.
        OSError: the file does not exist.
    """
    state = _read_weights(path)
    for key in STATE_DICT_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(map(_is_named_tensor, state.items())):
        raise ValueError(f"{path}: expected a state dict (tensors by name), not {type(state).__name__}")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not match the model; {' '.join(str(error).split())}") from error


def features_and_logits(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of the classification layer, (B, channels), and the logits, (B, outputs).

    Models with a distillation token have two classification layers; their features are the mean of both inputs.

    Args:
        model: FadeNet, or any timm classifier.
        images: normalized, (B, C, H, W).
    """
    feature_map = model.forward_features(images)
    features = model.forward_head(feature_map, pre_logits=True)
    # FadeNet's head contains an attention layer, so it runs only once; other heads may be more than one linear layer
    logits = model.classifier(features) if isinstance(model, FadeNet) else model.forward_head(feature_map)
    return features.flatten(1), logits


def newly_initialized_modules(model: Any) -> list[nn.Module]:
    """Return the modules that pretrained weights do not cover: the classifier, Fade layers and attention pooling."""
    fade = [module for module in model.modules() if isinstance(module, FadeAttn | DiffusionAttn | AttentionPool)]
    return [*_classifiers(model), *fade]


def set_probe_mode(model: Any) -> None:
    """Set the modes of a linear probe: dropout acts in the new modules and before the classifier, the rest is in eval.

    The dropout before the classifier is a child of a module that contains the classifier, or a function that reads the
    training mode of such a module.
    """
    model.eval()
    for module in newly_initialized_modules(model):
        module.train()
    classifiers = set(_classifiers(model))
    for module in model.modules():
        if module not in classifiers and not classifiers.isdisjoint(module.modules()):
            module.training = True  # of this module alone
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout) and name != POSITION_DROPOUT:
                    child.train()


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    classifier = model.get_classifier()  # a tuple of two in distilled models
    return classifier if isinstance(classifier, tuple) else (classifier,)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _read_weights(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: the file is damaged or contains no weights ({type(error).__name__})") from error
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: rejected, because it contains other objects than tensors and loading it could run arbitrary code;"
            " save only the state dict, preferably as .safetensors"
        ) from error
