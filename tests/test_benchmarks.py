"""The benchmarks' rivals are what they are said to be, and the tables hold a row for each."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fadeformer.attention import FadeAttn
from tests.conftest import ROOT
from tests.test_attention import CASES, REFERENCE, relative


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.real_data
def test_the_table_of_copies_has_a_column_for_each_set_and_a_row_for_each_change(real_data, capsys, monkeypatch):
    copies = load("copies")
    monkeypatch.setattr(sys, "argv", ["copies.py", str(real_data), "--images", "20"])
    copies.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["other images", *copies.COPIES]
    assert all(line.count("|") == 2 + len(copies.SETS) for line in lines)
    assert "| JPEG, quality 75 | 1.000 | 1.000 | 1.000 | 1.000 |" in lines


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
        block = getattr(model.blocks[2], "block", model.blocks[2])
        torch.testing.assert_close(tokens, models["plain"].patch_embed(images), msg=arm)
        assert torch.equal(block.mlp.fc1.weight, models["plain"].blocks[2].mlp.fc1.weight), arm
        assert torch.equal(model.pos_embed, models["plain"].pos_embed), arm


def test_the_comparison_is_paired_by_seed_and_by_image(tmp_path, capsys, monkeypatch):
    science = load("science")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    monkeypatch.setattr(science, "EPOCHS", {"retinamnist": 1})
    monkeypatch.setattr(science, "load", lambda data, dataset: {"test": (None, labels[:, None])})
    sharp = {"plain": 0.5, "published": 0.5, "attention alone": 1.5, "diffusion": 3.0}
    for (arm, signal), seed in itertools.product(sharp.items(), range(4)):
        scores = signal * np.eye(3)[labels] + random.normal(size=(90, 3))
        name = f"retinamnist.{arm.replace(' ', '_')}.{seed}"
        np.save(tmp_path / f"{name}.npy", scores)
        auc = roc_auc_score(np.eye(3)[labels], scores)
        row = {"dataset": "retinamnist", "arm": arm, "seed": seed, "val_auc": auc, "test_auc": auc}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    science.table(tmp_path, tmp_path)
    printed = capsys.readouterr().out
    assert "| retinamnist | diffusion | 4 | 0.9" in printed
    row = next(line for line in printed.splitlines() if "diffusion - plain" in line).split("|")
    mean, above, p, holm, interval = (cell.strip() for cell in row[3:8])
    assert float(mean) > 0.2
    assert above == "4"
    assert float(p) < float(holm) < 0.05
    low, high = map(float, interval.split(" to "))
    assert 0 < low < float(mean) < high


def test_resampled_aucs_are_those_of_the_images_repeated():
    science = load("science")
    random = np.random.default_rng(1)
    labels, scores = random.integers(0, 3, 60), random.normal(size=(60, 3))
    weights = random.multinomial(60, np.full(60, 1 / 60), 5)
    for found, counts in zip(science.bootstrap_aucs(labels, scores, weights), weights, strict=True):
        rows = np.repeat(np.arange(60), counts)
        assert found == pytest.approx(roc_auc_score(np.eye(3)[labels[rows]], scores[rows]))


def test_p_values_are_corrected_after_holm():
    corrected = load("science").adjusted(np.array([0.04, 0.01, 0.03, 0.9]))
    assert corrected == pytest.approx([0.09, 0.04, 0.09, 0.9])


def test_the_benchmark_of_preprocess_compares_speed_and_bytes():
    command = ["benchmarks/preprocess.py", "--images", "40", "--side", "64", "--to", "32", "--repeats", "1"]
    printed = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(r"ours \d+ images/s, Pillow in a loop \d+: \d+\.\d\d\npeak memory \d+ MiB\n", printed)
    assert "taken up: the same bytes" in printed


def test_the_benchmark_of_the_gate_finds_what_it_planted():
    command = ["benchmarks/gate.py", "--rows", "3000"]
    printed = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1].startswith("3 near duplicates, ")
    assert "peak" in printed
    assert "group_in_two_splits" in printed
