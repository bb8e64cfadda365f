"""`fadeformer predict`: inputs, columns, decisions, resume after a kill, and errors."""

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
    """Create a model folder as written by training, with random weights."""
    classes = CLASSES if kind == "multi-class" else None
    return write_model(folder, kind, **{"side": 28, "classes": classes, **options}) / "models"


@pytest.fixture
def trained(tmp_path):
    return model(tmp_path / "model")


@pytest.fixture
def images(tmp_path):
    """Folder with 40 images of several shapes, a subfolder and a text file."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(1)
    for number in range(40):
        shape = [(28, 28, 3), (50, 30, 3), (20, 64)][number % 3]
        target = folder / "more" if number % 2 else folder
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(target / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(*words):
    """Run the command in this process and return its exit status."""
    try:
        main.main(["predict", *map(str, words)])
    except SystemExit as exit_info:
        return exit_info.code
    return 0


def error_of(capsys, *arguments):
    assert predict(*arguments) == 1
    return capsys.readouterr().err.strip()


def test_table_has_model_scores_of_every_image(trained, images, tmp_path, capsys):
    assert predict(images, "--model", trained, "--out", tmp_path / "p.csv") == 0
    output = capsys.readouterr().out
    assert "predict: 40 images, 0 of them unreadable" in output
    assert "1 other files skipped" in output
    table = pd.read_csv(tmp_path / "p.csv")
    assert list(table) == ["name", *CLASSES, "decision", "ood_distance", "is_ood", "error"]
    assert table["name"].tolist() == sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    metadata = json.loads((trained / "model.json").read_text())
    classifier = load(trained)
    pixels = np.stack([image_to_array(Image.open(images / name), 28, 3, "pad") for name in table["name"]])
    _, expected, features = classifier.predict(pixels, 64)
    assert table[CLASSES].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert table["decision"].tolist() == [CLASSES[c] for c in expected.argmax(axis=1)]
    detector = ood.read(trained / "ood.safetensors", metadata["ood"]["threshold"])
    distances = detector.distance(features)
    assert table["ood_distance"].to_numpy() == pytest.approx(distances, rel=1e-4)
    assert (table["is_ood"] == (table["ood_distance"] > detector.threshold)).all()
    assert table["is_ood"].any()
    assert table["error"].isna().all()


def test_model_without_ood_threshold_flags_no_image(trained, images, tmp_path, capsys):
    metadata = json.loads((trained / "model.json").read_text())
    metadata["ood"]["threshold"] = None  # val had fewer than 19 images
    (trained / "model.json").write_text(json.dumps(metadata))
    assert predict(images, "--model", trained, "--out", tmp_path / "p.csv") == 0
    assert "out-of-distribution not assessed (the model's val has fewer than 19 images)" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.csv")
    assert table["is_ood"].isna().all()
    assert table["ood_distance"].notna().all()


def test_thread_count_and_format_change_nothing(trained, images, tmp_path):
    for threads in (1, 3):
        predict(images, "--model", trained, "--out", tmp_path / f"{threads}.csv", "--threads", threads)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()
    predict(images, "--model", trained, "--out", tmp_path / "p.parquet")
    written, csv = pd.read_parquet(tmp_path / "p.parquet"), pd.read_csv(tmp_path / "1.csv")
    assert written[CLASSES].to_numpy().tolist() == csv[CLASSES].to_numpy().tolist()
    assert written["decision"].tolist() == csv["decision"].tolist()


def test_zip_file_and_pattern_inputs_agree(trained, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("scans.zip", "w") as packed:
        for path in sorted(images.rglob("*.*")):
            packed.write(path, path.relative_to(images))
    tables = {}
    for out, paths in {
        "folder": ["images"], "zip": ["scans.zip"], "pattern": ["images/**/*.png"], "both": ["scans.zip", "images"],
        "one": ["images/00.png"], "twice": ["images/00.png", "images/0*.png"],
    }.items():  # fmt: skip
        assert predict(*paths, "--model", trained, "--out", f"{out}.csv") == 0
        tables[out] = pd.read_csv(f"{out}.csv", index_col="name")
    pd.testing.assert_frame_equal(tables["zip"], tables["folder"])
    assert tables["pattern"].index.tolist() == [f"images/{name}" for name in tables["folder"].index]
    assert tables["pattern"]["red"].tolist() == tables["folder"]["red"].tolist()
    assert len(tables["both"]) == 80
    assert {"scans.zip/more/01.png", "images/more/01.png"} < set(tables["both"].index)
    assert tables["one"].index.tolist() == ["00.png"]
    assert tables["twice"].index.tolist() == [f"images/0{n}.png" for n in (0, 2, 4, 6, 8)]


def test_dicom_output_has_no_patient_data(trained, images, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    gray = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    patient = {"PatientName": PATIENT, "PatientID": "4711-0815", "PatientBirthDate": "19500101"}
    (scans / "a.dcm").write_bytes(dicom_file(gray, **patient))
    (scans / "IM0001").write_bytes(dicom_file(gray, **patient))  # recognized by its preamble
    (scans / "series.dcm").write_bytes(dicom_file(gray, NumberOfFrames=2, PixelData=2 * gray.tobytes(), **patient))
    (scans / "DICOMDIR").write_bytes(Path(get_testdata_file("DICOMDIR")).read_bytes())
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as packed:
        for path in scans.iterdir():
            packed.write(path, path.name)
    for source in (scans, tmp_path / "scans.zip"):
        out = tmp_path / f"{source.name}.csv"
        assert predict(source, "--model", trained, "--out", out) == 3
        assert "1 other files skipped" in capsys.readouterr().out
        table = pd.read_csv(out)
        assert table["name"].tolist() == ["IM0001", "a.dcm", "series.dcm"]
        assert table["red"][0] == table["red"][1]
        assert table["error"][2] == "has 2 frames, expected 1; export the frame to predict"
        for word in (PATIENT, "4711", "0815", "1950"):
            assert word not in out.read_text()


def test_unreadable_files_have_error_others_scores(trained, images, tmp_path, capsys):
    whole = (images / "00.png").read_bytes()
    bad = {"cut.png": whole[:200], "empty.png": b"", "page.png": b"<html>", "text.dcm": b"hello"}
    for name, data in bad.items():
        (images / name).write_bytes(data)
    (images / "torn.png").symlink_to(images / "00.png")
    out = tmp_path / "p.csv"
    assert predict(images, "--model", trained, "--out", out) == 3
    assert "45 images, 4 of them unreadable" in capsys.readouterr().out
    table = pd.read_csv(out, index_col="name")
    errors = table["error"].dropna()
    assert set(errors.index) == set(bad)
    assert errors["cut.png"] == "is truncated; fetch it again"
    assert errors["empty.png"].startswith("the file is empty")
    assert errors["text.dcm"].startswith("is not a DICOM file")
    assert table.loc[list(bad)].drop(columns="error").isna().all(axis=None)
    good = table.drop(index=list(bad))
    assert good["decision"].notna().all()
    assert good[CLASSES].sum(axis=1).to_numpy() == pytest.approx(1)


def test_damaged_zip_member_has_error(trained, images, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for name in ("00.png", "02.png", "04.png"):
            packed.write(images / name, name)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"02.png") + 300] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(bytes(data))
    assert predict(tmp_path / "a.zip", "--model", trained, "--out", tmp_path / "p.csv") == 3
    table = pd.read_csv(tmp_path / "p.csv", index_col="name")
    assert "Bad CRC-32 for file '02.png'" in table["error"]["02.png"]
    assert table["error"].notna().sum() == 1


def test_operating_points_from_model_or_file_decide(images, tmp_path, capsys):
    folder = model(tmp_path / "two", "binary", classes=["a", "b"])
    out = tmp_path / "p.csv"
    predict(images, "--model", folder, "--out", out)
    assert "decision threshold 0.5: the model has no operating points" in capsys.readouterr().out
    threshold = float(pd.read_csv(out)["b"].median())
    points = {"points": {"youden": {"b": {"threshold": threshold}}, "specificity": {"b": {"threshold": 2.0}}}}
    (folder / "operating_points.json").write_text(json.dumps(points))
    predict(images, "--model", folder, "--out", out)
    assert "decision at operating point youden" in capsys.readouterr().out
    table = pd.read_csv(out)
    assert ((table["decision"] == "b") == (table["b"] >= threshold)).all()
    assert table["decision"].nunique() == 2
    shutil.move(folder / "operating_points.json", tmp_path / "points.json")
    options = ("--operating-points", tmp_path / "points.json", "--operating-point", "specificity")
    predict(images, "--model", folder, "--out", out, *options)
    assert set(pd.read_csv(out)["decision"]) == {"a"}


SLOW = """
import time
from fadeformer.inference import batch, inputs
batch.CHUNK_SIZE, read = 2 * batch.BATCH_SIZE, inputs.InputImage.read
def slow_read(self, *options):
    time.sleep(0.01)
    return read(self, *options)
inputs.InputImage.read = slow_read
from pipelines.cli import main
main.main()
"""


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_resume_after_kill_gives_identical_file(trained, tmp_path, ending, monkeypatch, capsys):
    monkeypatch.setattr(batch, "CHUNK_SIZE", 2 * batch.BATCH_SIZE)
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(2)
    for number in range(300):
        Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / f"{number:03}.bmp")
    (folder / "017.bmp").write_bytes(b"no image")
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    words = ["--model", str(trained), "--threads", "1"]
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
    before = InputImage.read
    monkeypatch.setattr(InputImage, "read", lambda self, *options: read.append(self.name) or before(self, *options))
    capsys.readouterr()
    assert predict(folder, *words, "--out", out) == 3
    assert "rows; resuming" in capsys.readouterr().out
    assert min(read) >= "128.bmp"  # finished chunks are not read again
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_changed_image_discards_partial_results(trained, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "CHUNK_SIZE", batch.BATCH_SIZE)
    out, whole = tmp_path / "p.csv", tmp_path / "whole.csv"
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_build_rows", _fails_at("more/01.png", batch._build_rows))
        with pytest.raises(ZeroDivisionError):
            predict(images, "--model", trained, "--out", out, "--threads", 1)
    assert (tmp_path / ".p.csv.parts" / "000000.parquet").exists()
    Image.fromarray(np.full((28, 28, 3), 7, np.uint8)).save(images / "00.png")
    assert predict(images, "--model", trained, "--out", out) == 0
    assert "is from other images, another model or other options; starting again" in capsys.readouterr().out
    predict(images, "--model", trained, "--out", whole)
    assert out.read_bytes() == whole.read_bytes()


def _fails_at(name, rows):
    """Wrap `rows` to raise in the second batch."""

    def fail(inputs, *rest):
        return 1 / 0 if inputs[0].name > name else rows(inputs, *rest)

    return fail


def test_explain_writes_overlay_per_image(trained, images, tmp_path):
    (images / "bad.png").write_bytes(b"")
    before = predict(images, "--model", trained, "--out", tmp_path / "plain.csv")
    folder = tmp_path / "maps"
    assert predict(images / "more", "--model", trained, "--out", tmp_path / "p.csv", "--explain", folder) == 0
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
    message = error_of(capsys, images, "--model", folder, "--out", tmp_path / "p.csv")
    assert "class name 'name' is reserved for a column" in message


def test_files_with_pixels_are_never_left_out(trained, images, tmp_path, capsys):
    """By content, whatever the name: read, or listed with the reason; other files are counted."""
    Image.open(images / "00.png").save(images / "photo.JPG_large", "JPEG")
    (images / "phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    shutil.copy(get_testdata_file("liver_1frame.dcm"), images / "mask")
    (images / "BMI").write_text("BMI,age\n" * 20)
    assert predict(images, "--model", trained, "--out", tmp_path / "p.csv") == 3
    assert "43 images, 2 of them unreadable" in (output := capsys.readouterr().out)
    assert "2 other files skipped" in output
    table = pd.read_csv(tmp_path / "p.csv", index_col="name")
    assert table.loc["phone", "error"].startswith("is a HEIC or AVIF image, or a video")
    assert table.loc["mask", "error"] == "is a segmentation (a mask), not an image; remove it"
    assert table.loc["photo.JPG_large", CLASSES].notna().all()


def test_usage_errors_are_one_message(trained, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "none").mkdir()
    shutil.make_archive("packed", "tar", images)
    (tmp_path / "old").mkdir()
    for name in ("best_model.pth", "model.json"):
        shutil.copy(trained / name, tmp_path / "old" / name)
    to = ("--model", trained, "--out", "p.csv")
    for arguments, message in {
        ("gone.png", *to): "predict: gone.png: no such file or folder",
        ("images/*.jpg", *to): "predict: images/*.jpg: no file matches this pattern",
        ("none", *to): "predict: none: no image found (JPEG, ",
        ("packed.tar", *to): "predict: packed.tar: tar archives have no random access; unpack it",
        ("images", "--model", trained, "--out", "p.txt"): "predict: p.txt: must end in .csv or .parquet",
        ("images", "--model", trained, "--out", "gone/p.csv"): "predict: gone: no such folder; create it",
        ("images", "--model", "none", "--out", "p.csv"): "predict: none: no model found (model.json and weights",
        ("images", "--model", "old", "--out", "p.csv"): "predict: old: the model was written by an older version",
        ("images", *to, "--operating-points", "gone.json"): "predict: gone.json: no such file",
        ("images", *to, "--threads", "0"): "predict: --threads is 0; it must be 1 or more",
        ("images", "--model", "models:/a@champion", "--out", "p.csv"): "mlruns: there is no MLflow store",
    }.items():
        output = error_of(capsys, *arguments)
        assert message in output
        assert len(output.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(("number", "reason"), [(28, "No space left on device; free some"), (13, "Permission denied")])
def test_full_disk_keeps_partial_results(trained, images, tmp_path, capsys, monkeypatch, number, reason):
    monkeypatch.setattr(batch, "CHUNK_SIZE", batch.BATCH_SIZE)
    written = []

    def full(self, path, before=pd.DataFrame.to_parquet, **options):
        if written:
            raise OSError(number, reason.split(";")[0], str(path))
        written.append(path)
        before(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", full)
        assert reason in error_of(capsys, images, "--model", trained, "--out", tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()
    assert predict(images, "--model", trained, "--out", tmp_path / "p.csv") == 0
    assert "32 rows; resuming" in capsys.readouterr().out
