"""Drift detection: shifted images are reported, unshifted ones are not, and errors are one message."""

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import ks_2samp

from fadeformer.errors import UserError
from fadeformer.monitoring import drift, reference
from fadeformer.reporting import drift_page
from pipelines.cli import main
from pipelines.orchestration import flows
from tests.data.dicom.test_dicom_image import make_dicom
from tests.packages import images, write_model


def simulate(
    patients: int,
    seed: int,
    *,
    images_per_patient: int = 1,
    brighter: float = 0.0,
    features: float = 0.0,
    confident: float = 0.0,
) -> pd.DataFrame:
    """Simulated reference columns, optionally shifted by standard deviations; a patient's images correlate."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), images_per_patient)

    def draw(*shape: int) -> np.ndarray:
        of_patient, of_image = random.normal(size=(patients, *shape)), random.normal(size=(len(groups), *shape))
        return np.sqrt(0.8) * of_patient[groups] + np.sqrt(0.2) * of_image

    columns = {
        "score mass": 1 / (1 + np.exp(-draw() - confident)),
        reference.OOD_DISTANCE: draw() ** 2,
        "image brightness": 100 + 20 * (draw() + brighter),
        "image contrast": 30 + draw(),
    }
    feature_values = draw(16)
    feature_values[:, :3] += features
    table = pd.DataFrame({**columns, **{f"feature {n}": column for n, column in enumerate(feature_values.T)}})
    table[reference.GROUP] = groups
    table.attrs = {reference.IMAGES_PER_GROUP: float(images_per_patient)}
    return table


def detect(data: pd.DataFrame, new: pd.DataFrame, has_groups: bool = True) -> drift.DriftResult:
    return drift.detect_drift(data, new, has_groups=has_groups)


@pytest.mark.parametrize(("images", "patients"), [(1, 60), (5, 30), (25, 20)])
def test_correlated_images_raise_no_false_alarms(images, patients):
    alarms = [
        detect(*(simulate(patients, 2 * seed + side, images_per_patient=images) for side in (0, 1))).drifted
        for seed in range(25)
    ]
    assert sum(map(bool, alarms)) <= 1


def test_unequal_numbers_of_images_raise_no_false_alarms():
    alarms = [
        detect(simulate(80, 2 * seed, images_per_patient=10), simulate(20, 2 * seed + 1)).drifted for seed in range(25)
    ]
    assert sum(map(bool, alarms)) <= 1


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
    result = detect(simulate(200, 0, images_per_patient=2), simulate(150, 1, images_per_patient=2, **shift))
    assert result.drifted == expected
    assert (result.images, result.groups) == (300, 150)
    assert result.not_assessed == []
    if "features" not in expected:
        assert result.columns[0].name == expected[0]


def test_small_significant_difference_is_no_drift():
    result = detect(simulate(5000, 0), simulate(5000, 1, brighter=0.15))
    brightness = next(column for column in result.columns if column.name == "image brightness")
    assert brightness.p < drift.ALPHA
    assert brightness.distance < drift.MIN_KS_DISTANCE
    assert result.drifted == []


def test_ks_distance_matches_scipy():
    data, new = simulate(400, 0), simulate(300, 1, brighter=0.5)
    column = detect(data, new).columns[0]
    expected = ks_2samp(data["image brightness"], new["image brightness"]).statistic
    assert column.name == "image brightness"
    assert column.distance == pytest.approx(expected, abs=0.02)  # compared at 100 quantiles


def test_few_groups_are_not_assessed():
    data, new = simulate(7, 0, images_per_patient=20), simulate(40, 1, images_per_patient=5, brighter=5.0)
    result = detect(data, new)
    assert result.drifted == result.unchanged == []
    assert {column.status for column in result.columns} == {result.features.status} == {"not assessed"}
    reason = "(too few groups: 7 in the reference, at least 8 are needed)"
    assert result.not_assessed == [f"pixel statistics {reason}", f"scores, OOD distance and features {reason}"]
    assert "6 in the new images" in detect(simulate(40, 0), simulate(6, 1, images_per_patient=5)).not_assessed[0]


def test_train_rows_add_groups_of_pixels():
    data = simulate(30, 0, images_per_patient=10)
    data.loc[data[reference.GROUP] >= 4, ["score mass", reference.OOD_DISTANCE, *data.filter(like="feature")]] = np.nan
    result = detect(data, simulate(30, 1, images_per_patient=10, brighter=3.0, confident=3.0))
    assert result.drifted == ["image brightness"]
    assert [(family.images, family.groups) for family in result.families] == [(300, 30), (40, 4)]
    assert result.not_assessed[0].startswith("scores, OOD distance and features (too few groups: 4 in the reference")


def test_unknown_groups_are_not_called_drift():
    data = simulate(40, 0, images_per_patient=25)
    results = [detect(data, simulate(16, seed, images_per_patient=25), has_groups=False) for seed in range(1, 21)]
    assert not any(result.drifted for result in results)
    unconfirmed = next(result for result in results if result.unconfirmed)
    assert "significant only if each image is of another group; give the groups" in unconfirmed.not_assessed[0]
    obvious = detect(data, simulate(60, 1, images_per_patient=25, brighter=5.0), has_groups=False)
    assert "image brightness" in obvious.drifted
    assert not obvious.has_groups


def test_unreadable_images_are_dropped_too_few_rejected():
    new = simulate(40, 1)
    new.loc[:9, "image contrast"] = np.nan
    assert detect(simulate(40, 0), new).images == 30
    new.loc[:20, "image contrast"] = np.nan
    with pytest.raises(UserError, match="the input has 19 usable images; at least 20 are needed"):
        detect(simulate(40, 0), new)
    with pytest.raises(UserError, match="the reference data of the model has 10 usable images"):
        detect(simulate(10, 0), simulate(40, 1))


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


def build(count: int, groups: tuple[list, list]) -> pd.DataFrame:
    pixels, scores = np.zeros((count, 2, 2, 1), np.uint8), np.zeros((count, 1))
    pixels[:] = (np.arange(count) % 250)[:, None, None, None]
    features = np.zeros((count, 2), np.float32)
    return reference.build_reference(
        pixels, scores, np.arange(count), features, ("mass",), pixels, tuple(map(pd.Series, groups))
    )


def test_reference_is_limited_to_max_images():
    count = reference.MAX_IMAGES + 5
    table = build(count, ([None] * count, [None] * count))
    assert len(table) == 2 * reference.MAX_IMAGES
    val = table[table[reference.OOD_DISTANCE].notna()]
    assert len(val) == reference.MAX_IMAGES
    assert val[reference.OOD_DISTANCE].is_monotonic_increasing
    assert table[reference.GROUP].is_unique


def test_reference_names_no_patient(tmp_path):
    count = 40
    groups = [f"DOE {n // 4}" for n in range(count)], [f"ROE {n // 8}" for n in range(count)]
    table = build(count, groups)
    table.to_parquet(tmp_path / "reference.parquet")
    assert b"DOE" not in (tmp_path / "reference.parquet").read_bytes()
    restored = reference.read(tmp_path / "reference.parquet", "m")
    assert restored[reference.GROUP].tolist() == [n // 4 for n in range(count)] + [10 + n // 8 for n in range(count)]
    assert restored.attrs == {reference.IMAGES_PER_GROUP: 80 / 15}
    assert restored["image brightness"].notna().all()
    assert restored["score mass"].notna().tolist() == [True] * count + [False] * count


def test_page_reports_drift():
    data, new = simulate(100, 0), simulate(90, 1, brighter=2.0)
    text = drift_page.render_drift_page(
        detect(data, new, has_groups=False), data, new, model="models", images="scans <1>", unreadable=2
    )
    assert "Drifted: image brightness." in text
    assert "Drift of scans &lt;1&gt;" in text
    assert "images could not be read" in text
    assert "<strong>drifted</strong>" in text
    assert "Unknown groups." in text
    assert "90 images of unknown groups" in text
    unchanged = drift_page.render_drift_page(detect(data, data), data, data, model="m", images="i", unreadable=0)
    assert "No drift." in unchanged
    assert "100 images of 100 groups" in unchanged
    assert "could not be read" not in unchanged
    assert "Unknown groups." not in unchanged


def test_page_reports_what_is_not_assessed():
    data, new = simulate(7, 0, images_per_patient=20), simulate(90, 1)
    text = drift_page.render_drift_page(detect(data, new), data, new, model="m", images="i", unreadable=0)
    assert '<li class="bad"><span class="mark">Not assessed.</span> pixel statistics (too few groups: 7' in text
    assert "The penultimate features were not assessed." in text
    assert "No drift" not in text


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
    assert "drift: no drift in 20 images of unknown groups, see --groups; out/index.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main.main(["drift", "dark", "--model", "models", "--out", "out"])
    assert exit_info.value.code == 4
    assert "image brightness" in capsys.readouterr().out
    report = json.loads((folder / "out" / "drift.json").read_text())
    assert report["unreadable"] == 1
    assert report["not_assessed"] == []
    assert report["images"] == 20
    assert "image brightness" in report["drifted"]
    assert str(folder) not in (folder / "out" / "index.html").read_text()


def write_groups(folder, groups, header="path,group"):
    rows = [header, *(f"{number}.png,{group}" for number, group in enumerate(groups))]
    (folder / "groups.csv").write_text("\n".join(rows))


def test_groups_are_read_from_table(folder, capsys):
    write_groups(folder, [f"patient {number // 2}" for number in range(20)], "path,Patient ID")
    main.main(["drift", "same", "--model", "models", "--groups", "groups.csv"])
    assert "drift: no drift in 20 images of 10 groups;" in capsys.readouterr().out
    write_groups(folder, ["" for _ in range(20)])  # images without a group are their own group
    main.main(["drift", "same", "--model", "models", "--groups", "groups.csv"])
    assert "in 20 images of 20 groups;" in capsys.readouterr().out
    main.main(["drift", "same", "--model", "models", "--independent"])
    assert "in 20 images of 20 groups;" in capsys.readouterr().out
    assert "patient" not in (folder / "reports" / "drift" / "drift.json").read_text()


def test_few_groups_exit_as_not_assessed(folder, capsys):
    write_groups(folder, [number // 10 for number in range(20)])
    with pytest.raises(SystemExit) as exit_info:
        main.main(["drift", "same", "--model", "models", "--groups", "groups.csv"])
    assert exit_info.value.code == 5
    message = capsys.readouterr().out
    assert (
        "drift: NOT ASSESSED: pixel statistics (too few groups: 2 in the new images, at least 8 are needed)" in message
    )
    assert "no drift" not in message


def test_flow_reports_what_is_not_assessed(folder):
    write_groups(folder, [number // 10 for number in range(20)])
    not_assessed = flows.drift.fn(["same"], "models", groups="groups.csv")
    assert not_assessed.is_completed()
    assert not_assessed.name == "Not assessed"
    assert flows.drift.fn(["same"], "models", independent=True).name == "Completed"
    assert flows.drift.fn(["dark"], "models", independent=True).is_failed()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "groups.csv: cannot be read (No such file or directory)"),
        ("path,center\n0.png,a\n", "groups.csv: has the columns path, center; it needs group"),
        ("path,group\n0.png,a\n", "groups.csv: 19 images are not in it, such as 1.png"),
    ],
)
def test_wrong_group_tables_are_reported(folder, capsys, table, message):
    if table is not None:
        (folder / "groups.csv").write_text(table)
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models", "--groups", "groups.csv"])
    assert message in capsys.readouterr().err


def test_dicom_patients_are_groups(folder, capsys):
    (folder / "dicom").mkdir()
    for number, pixels in enumerate(images(40)):
        data = encode_dicom(f"patient {number // 4}", pixels[..., 0])
        (folder / "dicom" / f"{number}.dcm").write_bytes(data)
    with contextlib.suppress(SystemExit):
        main.main(["drift", "dicom", "--model", "models"])
    assert "in 40 images of 10 groups;" in capsys.readouterr().out
    (folder / "dicom" / "torn.dcm").write_bytes(data[:200])
    with contextlib.suppress(SystemExit):
        main.main(["drift", "dicom", "--model", "models"])
    assert "in 40 images of 10 groups, 1 unreadable;" in capsys.readouterr().out
    Image.fromarray(images(1)[0]).save(folder / "dicom" / "0.png")
    with contextlib.suppress(SystemExit):
        main.main(["drift", "dicom", "--model", "models"])
    assert "in 41 images of unknown groups, see --groups, 1 unreadable" in capsys.readouterr().out


def encode_dicom(patient: str, pixels: np.ndarray) -> bytes:
    return make_dicom(np.ascontiguousarray(pixels), PatientID=patient)


def test_max_images_draws_subset(folder, capsys):
    for number in range(20, 60):
        Image.fromarray(images(1)[0]).save(folder / "same" / f"{number}.png")
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models", "--max-images", "25"])
    assert "in 25 images of unknown groups, see --groups; reports/drift/index.html" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models", "--max-images", "5"])
    assert "--max-images is 5; at least 20 images are needed" in capsys.readouterr().err


def test_reference_without_groups_is_rejected(folder, capsys):
    path = folder / "models" / "reference.parquet"
    pd.read_parquet(path).drop(columns=reference.GROUP).to_parquet(path)
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models"])
    assert "has no reference data for drift detection (reference.parquet: has no groups)" in capsys.readouterr().err


def test_missing_reference_data_is_reported(folder, capsys):
    (folder / "models" / "reference.parquet").unlink()
    with pytest.raises(SystemExit):
        main.main(["drift", "same", "--model", "models"])
    assert "drift: models: has no reference data for drift detection (reference.parquet: FileNotFoundError)" in (
        capsys.readouterr().err
    )
