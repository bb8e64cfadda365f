"""What is wrong with data, and the message that each wrong gets: the table of docs/reference/bad_data.md, made by running it.

Each case goes through the stages download and validate as a user's would. After a change of words on purpose,
`python -m tests.data.test_bad_data` writes the table anew.
"""

import contextlib
import gzip
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate

from fadeformer.data import dataset_card
from fadeformer.data.sources import chestxray14, isic2019
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.config import overrides
from pipelines.stages import download, validate
from tests.conftest import ROOT
from tests.data.dicom.test_reader import BLACK, made, shipped
from tests.data.test_decode import png, saved

TABLE = ROOT / "docs/reference/bad_data.md"
SCANS = Path("scans")
GROUPS = {"train": "p1", "val": "p2", "test": "p3"}
KINDS: dict[str, Callable[[], dict[str, object] | None]] = {}


def pixels(seed: int, size: int = 40) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size)))


def write_scans() -> None:
    """Two classes in three splits, three images each."""
    for seed in range(18):
        split, name = tuple(GROUPS)[seed // 6], ("benign", "malignant")[seed % 2]
        path = SCANS / split / name / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(pixels(seed), "PNG"))


def kind(sentence: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Adds a case: a function that spoils `SCANS`, or makes something else and gives the section dataset of it."""

    def add(spoil):
        KINDS[sentence] = spoil
        return spoil

    return add


def one_file(sentence: str, data: bytes, name: str = "train/benign/x.png") -> None:
    def spoil():
        (SCANS / name).parent.mkdir(parents=True, exist_ok=True)
        (SCANS / name).write_bytes(data)

    KINDS[sentence] = spoil


PNG, JPEG = saved(pixels(99), "PNG"), saved(pixels(99), "JPEG", quality=95)
one_file("an empty file", b"")
one_file("a JPEG that is cut off", JPEG[:-200], "train/benign/x.jpg")
one_file("a PNG that is cut off", PNG[:-200])
one_file("a PNG with a wrong checksum", PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:])
one_file("the page of a login, saved as an image", b"<!DOCTYPE html><html>", "train/benign/x.jpg")
one_file("a text, named as an image", b"no image")
one_file("a pointer of git-lfs", b"version https://git-lfs.github.com/spec/v1\n")
one_file("a PDF", b"%PDF-1.7\n")
one_file("a picture of 3.6 gigapixels in 100 bytes", png(60_000, 60_000, 8, 0, b""))
TWO = saved(Image.fromarray(pixels(0)), "GIF", save_all=True, append_images=[Image.fromarray(pixels(1))])
one_file("an animation", TWO, "train/benign/x.gif")
one_file("a TIFF of fractions", saved(Image.fromarray(np.ones((40, 40), np.float32)), "TIFF"), "train/benign/x.tif")
one_file("an image of one value", saved(np.full((40, 40, 3), 7, np.uint8), "PNG"))
one_file("a DICOM file that is cut off", shipped("MR_truncated.dcm"), "train/benign/x.dcm")
one_file("a DICOM file that is a plan, and no image", shipped("rtplan.dcm"), "train/benign/x.dcm")
one_file("a DICOM file whose image is missing", shipped("MR_small.dcm")[:1000], "train/benign/x.dcm")
OTHER = made(BLACK, pydicom.uid.JPEGLosslessSV1, PixelData=encapsulate([JPEG]))
VIDEO = made(BLACK, pydicom.uid.MPEG4HP41, PixelData=encapsulate([b"1234"]))
one_file("a DICOM file of another size than it says", OTHER, "train/benign/x.dcm")
one_file("a DICOM video", VIDEO, "train/benign/x.dcm")
one_file("a picture, named as DICOM", PNG, "train/benign/x.dcm")
one_file("an image in no class", PNG, "x.png")
one_file("an image in a folder of a class", PNG, "train/benign/left/x.png")
one_file("a class in train alone", PNG, "train/unclear/x.png")
one_file("names that Windows takes for one", saved(pixels(98), "PNG"), "train/benign/00.PNG")


@kind("no folder")
def _():
    shutil.rmtree(SCANS)
    return {"name": "folder", "root": "elsewhere"}


@kind("an empty folder")
def _():
    shutil.rmtree(SCANS)
    SCANS.mkdir()


@kind("a folder without images")
def _():
    shutil.rmtree(SCANS)
    SCANS.mkdir()
    (SCANS / "readme.txt").write_text("see elsewhere")


@kind("one class alone")
def _():
    for split in GROUPS:
        shutil.rmtree(SCANS / split / "malignant")


@kind("no test images")
def _():
    shutil.rmtree(SCANS / "test")
    shutil.move(SCANS / "val", SCANS / "unlabelled")


@kind("a class that `dataset.classes` does not name")
def _():
    return {"classes": ["benign", "cancer"]}


@kind("a link that leaves the folder")
def _():
    (SCANS / "train" / "benign" / "x.png").symlink_to(ROOT / "README.md")


@kind("a link that leads nowhere")
def _():
    (SCANS / "train" / "benign" / "x.png").symlink_to("gone.png")


@kind("a loop of links")
def _():
    (SCANS / "train" / "again").symlink_to(SCANS.resolve(), target_is_directory=True)


@kind("a pipe")
def _():
    os.mkfifo(SCANS / "train" / "benign" / "x.png")


@kind("an image in two splits")
def _():
    shutil.copy(SCANS / "train/benign/00.png", SCANS / "test/benign/again.png")


@kind("an image in two splits, in another file format")
def _():
    Image.open(SCANS / "train/benign/00.png").save(SCANS / "test/benign/again.bmp")


@kind("an image in two splits, once as JPEG")
def _():
    Image.open(SCANS / "train/benign/00.png").save(SCANS / "test/benign/again.jpg", quality=85)


@kind("an image in two splits, shifted by a pixel")
def _():
    shifted = np.roll(np.asarray(Image.open(SCANS / "train/benign/00.png")), 1, axis=1)
    Image.fromarray(shifted).save(SCANS / "test/benign/again.png")


@kind("an image with two labels")
def _():
    shutil.copy(SCANS / "train/benign/00.png", SCANS / "train/malignant/again.png")


def labels(change: Callable[[pd.DataFrame], object] = lambda rows: None) -> None:
    """The same images with a table in place of folders."""
    names = sorted(path.relative_to(SCANS).as_posix() for path in SCANS.rglob("*.png"))
    rows = pd.DataFrame({"path": names})
    rows["label"] = rows["path"].map(lambda name: name.split("/")[1])
    rows["split"] = rows["path"].map(lambda name: name.split("/")[0])
    rows["group"] = rows["split"].map(GROUPS)
    changed = change(rows)
    (rows if changed is None else changed).to_csv(SCANS / "labels.csv", index=False)


def in_table(sentence: str, change: Callable[[pd.DataFrame], object], **dataset: object) -> None:
    def spoil():
        labels(change)
        return dataset

    KINDS[sentence] = spoil


def put(row: int, column: str, value: object) -> Callable[[pd.DataFrame], None]:
    def change(rows):
        rows[column] = rows[column].astype(object)
        rows.loc[row, column] = value

    return change


in_table("labels.csv without paths", lambda rows: rows.rename(columns={"path": "file"}))
in_table("labels.csv that names a missing file", put(3, "path", "train/gone.png"))
in_table("labels.csv that leaves an image out", lambda rows: rows.drop(3))
in_table("labels.csv that names a file twice", lambda rows: pd.concat([rows, rows[:1]]))
in_table("labels.csv with an empty path", put(3, "path", None))
in_table("labels.csv with an unknown split", put(3, "split", "holdout"))
in_table("labels.csv without a label", put(3, "label", None))
in_table(
    "labels.csv with a label out of range", lambda rows: rows.assign(label=[7, *[0, 1] * 8, 0]), classes=["a", "b"]
)
in_table("labels.csv with neither labels nor findings", lambda rows: rows.drop(columns="label"))
in_table("labels.csv without a finding that is named", lambda rows: rows.rename(columns={"label": "mass"}),
         classes=["mass", "oedema"])  # fmt: skip
in_table(
    "a finding that is no number",
    lambda rows: rows.drop(columns="label").assign(mass=["yes", *[0, 1] * 8, 0], oedema=1),
    classes=["mass", "oedema"],
)
in_table("a patient in two splits", put(17, "group", "p3"))


@kind("labels.csv that is empty")
def _():
    (SCANS / "labels.csv").write_bytes(b"")


@kind("labels.csv that is no UTF-8")
def _():
    (SCANS / "labels.csv").write_bytes("path,label\nä.png,a\n".encode("utf-16"))


@kind("findings, where `dataset.task` says that they are grades")
def _():
    labels(lambda rows: rows.drop(columns="label").assign(mass=[0, 1] * 9, oedema=[0, 1, 1] * 6))
    return {"classes": ["mass", "oedema"], "task": "ordinal-regression"}


def archive(sentence: str, make: Callable[[Path], object], name: str = "scans.zip") -> None:
    def spoil():
        make(Path(name))
        return {"root": name}

    KINDS[sentence] = spoil


def zipped(path: Path, extra: str | zipfile.ZipInfo | None = None, data: bytes = b"1") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in sorted(SCANS.rglob("*.png")):
            opened.write(file, file.relative_to(SCANS))
        if extra is not None:
            opened.writestr(extra, data)


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("train/benign/x.png")
    info.external_attr = 0o120777 << 16
    return info


def cut(path: Path) -> None:
    zipped(path)
    path.write_bytes(path.read_bytes()[:-100])


def tarred(path: Path, size: int | None = None, **fields: object) -> None:
    with tarfile.open(path, "w:gz") as opened:
        for file in sorted(SCANS.rglob("*.png")):
            opened.add(file, file.relative_to(SCANS))
        if fields:
            info = tarfile.TarInfo("train/benign/x.png")
            for field, value in fields.items():
                setattr(info, field, value)
            opened.addfile(info)
    path.write_bytes(path.read_bytes()[:size])


archive("a zip that climbs out of its folder", lambda path: zipped(path, "../x.png"))
archive("a zip with an absolute name", lambda path: zipped(path, "/etc/x.png"))
archive("a zip with a link", lambda path: zipped(path, link()))
archive("a zip that grows a thousandfold", lambda path: zipped(path, "train/benign/x.png", bytes(10**7)))
archive("a zip that is cut off", cut)
archive("a tar.gz that is cut off", lambda path: tarred(path, size=2000), "scans.tar.gz")
archive("a tar.gz with a device", lambda path: tarred(path, type=tarfile.BLKTYPE), "scans.tar.gz")
archive("a tar.gz with a link", lambda path: tarred(path, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "scans.tar.gz")
archive(
    "a tar.gz that grows a thousandfold", lambda path: path.write_bytes(gzip.compress(bytes(10**7))), "scans.tar.gz"
)
archive("a 7-Zip file", lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(600)), "scans.7z")


def arrays(sentence: str, **changes: object) -> None:
    def spoil():
        held = {}
        for number, split in enumerate(GROUPS):
            held[f"{split}_images"] = np.stack([pixels(number * 6 + i, 28) for i in range(6)])
            held[f"{split}_labels"] = np.array([0, 1] * 3, np.uint8)[:, None]
        held |= changes
        np.savez("scans.npz", **{name: values for name, values in held.items() if values is not None})
        return {"name": "npz", "root": "scans.npz"}

    KINDS[sentence] = spoil


arrays("an npz without test labels", test_labels=None)
arrays("an npz of fractions", test_images=np.zeros((6, 28, 28, 3), np.float32))
arrays("an npz of pickled objects", test_labels=np.array([None] * 6))
arrays("an npz with more images than labels", test_labels=np.zeros((5, 1), np.uint8))
arrays("an npz with a negative label", test_labels=np.array([[-1], *[[0], [1]] * 2, [0]]))


@kind("ISIC 2019: a table of another challenge")
def _():
    Path("mirror").mkdir()
    shutil.make_archive("mirror/" + isic2019.IMAGES.removesuffix(".zip"), "zip", SCANS)
    for name in (isic2019.GROUND_TRUTH, isic2019.METADATA):
        (Path("mirror") / name).write_text("image,MEL\nISIC_0000000,1.0\n")
    return {"name": "isic2019", "mirror": "mirror", "edition": "other"}


@kind("ISIC 2019: a missing file")
def _():
    Path("mirror").mkdir()
    return {"name": "isic2019", "mirror": "mirror", "edition": "other"}


@kind("ChestX-ray14: a damaged archive")
def _():
    Path("mirror").mkdir()
    tarred(Path("mirror") / chestxray14.archive_name(1), size=2000)
    return {"name": "chestxray14", "mirror": "mirror", "archives": [1]}


@kind("MedMNIST: another file under a published name")
def _():
    Path("mirror").mkdir()
    np.savez("mirror/retinamnist.npz", train_images=np.zeros(3))
    return {"name": "retinamnist", "mirror": "mirror", "size": 28}


def outcome(sentence: str) -> str:
    """What the stages say of a case, in an empty folder with small params.yaml, as one line of the table."""
    write_scans()
    changes = KINDS[sentence]() or {}
    dataset = {"name": "folder", "root": str(SCANS), **changes}
    overrides.apply_overrides(paths.PARAMS, {"dataset": dataset})
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            download.main()
            validate.main()
    except UserError as error:
        does, said = "stops", str(error)
    else:
        does, said = "warns", printed.getvalue()
        if "WARNING" not in said:
            does, said = "tells", dataset_card.read_card(paths.RAW).note
        assert "WARNING" in said or "left out" in said, f"{sentence} passes without a word"
    lines = [line.strip() for line in said.splitlines()]
    gate = [i for i, line in enumerate(lines) if line.startswith("- ")]
    told = (
        [lines[0]]
        if not gate
        else [line for line in lines[gate[0] : gate[0] + 2] if line == lines[gate[0]] or not line.startswith("- ")]
    )
    if said.startswith(f"{SCANS}: DICOM"):
        told = lines[:2]
    text = ": ".join(told).removeprefix("- ").replace(str(Path.cwd()) + "/", "")
    text = re.sub(r"own-scans-[0-9a-f]{8}", "own-scans-...", text)
    text = re.sub(r"(SHA256|MD5) is [0-9a-f]+", r"\1 is ...", text)
    return f"| {sentence} | {does} | {text.replace('|', '&#124;')} |"


def table() -> str:
    return TABLE.read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_data_docs")
@pytest.mark.parametrize("sentence", KINDS)
def test_each_wrong_gets_its_message(sentence, small_params, monkeypatch):
    monkeypatch.chdir(small_params.parent)
    before = sum(path.stat().st_size for path in Path().rglob("*") if path.is_file())
    line = outcome(sentence)
    assert line in table().splitlines()
    after = sum(path.stat().st_size for path in Path().rglob("*") if path.is_file() and not path.is_symlink())
    assert after - before < 20 * 2**20  # bytes; the pages of the gate are some of them


def test_the_table_has_no_other_lines():
    assert len(KINDS) >= 60
    assert [line.split(" | ")[0][2:] for line in table().splitlines() if line.startswith("| ")][2:] == list(KINDS)


def write_table() -> None:
    """Writes the table anew, from what the stages say now."""
    lines = []
    for sentence in KINDS:
        with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
            shutil.copy(ROOT / "params.yaml", paths.PARAMS)
            with contextlib.redirect_stderr(io.StringIO()):
                lines.append(outcome(sentence))
    head = table().split("| input |")[0]
    TABLE.write_text(
        head + "\n".join(["| input | gate | message |", "| --- | --- | --- |", *lines, ""]), encoding="utf-8"
    )


if __name__ == "__main__":
    write_table()
