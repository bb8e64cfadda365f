"""Benchmarks run on little data, and their baselines are correct."""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fadeformer.evaluation import operating_points, predictions
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.tasks import TASKS
from tests.conftest import load_benchmark
from tests.models.test_fade_attention import CASES, REFERENCE, relative_error


def test_near_duplicate_table_covers_datasets_and_alterations(real_data, capsys, monkeypatch):
    near_duplicates = load_benchmark("near_duplicates")
    monkeypatch.setattr(sys, "argv", ["near_duplicates.py", str(real_data), "--images", "20"])
    near_duplicates.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ["other images", *near_duplicates.COPIES]
    assert all(line.count("|") == 2 + len(near_duplicates.DATASETS) for line in lines)
    assert "| JPEG, quality 75 | 1.000 | 1.000 | 1.000 | 1.000 |" in lines


@pytest.fixture(scope="module")
def fadenet_benchmark() -> ModuleType:
    module = load_benchmark("fadenet")
    module.CHANNELS, module.GRIDS, module.SIDES = 32, {(3, 4): 2, (5, 5): 1}, (2, 3)
    return module


@pytest.mark.parametrize(("name", "heads", "power"), CASES)
def test_baseline_matches_published_layer(fadenet_benchmark, name, heads, power):
    numbers = np.load(REFERENCE / f"fadeattn_{name}.npz")
    layer = FadeAttn(numbers["x"].shape[1], heads, power).eval()
    layer.load_state_dict({key: torch.from_numpy(numbers[key]) for key in layer.state_dict()})
    assert relative_error(fadenet_benchmark.Published(layer)(torch.from_numpy(numbers["x"])), numbers["y"]) < 1e-5


def test_plain_attention_matches_layer_without_diffusion(fadenet_benchmark):
    layer = FadeAttn(32, 8, alpha=1.0, dropout=0.0)
    x = fadenet_benchmark.tokens((3, 4), 2)
    torch.testing.assert_close(fadenet_benchmark.PlainAttention(layer)(x), layer(x))


@pytest.mark.parametrize(("table", "rows"), [("layer", 14), ("rules", 2)])
def test_fadenet_table_has_row_per_case(fadenet_benchmark, capsys, monkeypatch, table, rows):
    monkeypatch.setattr(sys, "argv", ["fadenet.py", table, "--rounds", "1"])
    fadenet_benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r" *\d+x *\d+ +\d+ ", line)]) == rows


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_disabled_diffusion_leaves_attention_only():
    model = load_benchmark("diffusion_ablation").network("attention alone", classes=3, seed=0).eval()
    (layer,) = (module for module in model.modules() if hasattr(module, "gate_logit"))
    images = torch.randn(2, 3, 28, 28)
    before = model(images)
    with torch.no_grad():
        layer.time_logit.add_(1.0)
    assert torch.equal(model(images), before)
    assert not layer.gate_logit.requires_grad


def test_gates_stay_fixed_in_training(tmp_path, monkeypatch, single_thread):
    ablation = load_benchmark("diffusion_ablation")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 28, 28, 3), dtype=np.uint8), np.arange(12)[:, None] % 3
    monkeypatch.setattr(ablation, "EPOCHS", {"tiny": 1})
    monkeypatch.setattr(ablation, "load", lambda data, dataset: dict.fromkeys(("train", "val", "test"), images))
    models, original = [], ablation.network
    monkeypatch.setattr(ablation, "network", lambda *arm: models.append(original(*arm)) or models[0])
    ablation.train_and_test(tmp_path, tmp_path, "tiny", "attention alone", 0)
    gates = [value for name, value in models[0].named_parameters() if name.endswith("gate_logit")]
    assert gates
    assert all((gate == 10.0).all() for gate in gates)
    row = json.loads((tmp_path / "tiny.attention_alone.0.json").read_text())
    assert row["epoch"] == 1
    assert 0 <= row["test_auc"] <= 1
    assert np.load(tmp_path / "tiny.attention_alone.0.npy").shape == (12, 3)


def test_ablation_comparison_is_paired(tmp_path, capsys, monkeypatch):
    ablation = load_benchmark("diffusion_ablation")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    monkeypatch.setattr(ablation, "EPOCHS", {"retinamnist": 1})
    monkeypatch.setattr(ablation, "load", lambda data, dataset: {"test": (None, labels[:, None])})
    signals = {"plain": 0.5, "published": 0.5, "attention alone": 1.5, "diffusion": 3.0}
    for (arm, signal), seed in itertools.product(signals.items(), range(4)):
        scores = signal * np.eye(3)[labels] + random.normal(size=(90, 3))
        name = f"retinamnist.{arm.replace(' ', '_')}.{seed}"
        np.save(tmp_path / f"{name}.npy", scores)
        auc = roc_auc_score(np.eye(3)[labels], scores)
        row = {"dataset": "retinamnist", "arm": arm, "seed": seed, "val_auc": auc, "test_auc": auc}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    ablation.table(tmp_path, tmp_path)
    output = capsys.readouterr().out
    assert "| retinamnist | diffusion | 4 | 0.9" in output
    row = next(line for line in output.splitlines() if "diffusion - plain" in line).split("|")
    mean, above, p, holm, interval = (cell.strip() for cell in row[3:8])
    assert float(mean) > 0.2
    assert above == "4"
    assert float(p) < float(holm) < 0.05
    low, high = map(float, interval.split(" to "))
    assert 0 < low < float(mean) < high


SMALL_RUNS = {
    "preprocess": (["--images", "40", "--side", "64", "--to", "32", "--repeats", "1"], "resumed: identical files"),
    "data_loading": (["--images", "32", "--side", "64", "--to", "32", "--repeats", "1"], "| published | "),
    "gate": (["--rows", "3000"], "3 near-duplicates, "),
    "simulations/promotion": (["campaigns", "--sets", "1"], "| alpha / (k (k + 1)) | "),
    "simulations/calibration": (["coverage", "--sets", "2"], "95 % intervals that contain the true value"),
    "evaluation": (
        ["coverage", "--sets", "2", "--images", "100", "--resamples", "50"],
        "that contain the true value, %",
    ),
    "simulations/subgroups": (
        ["--sets", "2", "--power-sets", "2", "--old-sets", "1", "--resamples", "100", "--designs", "1"],
        "| 2 classes, 3 sites of 100 | 0.66 | ",
    ),
    "simulations/predictive_values": (["--sets", "10"], "| 400 images, 10 %, patients | 95 %, 70 % | "),
    "predict": (["--images", "10", "--side", "28", "--repeats", "1", "--many", "20"], "peak memory for     20 images"),
}


@pytest.mark.parametrize("name", SMALL_RUNS)
def test_benchmark_runs_on_little_data(name, capsys, monkeypatch, single_thread, without_data_docs):
    options, output = SMALL_RUNS[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    load_benchmark(name).main()
    assert output in capsys.readouterr().out


def test_simulated_classifier_is_calibrated_now(monkeypatch):
    simulation = load_benchmark("simulations/calibration")
    monkeypatch.setattr(simulation, "TEST_IMAGES", 10_000)
    scores, decisions = simulation.evaluate_scores(simulation.DESIGNS[0], 1000, 2)
    before, now = (float(scores[f"furthest class, {name}"].split()[0]) for name in ("before", "now"))
    assert before > 2
    assert now == pytest.approx(1, abs=0.2)
    assert decisions["accuracy, uncalibrated"] == decisions["accuracy, now"]
    assert decisions["accuracy, most probable class"] > decisions["accuracy, now"]


def test_simulated_net_benefit_is_that_of_evaluation():
    simulation = load_benchmark("simulations/calibration")
    random = np.random.default_rng(0)
    truth = random.random(500) < 0.2
    score = np.clip(0.3 * truth + random.random(500) / 2, 0, 1)
    index = pd.DataFrame({"split": "test", "id": np.arange(500).astype(str), "group": None})
    table = predictions.build_predictions(
        index, truth[:, None].astype(int), np.stack([1 - score, score], axis=1), TASKS["binary-class"], ("a", "b")
    )
    benefit = operating_points.net_benefit(table).set_index("probability")["model"]
    assert simulation._net_benefit(score, truth) == pytest.approx(benefit[0.1])


def test_drift_simulation_prints_every_table(capsys, monkeypatch, single_thread):
    simulation = load_benchmark("simulations/drift")
    monkeypatch.setattr(simulation, "DESIGNS", ((2, 20, 2, 20), (1, 20, 2, 20), (2, 20, 1, 20)))
    monkeypatch.setattr(simulation, "POOL_SLIDES", 40)
    monkeypatch.setattr(simulation, "DEMO_SLIDES", {"train": 28, "val": 4, "test": 8})
    monkeypatch.setattr(simulation, "BRIGHTNESS", (1.0, 0.85))
    monkeypatch.setattr(simulation.generate, "IMAGES_PER_SLIDE", 10)
    monkeypatch.setattr(sys, "argv", ["drift.py", "--sets", "1"])
    simulation.main()
    output = capsys.readouterr().out
    assert "| 20 x 2 | 20 x 2 | 0.0 (0.0) | " in output
    assert "| new, groups unknown |" in output
    assert "| brightness 0.5 SD |" in output
    assert "| unchanged | 0.0 (0.0) |" in output
    assert "| 15 % darker | 100.0 (0.0) |" in output


@pytest.mark.parametrize("backbone", ["fadevit_nano", "resnet18"])
def test_training_benchmark_times_all_loops(config, backbone):
    rates = load_benchmark("training").compare(backbone, 28, config, count=20, repeats=1)
    assert len(rates) == 3
    assert all(len(values) == 1 and values[0] > 0 for values in rates.values())
