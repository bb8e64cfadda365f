"""Drift detection: shifted images are reported, unshifted ones are not, and errors are one message."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.errors import UserError
from fadeformer.monitoring import drift, reference
from fadeformer.reporting import drift_page
from pipelines.cli import main
from tests.packages import images, write_model


def simulate(
    count: int, seed: int, *, brighter: float = 0.0, features: float = 0.0, confident: float = 0.0
) -> pd.DataFrame:
    """Simulated reference columns, optionally shifted by the given numbers of standard deviations."""
    random = np.random.default_rng(seed)
    columns = {
        "score mass": 1 / (1 + np.exp(-random.normal(size=count) - confident)),
        reference.OOD_DISTANCE: random.chisquare(8, count),
        "image brightness": 100 + 20 * (random.normal(size=count) + brighter),
        "image contrast": 30 + random.normal(size=count),
    }
    feature_values = random.normal(size=(count, 16))
    feature_values[:, :3] += features
    return pd.DataFrame({**columns, **{f"feature {n}": column for n, column in enumerate(feature_values.T)}})


def test_false_alarms_are_rare():
    alarms = [drift.detect_drift(simulate(200, seed), simulate(150, 1000 + seed)).drifted for seed in range(60)]
    assert sum(map(bool, alarms)) <= 4


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ({"brighter": 1.0}, ["image brightness"]),
        ({"confident": 1.0}, ["score mass"]),
        ({"features": 0.8}, ["features"]),
        ({"brighter": -1.0, "features": 0.8}, ["image brightness", "features"]),
    ],
)  # fmt: skip
def test_drifted_columns_are_listed(shift, expected):
    result = drift.detect_drift(simulate(400, 0), simulate(300, 1, **shift))
    assert result.drifted == expected
    assert result.images == 300
    if "features" not in expected:
        assert result.columns[0].name == expected[0]


def test_small_significant_difference_is_no_drift():
    result = drift.detect_drift(simulate(20_000, 0), simulate(20_000, 1, brighter=0.1))
    brightness = next(column for column in result.columns if column.name == "image brightness")
    assert brightness.p < 1e-6
    assert brightness.distance < drift.MIN_KS_DISTANCE
    assert result.drifted == []


def test_unreadable_images_are_dropped_too_few_rejected():
    new = simulate(40, 1)
    new.loc[:9, "image contrast"] = np.nan
    assert drift.detect_drift(simulate(40, 0), new).images == 30
    new.loc[:20, "image contrast"] = np.nan
    with pytest.raises(UserError, match="the input has 19 usable images; at least 20 are needed"):
        drift.detect_drift(simulate(40, 0), new)
    with pytest.raises(UserError, match="the reference data of the model has 10 usable images"):
        drift.detect_drift(simulate(10, 0), simulate(40, 1))


def test_image_statistics_match_pixels():
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    pixels[1] = 255
    pixels[2, :, ::2, 0] = 90
    statistics = reference.image_statistics(pixels, np.ones((3, 2), np.float32))
    assert statistics["image brightness"].tolist() == [0, 255, 15]
    assert statistics["image contrast"].tolist() == [0, 0, 15]
    assert statistics["image sharpness"].tolist() == [0, 0, 15]
    assert statistics["image black"].tolist() == [1, 0, 0.5]
    assert statistics["image red"].tolist() == [0, 0, 30]
    assert {"feature 0", "feature 1"} <= statistics.keys()
    assert "image red" not in reference.image_statistics(pixels[..., :1], np.ones((3, 2), np.float32))


def test_reference_is_limited_to_max_images():
    count = reference.MAX_IMAGES + 5
    pixels, scores = np.zeros((count, 2, 2, 1), np.uint8), np.zeros((count, 1))
    table = reference.build_reference(pixels, scores, np.arange(count), np.zeros((count, 2), np.float32), ("mass",))
    assert len(table) == reference.MAX_IMAGES
    assert table[reference.OOD_DISTANCE].is_monotonic_increasing


def test_page_reports_drift():
    data, new = simulate(100, 0), simulate(90, 1, brighter=2.0)
    text = drift_page.render_drift_page(
        drift.detect_drift(data, new), data, new, model="models", images="scans <1>", unreadable=2
    )
    assert "Drifted: image brightness." in text
    assert "Drift of scans &lt;1&gt;" in text
    assert "images could not be read" in text
    assert "<strong>drifted</strong>" in text
    unchanged = drift_page.render_drift_page(
        drift.detect_drift(data, data), data, data, model="m", images="i", unreadable=0
    )
    assert "No drift." in unchanged
    assert "could not be read" not in unchanged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Project with a model, its reference images and dark copies of them."""
    monkeypatch.chdir(write_model(tmp_path))
    (tmp_path / "same").mkdir()
    (tmp_path / "dark").mkdir()
    for number, pixels in enumerate(images(20)):
        Image.fromarray(pixels).save(tmp_path / "same" / f"{number}.png")
        Image.fromarray(pixels // 8).save(tmp_path / "dark" / f"{number}.png")
    (tmp_path / "dark" / "torn.png").write_bytes(b"no image")
    return tmp_path


def test_command_writes_page_json_and_exit_status(folder, capsys):
    main.main(["drift", "same", "--model", "models", "--out", "out"])
    assert "drift: no drift in 20 images; out/index.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main.main(["drift", "dark", "--model", "models", "--out", "out"])
    assert exit_info.value.code == 4
    assert "image brightness" in capsys.readouterr().out
    report = json.loads((folder / "out" / "drift.json").read_text())
    assert report["unreadable"] == 1
    assert report["images"] == 20
    assert "image brightness" in report["drifted"]
    assert str(folder) not in (folder / "out" / "index.html").read_text()


def test_max_images_draws_subset(folder, capsys):
    for number in range(20, 60):
        Image.fromarray(images(1)[0]).save(folder / "same" / f"{number}.png")
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models", "--max-images", "25"])
    assert "in 25 images; reports/drift/index.html" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models", "--max-images", "5"])
    assert "--max-images is 5; at least 20 images are needed" in capsys.readouterr().err


def test_missing_reference_data_is_reported(folder, capsys):
    (folder / "models" / "reference.parquet").unlink()
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models"])
    assert "drift: models: has no reference data for drift detection (reference.parquet: FileNotFoundError)" in (
        capsys.readouterr().err
    )
