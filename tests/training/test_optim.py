"""Learning rates of each step and each weight, against torch's schedulers and closed forms."""

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
BUILT = {"num_classes": 3, "image_size": 32, "in_chans": 3, "pretrained": False, "dropout": 0.1, "drop_path": 0.0}
FADE = {"num_heads": 4}


@given(st.integers(0, 50), st.sampled_from(SCHEDULES))
def test_warming_up_rises_evenly_to_1(warmup, schedule):
    found = [lr_multiplier(step, 100, warmup, schedule, 1.0) for step in range(warmup + 1)]
    assert found == pytest.approx([step / (warmup + 1) for step in range(1, warmup + 2)])
    assert found[-1] == 1.0


@given(st.integers(1, 60), st.integers(0, 20))
def test_the_cosine_is_torchs_of_each_step(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [lr_multiplier(step, warmup + steps, warmup, "cosine", 0.3) for step in range(warmup, warmup + steps)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0  # the last step is not for nothing


@given(st.integers(0, 100), st.floats(1e-3, 1))
def test_a_constant_stays_and_a_plateau_is_what_it_has_become(step, rate):
    assert lr_multiplier(step, 100, 0, "plateau", rate) == rate
    assert lr_multiplier(step, 100, 0, "constant", rate) == 1.0


LOSSES = [1.0, 0.9, 0.95, 0.91, 0.9, 0.89, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]


@pytest.mark.parametrize(("factor", "patience"), [(0.5, 2), (0.1, 3), (0.9, 0)])
def test_a_plateau_is_torchs_whose_state_may_be_taken_up_anywhere(factor, patience):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
    published = lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=factor, patience=patience)
    plateau, expected, found = PlateauSchedule(factor, patience), [], []
    for loss in LOSSES:
        published.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
        plateau.scheduler.step(loss)
        found.append(1e-4 * plateau.multiplier)
        state = plateau.state_dict()
        plateau = PlateauSchedule(factor, patience)
        plateau.load_state_dict(state)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[-1] < found[0]


def learning_rates(model: nn.Module, layer_decay: float, name: str = "adamw") -> dict[str, float]:
    """Of each weight, after a learning rate of 0.01 was set."""
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
def test_each_layer_learns_so_many_times_as_fast_as_the_one_after_it(backbone, fade, depth, optimizer):
    model = create_model(backbone=backbone, fade=fade, **BUILT)
    seen = set()
    for name, rate in learning_rates(model, 0.75, optimizer).items():
        if block := re.match(r"blocks\.(\d+)\.", name):
            behind = depth - int(block[1])
        else:
            behind = {"cls_token": depth + 1, "pos_embed": depth + 1, "patch_embed": depth + 1, "norm": 1}.get(
                name.split(".")[0], 0
            )
        assert rate == pytest.approx(0.01 * 0.75**behind), name
        seen.add((name.split(".")[0], behind))
    assert {behind for _, behind in seen} == set(range(depth + 2))
    assert {name for name, behind in seen if behind == 0} == ({"attn", "classifier"} if fade else {"head"})


def test_fade_layers_behind_blocks_learn_as_the_classifier_does():
    fade = {"variant": "diffusion", "after_blocks": [2, "last"], "num_heads": 4}
    rates = learning_rates(create_model(backbone="fadevit_nano", fade=fade, **BUILT), 0.5)
    new = {name: rate for name, rate in rates.items() if ".fade." in name or name.startswith(("readout", "classifier"))}
    assert len(new) > 10
    assert set(new.values()) == {0.01}
    assert rates["blocks.1.block.attn.qkv.weight"] == pytest.approx(0.01 * 0.5**3)


def test_a_network_without_attention_has_layers_too():
    rates = learning_rates(create_model(backbone="resnet18", fade=None, **BUILT), 0.5)
    assert rates["fc.weight"] == 0.01
    assert rates["conv1.weight"] < rates["layer1.0.conv1.weight"] < rates["layer4.1.conv2.weight"] < rates["fc.weight"]


def decays(model: nn.Module, name: str, layer_decay: float = 1.0) -> dict[str, float]:
    optimizer = create_optimizer(model, name, 1e-3, 0.05, layer_decay)
    found = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: found[id(weight)] for name, weight in model.named_parameters()}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_adam_decays_everything_as_published_and_others_no_bias_and_no_norm(layer_decay):
    model = create_model(backbone="fadevit_nano", fade=FADE, **BUILT)
    assert set(decays(model, "adam", layer_decay).values()) == {0.05}
    assert type(create_optimizer(model, "adam", 1e-3, 0.05, 1.0)) is torch.optim.Adam
    assert set(learning_rates(model, 1.0).values()) == {0.01}
    spared = {name for name, decay in decays(model, "adamw", layer_decay).items() if decay == 0}
    tokens = {"cls_token", "pos_embed"}
    assert spared == {name for name, weight in model.named_parameters() if weight.ndim <= 1 or name in tokens}
    assert "attn.alpha" in spared


@pytest.mark.parametrize("name", ["adamv", "", "adam w", "fusedadam"])
def test_an_optimiser_that_cannot_be_had_is_told(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"params\.yaml: train\.optimizer is '{name}'"):
        create_optimizer(nn.Linear(2, 2), name, 1e-3, 0.0, 1.0)
