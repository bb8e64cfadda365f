"""Learning rates per step and per parameter, against torch's schedulers and closed forms."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from fadeformer.errors import UserError
from fadeformer.models.factory import create_model
from fadeformer.training.optim import PlateauSchedule, create_optimizer, lr_multiplier, set_learning_rate

SCHEDULES = ["cosine", "plateau", "constant"]
MODEL_OPTIONS = {
    "num_classes": 3,
    "image_size": 32,
    "in_chans": 3,
    "pretrained": False,
    "dropout": 0.1,
    "drop_path": 0.0,
}
FADE = {"num_heads": 4}


@given(st.integers(0, 50), st.sampled_from(SCHEDULES))
def test_warmup_is_linear_to_one(warmup, schedule):
    actual = [lr_multiplier(step, 100, warmup, schedule, 1.0) for step in range(warmup + 1)]
    assert actual == pytest.approx([step / (warmup + 1) for step in range(1, warmup + 2)])
    assert actual[-1] == 1.0


@given(st.integers(1, 60), st.integers(0, 20))
def test_cosine_matches_torch_scheduler(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    actual = [lr_multiplier(step, warmup + steps, warmup, "cosine", 0.3) for step in range(warmup, warmup + steps)]
    assert actual == pytest.approx(expected, abs=1e-12)
    assert actual == sorted(actual, reverse=True)
    assert actual[-1] > 0  # the last step has an effect


@given(st.integers(0, 100), st.floats(1e-3, 1))
def test_constant_and_plateau_multipliers(step, rate):
    assert lr_multiplier(step, 100, 0, "plateau", rate) == rate
    assert lr_multiplier(step, 100, 0, "constant", rate) == 1.0


LOSSES = [1.0, 0.9, 0.95, 0.91, 0.9, 0.89, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]


@pytest.mark.parametrize(("factor", "patience"), [(0.5, 2), (0.1, 3), (0.9, 0)])
def test_plateau_matches_torch_and_resumes_from_state(factor, patience):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
    reference = lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=factor, patience=patience)
    plateau, expected, actual = PlateauSchedule(factor, patience), [], []
    for loss in LOSSES:
        reference.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
        plateau.scheduler.step(loss)
        actual.append(1e-4 * plateau.multiplier)
        state = plateau.state_dict()
        plateau = PlateauSchedule(factor, patience)
        plateau.load_state_dict(state)
    assert actual == pytest.approx(expected, rel=1e-6)
    assert actual[-1] < actual[0]


def learning_rates(model: nn.Module, layer_decay: float, name: str = "adamw") -> dict[str, float]:
    """Return the learning rate of each parameter after setting it to 0.01."""
    optimizer = create_optimizer(model, name, 1.0, 0.05, layer_decay)
    set_learning_rate(optimizer, 0.01)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    return {name: rates[id(weight)] for name, weight in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize(
    ("backbone", "fade", "depth"),
    [("fadevit_nano", FADE, 4), ("fadevit_nano", None, 4), ("deit3_small_patch16_224", None, 12)],
)
def test_layer_decay_scales_learning_rate_per_layer(backbone, fade, depth, optimizer):
    model = create_model(backbone=backbone, fade=fade, **MODEL_OPTIONS)
    distances = set()
    for name, rate in learning_rates(model, 0.75, optimizer).items():
        if block := re.match(r"blocks\.(\d+)\.", name):
            distance = depth - int(block[1])
        else:
            distance = {"cls_token": depth + 1, "pos_embed": depth + 1, "patch_embed": depth + 1, "norm": 1}.get(
                name.split(".")[0], 0
            )
        assert rate == pytest.approx(0.01 * 0.75**distance), name
        distances.add((name.split(".")[0], distance))
    assert {distance for _, distance in distances} == set(range(depth + 2))
    assert {name for name, distance in distances if distance == 0} == ({"attn", "classifier"} if fade else {"head"})


def test_fade_layers_learn_at_classifier_rate():
    fade = {"variant": "diffusion", "after_blocks": [2, "last"], "num_heads": 4}
    rates = learning_rates(create_model(backbone="fadevit_nano", fade=fade, **MODEL_OPTIONS), 0.5)
    new_rates = {
        name: rate for name, rate in rates.items() if ".fade." in name or name.startswith(("readout", "classifier"))
    }
    assert len(new_rates) > 10
    assert set(new_rates.values()) == {0.01}
    assert rates["blocks.1.block.attn.qkv.weight"] == pytest.approx(0.01 * 0.5**3)


def test_layer_decay_of_convolutional_network():
    rates = learning_rates(create_model(backbone="resnet18", fade=None, **MODEL_OPTIONS), 0.5)
    assert rates["fc.weight"] == 0.01
    assert rates["conv1.weight"] < rates["layer1.0.conv1.weight"] < rates["layer4.1.conv2.weight"] < rates["fc.weight"]


def weight_decays(model: nn.Module, name: str, layer_decay: float = 1.0) -> dict[str, float]:
    optimizer = create_optimizer(model, name, 1e-3, 0.05, layer_decay)
    actual = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: actual[id(weight)] for name, weight in model.named_parameters()}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_weight_decay_of_adam_and_adamw(layer_decay):
    model = create_model(backbone="fadevit_nano", fade=FADE, **MODEL_OPTIONS)
    assert set(weight_decays(model, "adam", layer_decay).values()) == {0.05}
    assert type(create_optimizer(model, "adam", 1e-3, 0.05, 1.0)) is torch.optim.Adam
    assert set(learning_rates(model, 1.0).values()) == {0.01}
    no_decay = {name for name, decay in weight_decays(model, "adamw", layer_decay).items() if decay == 0}
    token_parameters = {"cls_token", "pos_embed"}
    assert no_decay == {
        name for name, weight in model.named_parameters() if weight.ndim <= 1 or name in token_parameters
    }
    assert "attn.alpha" in no_decay


@pytest.mark.parametrize("name", ["adamv", "", "adam w", "fusedadam"])
def test_unknown_optimizer_raises(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"params\.yaml: train\.optimizer is '{name}'"):
        create_optimizer(nn.Linear(2, 2), name, 1e-3, 0.0, 1.0)
