"""Preprocessing: conversion, determinism over threads, and resuming after interruptions."""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.data import arrays, image_stream, preprocess
from fadeformer.errors import UserError

CARD = {"name": "own", "task": "multi-class", "classes": ["a", "b", "c"], "size": 10}
SPLITS = {"train": 5, "val": 3, "test": 4}


def pixels(channels, side=10):
    shape = (side, side, 3) if channels == 3 else (side, side)
    random = np.random.default_rng(0)
    return {s: random.integers(0, 256, (n, *shape), dtype=np.uint8) for s, n in SPLITS.items()}


def write(folder, images, *, size=10, channels=3, aspect="squash", threads=None):
    """Write an .npz archive of the pixels and preprocess it."""
    folder.mkdir()
    np.savez(folder.parent / "own.npz", **{f"{split}_images": array for split, array in images.items()})
    rows = pd.DataFrame(
        [
            ("own.npz", f"{s}_images/{i}", s, f"{s}/{i}", None, i % 3)
            for s, array in images.items()
            for i in range(len(array))
        ],
        columns=["path", "member", "split", "id", "group", "label"],
    )
    return preprocess.write_arrays(
        CARD, rows, folder.parent, image_size=size, channels=channels, aspect=aspect, threads=threads,
        split="published", cross_split_duplicates=2, folder=folder,
    )  # fmt: skip


def test_channels_are_converted_both_ways(tmp_path):
    gray = pixels(1)
    write(tmp_path / "a", gray, channels=3)
    np.testing.assert_array_equal(
        arrays.load_split(tmp_path / "a", "val").images, np.repeat(gray["val"][..., None], 3, axis=3)
    )
    color = pixels(3)
    write(tmp_path / "b", color, channels=1)
    expected = np.asarray(Image.fromarray(color["val"][1]).convert("L"))
    np.testing.assert_array_equal(arrays.load_split(tmp_path / "b", "val").images[1, :, :, 0], expected)


@pytest.mark.parametrize("size", [5, 23])
def test_resizing_matches_pillow(tmp_path, size):
    images = pixels(3)
    write(tmp_path / "a", images, size=size)
    expected = np.asarray(Image.fromarray(images["test"][2]).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(arrays.load_split(tmp_path / "a", "test").images[2], expected)


def test_channel_statistics_use_train_only(tmp_path):
    images = pixels(3)
    images["test"][:] = 255
    metadata = write(tmp_path / "a", images)
    train_pixels = images["train"].reshape(-1, 3) / 255
    np.testing.assert_allclose(metadata.channel_mean, train_pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(metadata.channel_std, train_pixels.std(axis=0), rtol=1e-12)


def photographs(archive, count=40):
    random = np.random.default_rng(0)
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((300 + number, 260), Image.Resampling.BICUBIC).save(buffer, "JPEG")
            packed.writestr(f"{number:02}.jpg", buffer.getvalue())
    names = [f"{number:02}.jpg" for number in range(count)]
    split = np.array(["train", "train", "val", "test"])[np.arange(count) % 4]
    return pd.DataFrame({"path": archive.name, "member": names, "split": split, "id": names, "group": None, "label": 0})


def render(rows, source, folder, threads=None):
    folder.mkdir(exist_ok=True)
    preprocess.write_arrays(
        CARD, rows, source, image_size=32, channels=3, aspect="crop", threads=threads, split="published",
        cross_split_duplicates=0,
        folder=folder,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_output_is_independent_of_thread_count(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    assert render(rows, tmp_path, tmp_path / "a", 1) == render(rows, tmp_path, tmp_path / "b", 5)


def test_interrupted_preprocessing_resumes(tmp_path, monkeypatch):
    rows = photographs(tmp_path / "own.zip")
    expected = render(rows, tmp_path, tmp_path / "complete")
    monkeypatch.setattr(preprocess, "PROGRESS_INTERVAL", 6)
    decode, decoded = image_stream.decode_image, []

    def failing(data, name, **options):
        decoded.append(name)
        if len(decoded) == 25:
            raise KeyboardInterrupt
        return decode(data, name, **options)

    monkeypatch.setattr(image_stream, "decode_image", failing)
    with pytest.raises(KeyboardInterrupt):
        render(rows, tmp_path, tmp_path / "resumed", threads=1)
    num_done = int(np.load(tmp_path / "resumed/done.npy").sum())
    assert 6 <= num_done <= 24
    decoded.clear()
    decoded += [""] * 100  # no more failures
    assert render(rows, tmp_path, tmp_path / "resumed", threads=1) == expected
    assert len(decoded) == 100 + len(rows) - num_done


SLOW_SCRIPT = """
import sys, time
from pathlib import Path
import pandas as pd
from fadeformer.data import image_stream, preprocess
preprocess.PROGRESS_INTERVAL = 5
decode = image_stream.decode_image
def slow(data, name, **options):
    time.sleep(0.05)
    return decode(data, name, **options)
image_stream.decode_image = slow
folder = Path(sys.argv[1])
(folder / "resumed").mkdir()
preprocess.write_arrays(
    {}, pd.read_parquet(folder / "rows.parquet"), folder, image_size=32, channels=3, aspect="crop", threads=1,
    split="published", cross_split_duplicates=0, folder=folder / "resumed",
)
"""


def test_killed_process_resumes_to_identical_files(tmp_path):
    rows = photographs(tmp_path / "own.zip", 120)
    expected = render(rows, tmp_path, tmp_path / "complete")
    rows.to_parquet(tmp_path / "rows.parquet")
    process = subprocess.Popen([sys.executable, "-c", SLOW_SCRIPT, str(tmp_path)])
    while process.poll() is None and not (tmp_path / "resumed/done.npy").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not np.load(tmp_path / "resumed/done.npy").all()
    assert render(rows, tmp_path, tmp_path / "resumed") == expected


def test_image_that_became_unreadable_is_reported(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as packed:
        for name in rows["member"]:
            packed.writestr(name, b"no image")
    with pytest.raises(UserError, match=r"00\.jpg: .*the data changed after validation"):
        render(rows, tmp_path, tmp_path / "a")


def test_missing_images_are_reported(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    rows.loc[3, "member"] = "other.jpg"
    with pytest.raises(UserError, match="1 images of the manifest no longer exist"):
        render(rows, tmp_path, tmp_path / "a")
