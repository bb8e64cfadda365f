"""Every network by name, FadeNet or baseline, and the weights it starts from."""

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

__all__ = ["FadeNet", "create_model", "features_and_logits", "load_weights", "newly_initialized_modules"]

STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict")


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
        fade: of FadeNet: `variant` and `after_blocks`, `num_heads` and `dropout` of its layers, and `K` and `alpha`,
            which only the published variant has; None for the plain backbone.

    Raises:
        ValueError: timm has no such model, or it cannot be what is asked for.
    """
    size, depth = {"img_size": image_size}, {"drop_path_rate": drop_path}
    if fade is not None:
        layer = dict(fade)
        places: dict[str, Any] = {name: layer.pop(name) for name in ("variant", "after_blocks") if name in layer}
        if places.get("variant") == "diffusion":
            layer = {name: value for name, value in layer.items() if name not in ("K", "alpha")}
        options = {"in_chans": in_chans, **places, **size, **depth}
        return FadeNet(num_classes, dropout, layer, backbone, pretrained, **options)
    plain = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_chans, "drop_rate": dropout}
    # a network that takes any size has no img_size; one without stochastic depth has no drop_path_rate
    attempts: list[dict[str, Any]] = [size | depth, depth]
    if drop_path == 0:
        attempts += [size, {}]
    for extra in attempts:
        try:
            model: nn.Module = create_timm_model(backbone, **plain, **extra)
        except TypeError as error:
            reason = error
        else:
            return model
    hint = "; set model.drop_path to 0" if "drop_path_rate" in str(reason) else ""
    raise ValueError(f"{backbone} cannot be built as asked: {reason}{hint}") from reason


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads weights from a .safetensors, or from a .pth of tensors (a published `best_model.pth` too), into a model.

    Where the names stand one level down (under `model`, `state_dict` or `model_state_dict`, as training scripts leave
    them), or behind the `module.` of data-parallel training, they are found there.

    Raises:
        ValueError: the file cannot be read, holds anything but tensors by name, or does not fit, with torch's reasons.
        OSError: there is no such file.
    """
    state = _read_weights(path)
    for key in STATE_DICT_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(map(_is_named_tensor, state.items())):
        raise ValueError(f"{path}: holds no tensors by name but a {type(state).__name__}")
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the model; {' '.join(str(error).split())}") from error


def features_and_logits(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of the network's last layer, (B, channels), and its logits, (B, outputs).

    Networks with a distillation token have two last layers, one for each token; their features are the mean of both.

    Args:
        model: FadeNet, or any classifier of timm's kind.
        images: normalized, (B, C, H, W).
    """
    places = model.forward_features(images)
    features = model.forward_head(places, pre_logits=True)
    # FadeNet's head is a layer of attention, which is not computed twice; other heads may be more than one linear layer
    logits = model.classifier(features) if isinstance(model, FadeNet) else model.forward_head(places)
    return features.flatten(1), logits


def newly_initialized_modules(model: Any) -> list[nn.Module]:
    """The modules that no pretrained backbone brings: the classifier, and Fade layers with their read-out."""
    classifier = model.get_classifier()  # a tuple of two in distilled networks
    fade = [module for module in model.modules() if isinstance(module, FadeAttn | DiffusionAttn | AttentionPool)]
    return [*(classifier if isinstance(classifier, tuple) else (classifier,)), *fade]


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _read_weights(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: is damaged, or no file of weights ({type(error).__name__})") from error
    except UnpicklingError as error:
        raise ValueError(
            f"{path}: is refused, since it holds more than tensors (or no weights at all), and reading it could run any"
            " program; save the state dict alone, best as .safetensors"
        ) from error
