"""Images decoded and resized once, in any number of threads, and after any interruption."""

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


def write(folder, made, *, size=10, channels=3, aspect="squash", threads=None):
    """Writes an archive of the pixels, and the arrays of it."""
    folder.mkdir()
    np.savez(folder.parent / "own.npz", **{f"{split}_images": images for split, images in made.items()})
    rows = pd.DataFrame(
        [("own.npz", f"{s}_images/{i}", s, f"{s}/{i}", None, i % 3) for s, of in made.items() for i in range(len(of))],
        columns=["path", "member", "split", "id", "group", "label"],
    )
    return preprocess.write_arrays(
        CARD, rows, folder.parent, image_size=size, channels=channels, aspect=aspect, threads=threads,
        split="published", cross_split_duplicates=2, folder=folder,
    )  # fmt: skip


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = pixels(1)
    write(tmp_path / "a", grey, channels=3)
    np.testing.assert_array_equal(
        arrays.load_split(tmp_path / "a", "val").images, np.repeat(grey["val"][..., None], 3, axis=3)
    )
    colour = pixels(3)
    write(tmp_path / "b", colour, channels=1)
    expected = np.asarray(Image.fromarray(colour["val"][1]).convert("L"))
    np.testing.assert_array_equal(arrays.load_split(tmp_path / "b", "val").images[1, :, :, 0], expected)


@pytest.mark.parametrize("size", [5, 23])
def test_images_are_resized_by_pillow(tmp_path, size):
    made = pixels(3)
    write(tmp_path / "a", made, size=size)
    expected = np.asarray(Image.fromarray(made["test"][2]).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(arrays.load_split(tmp_path / "a", "test").images[2], expected)


def test_channel_statistics_are_those_of_train_alone(tmp_path):
    made = pixels(3)
    made["test"][:] = 255
    meta = write(tmp_path / "a", made)
    of_train = made["train"].reshape(-1, 3) / 255
    np.testing.assert_allclose(meta.channel_mean, of_train.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(meta.channel_std, of_train.std(axis=0), rtol=1e-12)


def photographs(archive, count=40):
    random = np.random.default_rng(0)
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            held = io.BytesIO()
            coarse.resize((300 + number, 260), Image.Resampling.BICUBIC).save(held, "JPEG")
            packed.writestr(f"{number:02}.jpg", held.getvalue())
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


def test_any_number_of_threads_leaves_the_same_bytes(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    assert render(rows, tmp_path, tmp_path / "a", 1) == render(rows, tmp_path, tmp_path / "b", 5)


def test_what_was_interrupted_is_gone_on_with_and_not_begun_again(tmp_path, monkeypatch):
    rows = photographs(tmp_path / "own.zip")
    expected = render(rows, tmp_path, tmp_path / "whole")
    monkeypatch.setattr(preprocess, "PROGRESS_INTERVAL", 6)
    decode, decoded = image_stream.decode_image, []

    def failing(data, name):
        decoded.append(name)
        if len(decoded) == 25:
            raise KeyboardInterrupt
        return decode(data, name)

    monkeypatch.setattr(image_stream, "decode", failing)
    with pytest.raises(KeyboardInterrupt):
        render(rows, tmp_path, tmp_path / "begun", threads=1)
    noted = int(np.load(tmp_path / "begun/done.npy").sum())
    assert 6 <= noted <= 24
    decoded.clear()
    decoded += [""] * 100  # no more failures
    assert render(rows, tmp_path, tmp_path / "begun", threads=1) == expected
    assert len(decoded) == 100 + len(rows) - noted


KILLED = """
import sys, time
from pathlib import Path
import pandas as pd
from fadeformer.data import image_stream, preprocess
preprocess.PROGRESS_INTERVAL = 5
decode = image_stream.decode
def slow(data, name):
    time.sleep(0.05)
    return decode(data, name)
image_stream.decode = slow
folder = Path(sys.argv[1])
(folder / "begun").mkdir()
preprocess.write_arrays(
    {}, pd.read_parquet(folder / "rows.parquet"), folder, image_size=32, channels=3, aspect="crop", threads=1,
    split="published", cross_split_duplicates=0, folder=folder / "begun",
)
"""


def test_a_process_that_is_killed_leaves_nothing_wrong(tmp_path):
    rows = photographs(tmp_path / "own.zip", 120)
    expected = render(rows, tmp_path, tmp_path / "whole")
    rows.to_parquet(tmp_path / "rows.parquet")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    while process.poll() is None and not (tmp_path / "begun/done.npy").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not np.load(tmp_path / "begun/done.npy").all()
    assert render(rows, tmp_path, tmp_path / "begun") == expected


def test_an_image_that_has_become_unreadable_is_named(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as packed:
        for name in rows["member"]:
            packed.writestr(name, b"no image")
    with pytest.raises(UserError, match=r"00\.jpg: .*the data have changed since they were checked"):
        render(rows, tmp_path, tmp_path / "a")


def test_images_that_are_gone_are_told(tmp_path):
    rows = photographs(tmp_path / "own.zip")
    rows.loc[3, "member"] = "other.jpg"
    with pytest.raises(UserError, match="1 images of the manifest are gone"):
        render(rows, tmp_path, tmp_path / "a")
