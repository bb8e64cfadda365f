"""The benchmarks' rivals are what they are said to be, and the tables hold a row for each."""

import importlib.util
import re
import sys
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from fadeformer.attention import FadeAttn
from tests.conftest import ROOT
from tests.test_attention import CASES, REFERENCE, relative


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    module = load("fadenet")
    module.CHANNELS, module.GRIDS, module.SIDES = 32, {(3, 4): 2, (5, 5): 1}, (2, 3)
    return module


@pytest.mark.parametrize(("name", "heads", "power"), CASES)
def test_the_rival_is_the_published_algorithm(bench, name, heads, power):
    numbers = np.load(REFERENCE / f"fadeattn_{name}.npz")
    layer = FadeAttn(numbers["x"].shape[1], heads, power).eval()
    layer.load_state_dict({key: torch.from_numpy(numbers[key]) for key in layer.state_dict()})
    assert relative(bench.Published(layer)(torch.from_numpy(numbers["x"])), numbers["y"]) < 1e-5


def test_plain_attention_is_the_layer_without_diffusion(bench):
    layer = FadeAttn(32, 8, alpha=1.0, dropout=0.0)
    x = bench.tokens((3, 4), 2)
    torch.testing.assert_close(bench.PlainAttention(layer)(x), layer(x))


@pytest.mark.parametrize(("table", "rows"), [("layer", 14), ("rules", 2)])
def test_a_table_has_a_row_for_each_case(bench, capsys, monkeypatch, table, rows):
    monkeypatch.setattr(sys, "argv", ["fadenet.py", table, "--rounds", "1"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r" *\d+x *\d+ +\d+ ", line)]) == rows


def test_peaks_are_measured_in_a_process_of_their_own(bench):
    small, large = (bench.peak("published code", (side, side), 1) for side in (8, 40))
    assert large > small + 3 * 40**4 * 4 / bench.MIB  # three of the matrices of all patches by all patches


def test_shut_gates_leave_attention_alone():
    model = load("science").network("attention alone", classes=3, seed=0).eval()
    (layer,) = (module for module in model.modules() if hasattr(module, "gate_logit"))
    images = torch.randn(2, 3, 28, 28)
    before = model(images)
    with torch.no_grad():
        layer.time_logit.add_(1.0)
    assert torch.equal(model(images), before)
    assert not layer.gate_logit.requires_grad


def test_all_arms_begin_with_the_same_backbone():
    science = load("science")
    models = {arm: science.network(arm, classes=3, seed=1) for arm in science.ARMS}
    images = torch.randn(2, 3, 28, 28)
    for arm, model in models.items():
        model.eval()
        tokens = model.patch_embed(images)
        block = getattr(model.blocks[3], "block", model.blocks[3])
        torch.testing.assert_close(tokens, models["plain"].patch_embed(images), msg=arm)
        assert torch.equal(block.mlp.fc1.weight, models["plain"].blocks[3].mlp.fc1.weight), arm
        assert torch.equal(model.pos_embed, models["plain"].pos_embed), arm


def test_the_comparison_is_paired_by_seed(tmp_path, capsys):
    science = load("science")
    rows = [
        {"dataset": "retinamnist", "arm": arm, "seed": seed, "test_auc": 0.7 + 0.01 * seed + gain}
        for arm, gain in (("plain", 0.0), ("diffusion", 0.02)) for seed in range(3)
    ]  # fmt: skip
    rows[-1]["test_auc"] += 0.003
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv")
    science.table(tmp_path / "runs.csv")
    assert "| retinamnist | diffusion | 3 | 0.7310 +- 0.0115 | +0.0210 | 0.002 |  |  |" in capsys.readouterr().out
