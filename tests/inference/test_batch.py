"""`fadeformer predict`: every kind of input, the columns, decisions, resuming after a kill, memory, and each error."""

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from fadeformer.data.decode import image_to_array
from fadeformer.explain import overlays
from fadeformer.inference import batch, ood
from fadeformer.inference.inputs import InputImage
from pipelines.cli import main
from tests.conftest import ROOT
from tests.data.dicom.test_dicom_image import make_dicom as dicom_file
from tests.packages import load, write_model

CLASSES = ["red", "green", "blue"]
PATIENT = "Doe^Jane"


def model(folder, kind="multi-class", **options):
    """A model's folder as training leaves it, of a network that has learned nothing."""
    classes = CLASSES if kind == "multi-class" else None
    return write_model(folder, kind, **{"side": 28, "classes": classes, **options}) / "models"


@pytest.fixture
def fixed(tmp_path):
    return model(tmp_path / "model")


@pytest.fixture
def images(tmp_path):
    """Forty pictures of several shapes in a folder with folders, and a file that is none."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(1)
    for number in range(40):
        shape = [(28, 28, 3), (50, 30, 3), (20, 64)][number % 3]
        place = folder / "more" if number % 2 else folder
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(place / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(*words):
    """Runs the command in this process; gives its exit status."""
    try:
        main.main(["predict", *map(str, words)])
    except SystemExit as ended:
        return ended.code
    return 0


def refused(capsys, *words):
    assert predict(*words) == 1
    return capsys.readouterr().err.strip()


def test_table_has_model_scores_of_every_image(fixed, images, tmp_path, capsys):
    assert predict(images, "--model", fixed, "--out", tmp_path / "p.csv") == 0
    told = capsys.readouterr().out
    assert "predict: 40 images, 0 of them unreadable" in told
    assert "1 other files skipped" in told
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table) == ["name", *CLASSES, "decision", "ood_distance", "is_ood", "error"]
    assert table["name"].tolist() == sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    described = json.loads((fixed / "model.json").read_text())
    classifier = load(fixed)
    pixels = np.stack([image_to_array(Image.open(images / name), 28, 3, "pad") for name in table["name"]])
    _, expected, features = classifier.predict(pixels, 64)
    assert table[CLASSES].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert table["decision"].tolist() == [CLASSES[c] for c in expected.argmax(axis=1)]
    familiar = ood.read(fixed / "ood.safetensors", described["ood"]["threshold"])
    far = familiar.distance(features)
    assert table["ood_distance"].to_numpy() == pytest.approx(far, rel=1e-4)
    assert (table["is_ood"] == (table["ood_distance"] > familiar.threshold)).all()
    assert table["is_ood"].any()
    assert table["error"].isna().all()


def test_thread_count_and_format_change_nothing(fixed, images, tmp_path):
    for threads in (1, 3):
        predict(images, "--model", fixed, "--out", tmp_path / f"{threads}.csv", "--threads", threads)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()
    predict(images, "--model", fixed, "--out", tmp_path / "p.parquet")
    written, csv = pd.read_parquet(tmp_path / "p.parquet"), pd.read_csv(tmp_path / "1.csv")
    assert written[CLASSES].to_numpy().tolist() == csv[CLASSES].to_numpy().tolist()
    assert written["decision"].tolist() == csv["decision"].tolist()


def test_zip_file_and_pattern_inputs_agree(fixed, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("scans.zip", "w") as packed:
        for path in sorted(images.rglob("*.*")):
            packed.write(path, path.relative_to(images))
    tables = {}
    for out, paths in {
        "folder": ["images"], "zip": ["scans.zip"], "pattern": ["images/**/*.png"], "both": ["scans.zip", "images"],
        "one": ["images/00.png"], "twice": ["images/00.png", "images/0*.png"],
    }.items():  # fmt: skip
        assert predict(*paths, "--model", fixed, "--out", f"{out}.csv") == 0
        tables[out] = pd.read_csv(f"{out}.csv", index_col="name")
    pd.testing.assert_frame_equal(tables["zip"], tables["folder"])
    assert tables["pattern"].index.tolist() == [f"images/{name}" for name in tables["folder"].index]
    assert tables["pattern"]["red"].tolist() == tables["folder"]["red"].tolist()
    assert len(tables["both"]) == 80
    assert {"scans.zip/more/01.png", "images/more/01.png"} < set(tables["both"].index)
    assert tables["one"].index.tolist() == ["00.png"]
    assert tables["twice"].index.tolist() == [f"images/0{n}.png" for n in (0, 2, 4, 6, 8)]


def test_dicom_output_has_no_patient_data(fixed, images, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    known = {"PatientName": PATIENT, "PatientID": "4711-0815", "PatientBirthDate": "19500101"}
    (scans / "a.dcm").write_bytes(dicom_file(grey, **known))
    (scans / "IM0001").write_bytes(dicom_file(grey, **known))  # told by its mark alone
    (scans / "series.dcm").write_bytes(dicom_file(grey, NumberOfFrames=2, PixelData=2 * grey.tobytes(), **known))
    (scans / "DICOMDIR").write_bytes(Path(get_testdata_file("DICOMDIR")).read_bytes())
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as packed:
        for path in scans.iterdir():
            packed.write(path, path.name)
    for given in (scans, tmp_path / "scans.zip"):
        out = tmp_path / f"{given.name}.csv"
        assert predict(given, "--model", fixed, "--out", out) == 3
        assert "1 other files skipped" in capsys.readouterr().out
        table = pd.read_csv(out)
        assert table["name"].tolist() == ["IM0001", "a.dcm", "series.dcm"]
        assert table["red"][0] == table["red"][1]
        assert table["error"][2] == "has 2 frames, expected 1; export the frame to predict"
        for word in (PATIENT, "4711", "0815", "1950"):
            assert word not in out.read_text()


def test_unreadable_files_have_error_others_scores(fixed, images, tmp_path, capsys):
    whole = (images / "00.png").read_bytes()
    bad = {"cut.png": whole[:200], "empty.png": b"", "page.png": b"<html>", "text.dcm": b"hello"}
    for name, data in bad.items():
        (images / name).write_bytes(data)
    (images / "torn.png").symlink_to(images / "00.png")
    out = tmp_path / "p.csv"
    assert predict(images, "--model", fixed, "--out", out) == 3
    assert "45 images, 4 of them unreadable" in capsys.readouterr().out
    table = pd.read_csv(out, index_col="name")
    told = table["error"].dropna()
    assert set(told.index) == set(bad)
    assert told["cut.png"] == "is truncated; fetch it again"
    assert told["empty.png"].startswith("the file is empty")
    assert told["text.dcm"].startswith("is not a DICOM file")
    assert table.loc[list(bad)].drop(columns="error").isna().all(axis=None)
    good = table.drop(index=list(bad))
    assert good["decision"].notna().all()
    assert good[CLASSES].sum(axis=1).to_numpy() == pytest.approx(1)


def test_damaged_zip_member_has_error(fixed, images, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for name in ("00.png", "02.png", "04.png"):
            packed.write(images / name, name)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"02.png") + 300] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(bytes(data))
    assert predict(tmp_path / "a.zip", "--model", fixed, "--out", tmp_path / "p.csv") == 3
    table = pd.read_csv(tmp_path / "p.csv", index_col="name")
    assert "Bad CRC-32 for file '02.png'" in table["error"]["02.png"]
    assert table["error"].notna().sum() == 1


def test_operating_points_from_model_or_file_decide(images, tmp_path, capsys):
    folder = model(tmp_path / "two", "binary", classes=["a", "b"])
    out = tmp_path / "p.csv"
    predict(images, "--model", folder, "--out", out)
    assert "decision threshold 0.5: the model has no operating points" in capsys.readouterr().out
    limit = float(pd.read_csv(out)["b"].median())
    points = {"points": {"youden": {"b": {"threshold": limit}}, "specificity": {"b": {"threshold": 2.0}}}}
    (folder / "operating_points.json").write_text(json.dumps(points))
    predict(images, "--model", folder, "--out", out)
    assert "decision at operating point youden" in capsys.readouterr().out
    table = pd.read_csv(out)
    assert ((table["decision"] == "b") == (table["b"] >= limit)).all()
    assert table["decision"].nunique() == 2
    shutil.move(folder / "operating_points.json", tmp_path / "points.json")
    more = ("--operating-points", tmp_path / "points.json", "--operating-point", "specificity")
    predict(images, "--model", folder, "--out", out, *more)
    assert set(pd.read_csv(out)["decision"]) == {"a"}


SLOW = """
import time
from fadeformer.inference import batch, inputs
batch.CHUNK_SIZE, read = 2 * batch.BATCH_SIZE, inputs.InputImage.read
def slowly(self):
    time.sleep(0.01)
    return read(self)
inputs.InputImage.read = slowly
from pipelines.cli import main
main.main()
"""


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_resume_after_kill_gives_identical_file(fixed, tmp_path, ending, monkeypatch, capsys):
    monkeypatch.setattr(batch, "CHUNK_SIZE", 2 * batch.BATCH_SIZE)
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(2)
    for number in range(300):
        Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"{number:03}.bmp")
    (folder / "017.bmp").write_bytes(b"no image")
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    words = ["--model", str(fixed), "--threads", "1"]
    assert predict(folder, *words, "--out", whole) == 3
    command = [sys.executable, "-c", SLOW, "predict", str(folder), *words, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    parts = tmp_path / f".{out.name}.parts"
    while process.poll() is None and not (parts / "000001.parquet").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (parts / "000001.parquet").exists()
    assert not (parts / "000004.parquet").exists()
    assert not out.exists()
    read = []
    monkeypatch.setattr(InputImage, "read", lambda self, before=InputImage.read: read.append(self.name) or before(self))
    capsys.readouterr()
    assert predict(folder, *words, "--out", out) == 3
    assert "rows; resuming" in capsys.readouterr().out
    assert min(read) >= "128.bmp"  # what was done is not read again
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_changed_image_discards_partial_results(fixed, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "CHUNK_SIZE", batch.BATCH_SIZE)
    out, whole = tmp_path / "p.csv", tmp_path / "whole.csv"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_build_rows", _fails_at("more/01.png", batch._build_rows))
        with pytest.raises(ZeroDivisionError):
            predict(images, "--model", fixed, "--out", out, "--threads", 1)
    assert (tmp_path / ".p.csv.parts" / "000000.parquet").exists()
    Image.fromarray(np.full((28, 28, 3), 7, np.uint8)).save(images / "00.png")
    assert predict(images, "--model", fixed, "--out", out) == 0
    assert "is from other images, another model or other options; starting again" in capsys.readouterr().out
    predict(images, "--model", fixed, "--out", whole)
    assert out.read_bytes() == whole.read_bytes()


def _fails_at(name, rows):
    """Stops in the second batch."""

    def fail(some, *rest):
        return 1 / 0 if some[0].name > name else rows(some, *rest)

    return fail


def test_explain_writes_overlay_per_image(fixed, images, tmp_path):
    (images / "bad.png").write_bytes(b"")
    before = predict(images, "--model", fixed, "--out", tmp_path / "plain.csv")
    folder = tmp_path / "maps"
    assert predict(images / "more", "--model", fixed, "--out", tmp_path / "p.csv", "--explain", folder) == 0
    assert before == 3
    assert {path.name for path in folder.iterdir()} == {f"{path.name}.png" for path in (images / "more").iterdir()}
    with Image.open(folder / "01.png.png") as found:
        assert found.width > 3 * found.height  # the image and three maps side by side
    plain = model(tmp_path / "plain", fade=None)
    assert predict(images / "00.png", "--model", plain, "--out", tmp_path / "p.csv", "--explain", folder) == 0
    with Image.open(folder / "00.png.png") as found:
        assert found.width < 2.5 * found.height  # Grad-CAM alone


def test_overlay_path_stays_in_folder(tmp_path):
    assert overlays.overlay_path(tmp_path, "../a/./b.png") == tmp_path / "__" / "a" / "b.png.png"
    assert overlays.overlay_path(tmp_path, "/scans/b.png") == tmp_path / "scans" / "b.png.png"


def test_reserved_class_name_is_rejected(images, tmp_path, capsys):
    folder = model(tmp_path / "odd", classes=["name", "b", "c"])
    told = refused(capsys, images, "--model", folder, "--out", tmp_path / "p.csv")
    assert "class name 'name' is reserved for a column" in told


def test_usage_errors_are_one_message(fixed, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "none").mkdir()
    shutil.make_archive("packed", "tar", images)
    (tmp_path / "old").mkdir()
    for name in ("best_model.pth", "model.json"):
        shutil.copy(fixed / name, tmp_path / "old" / name)
    to = ("--model", fixed, "--out", "p.csv")
    for words, message in {
        ("gone.png", *to): "predict: gone.png: no such file or folder",
        ("images/*.jpg", *to): "predict: images/*.jpg: no file matches this pattern",
        ("none", *to): "predict: none: no image found (.bmp, ",
        ("packed.tar", *to): "predict: packed.tar: tar archives have no random access; unpack it",
        ("images", "--model", fixed, "--out", "p.txt"): "predict: p.txt: must end in .csv or .parquet",
        ("images", "--model", fixed, "--out", "gone/p.csv"): "predict: gone: no such folder; make it",
        ("images", "--model", "none", "--out", "p.csv"): "predict: none: no model found (model.json and weights",
        ("images", "--model", "old", "--out", "p.csv"): "predict: old: the model was written by an older version",
        ("images", *to, "--operating-points", "gone.json"): "predict: gone.json: no such file",
        ("images", *to, "--threads", "0"): "predict: --threads is 0; it must be 1 or more",
        ("images", "--model", "models:/a@champion", "--out", "p.csv"): "mlruns: there is no MLflow store",
    }.items():
        told = refused(capsys, *words)
        assert message in told
        assert len(told.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(("number", "told"), [(28, "No space left on device; free some"), (13, "Permission denied")])
def test_full_disk_keeps_partial_results(
    fixed, images, tmp_path, capsys, monkeypatch, number, told
):
    monkeypatch.setattr(batch, "CHUNK_SIZE", batch.BATCH_SIZE)
    written = []

    def full(self, path, before=pd.DataFrame.to_parquet, **options):
        if written:
            raise OSError(number, told.split(";")[0], str(path))
        written.append(path)
        before(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        assert told in refused(capsys, images, "--model", fixed, "--out", tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()
    assert predict(images, "--model", fixed, "--out", tmp_path / "p.csv") == 0
    assert "32 rows; resuming" in capsys.readouterr().out
