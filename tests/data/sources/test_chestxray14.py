"""ChestX-ray14 with small made-up archives and tables, and a real sample."""

import http.server
import io
import shutil
import tarfile
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fadeformer.data import arrays
from fadeformer.data.sources import chestxray14, lesion_boxes
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.config import overrides
from pipelines.stages import preprocess
from tests.data.conftest import build_default_manifest

PATIENTS = 60
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {sex},View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]{end}"
)


# two boxes of a test image, and one of an image that does not exist
BOXES = """Image Index,Finding Label,Bbox [x,y,w,h]
00000051_000.png,Mass,512,256,128,64
00000051_000.png,Infiltrate,0,0,1024,512
00009999_000.png,Mass,512,256,128,64
"""
# NIH's boxes of the images in the real sample
SAMPLE_BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00000181_061.png,Atelectasis,209.8983051,568.714132,213.6949153,254.9152542,,,
00000149_006.png,Atelectasis,603.6610169,460.2395557,249.4915254,90.03389831,,,
00000211_010.png,Atelectasis,353.0847458,535.0870134,101.9661017,168.1355932,,,
00000147_001.png,Atelectasis,617.6507937,599.2296296,100.7746032,179.8772487,,,
00000072_000.png,Atelectasis,356.5037037,567.805291,127.8645503,82.35343915,,,
00000211_016.png,Infiltrate,237.3079365,465.9470899,230.8063492,328.3301587,,,
00000032_037.png,Infiltrate,339.1661376,119.1957672,172.2920635,351.0857143,,,
00000193_019.png,Pneumonia,703.7155556,616.997934,218.4533333,249.1733333,,,
00000150_002.png,Pneumonia,601.3968254,595.978836,215.6359788,180.9608466,,,
"""


def encode_png(seed: int, mode: str) -> bytes:
    random = np.random.default_rng(seed)
    gray = Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    gray.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def image_names() -> list[str]:
    return [f"{patient:08}_{follow_up:03}.png" for patient in range(1, PATIENTS + 1) for follow_up in range(2)]


def write_table(mirror, *, sex="Gender", age="0{}Y", end=",", change=lambda rows: rows):
    rows = [
        [name, ("Hernia|Effusion", "No Finding", "Mass")[i % 3], str(i % 2), str(int(name[:8])),
         age.format(40 + i % 50), "F" if i % 2 else "M", "PA", "2682", "2749", "0.143", "0.143"]
        for i, name in enumerate(image_names())
    ]  # fmt: skip
    text = "\n".join([HEADER.format(sex=sex, end=end), *(",".join(row) + end for row in change(rows))])
    (mirror / chestxray14.ENTRY_TABLE).write_text(text + "\n")


@pytest.fixture
def mirror(tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    for number, part in ((1, image_names()[:80]), (2, image_names()[80:])):
        with tarfile.open(folder / chestxray14.archive_name(number), "w:gz") as archive:
            for i, name in enumerate(part):
                data = encode_png(number * 1000 + i, "RGBA" if i % 7 == 0 else "RGB" if i % 2 else "L")
                member = tarfile.TarInfo(f"images/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    write_table(folder)
    (folder / chestxray14.TRAIN_VAL_LIST).write_text("\n".join(image_names()[:90]) + "\n")
    (folder / chestxray14.TEST_LIST).write_text("\n".join(image_names()[90:]))
    return folder


@pytest.fixture
def fetch(fetched, mirror):
    return lambda **changes: fetched(
        **{"name": "chestxray14", "mirror": str(mirror), "edition": "other", "archives": [2, 1], **changes}
    )


@pytest.mark.parametrize(
    "edition",
    [
        {"sex": "Gender", "age": "0{}Y", "end": ","},  # 2017: a comma at the end of every row
        {"sex": "Gender", "age": "{}", "end": ""},
        {"sex": "Sex", "age": "{}", "end": ","},
    ],
)
def test_rows_match_tables_of_every_edition(fetch, mirror, edition):
    write_table(mirror, **edition)
    card, folder = fetch()
    rows = chestxray14.image_table(card, folder)
    assert len(rows) == 2 * PATIENTS
    first = rows.iloc[3].to_dict()
    labels = {first.pop(f"label_{i}"): finding for i, finding in enumerate(chestxray14.FINDINGS)}
    assert first == {
        "path": "images_001.tar.gz", "member": "images/00000002_001.png", "id": "00000002_001.png", "group": "2",
        "split": "train_val", "age": 43, "sex": "F", "view": "PA",
    }  # fmt: skip
    assert set(labels) == {0, 1}
    positive = [f for i, f in enumerate(chestxray14.FINDINGS) if rows[f"label_{i}"].iloc[3]]
    assert positive == ["Effusion", "Hernia"]
    assert not rows.filter(like="label_").iloc[4].any()


def test_archive_subset_limits_images_and_drops_impossible_ages(fetch, mirror):
    write_table(mirror, age="4{}", end="")
    card, folder = fetch(archives=[1])
    rows = chestxray14.image_table(card, folder)
    assert set(rows["id"]) == set(image_names()[:80])
    assert card.file == "images_001.tar.gz"
    assert rows["age"].isna().all()


def test_val_is_split_by_patient_and_test_kept(fetch, tmp_path):
    card, folder = fetch()
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert set(rows.loc[rows["split"] == "test", "id"]) == set(image_names()[90:])
    assert rows.groupby("group")["split"].nunique().max() == 1
    # 0.7 : 0.1 of the 90
    assert rows["split"].value_counts().to_dict() == {"train": 78, "test": 30, "val": 12}
    assert rows["problem"].isna().all()
    assert set(rows["mode"]) == {"L", "RGB"}


def test_resplit_replaces_published_split(fetch, tmp_path):
    card, folder = fetch()
    rows = build_default_manifest(card, folder, tmp_path / "splits", resplit=True).rows
    assert rows["split"].value_counts().to_dict() == {"train": 84, "test": 24, "val": 12}
    assert rows.groupby("group")["split"].nunique().max() == 1
    assert set(rows.loc[rows["split"] == "test", "id"]) != set(image_names()[90:])


def test_published_archive_must_match_md5(fetch):
    with pytest.raises(UserError, match=r"images_001\.tar\.gz: MD5 is .* set dataset\.edition: other"):
        fetch(edition="published")


def edit(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return lambda mirror: write_table(mirror, change=change)


def write_list(name, lines):
    return lambda mirror: (mirror / name).write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (edit(3, 1, "Measles"), "unknown finding 'Measles'; the table must have"),
        (edit(3, 3, "77"), "line 5: the patient id differs from that in the file name 00000002_001.png"),
        (edit(3, 3, ""), "line 5 has no image, finding or patient"),
        (edit(3, 0, "00000002_000.png"), "lists 00000002_000.png twice"),
        (lambda mirror: write_table(mirror, sex="Height"), "has no column sex; it is not NIH's file"),
        (
            lambda mirror: write_table(mirror, change=lambda rows: rows[:-1]),
            "1 images of the archives are not in Data_Entry",
        ),
        (
            write_list(chestxray14.TEST_LIST, image_names()[91:]),
            "1 images of the archives are not in train_val_list.txt or",
        ),
        (write_list(chestxray14.TEST_LIST, image_names()[89:]), "00000045_001.png is in both lists"),
        (lambda mirror: (mirror / chestxray14.ENTRY_TABLE).write_bytes(b""), "cannot be read as a table"),
    ],
)
def test_inconsistent_tables_raise_error(fetch, mirror, corrupt, message):
    corrupt(mirror)
    with pytest.raises(UserError, match=message):  # raised when fetching or when reading
        chestxray14.image_table(*fetch())


def test_float_patient_ids_are_read_as_integers(fetch, mirror):
    before = chestxray14.image_table(*fetch())["group"]
    path = mirror / chestxray14.ENTRY_TABLE
    rows = pd.read_csv(path, dtype=str, index_col=False)
    rows["Patient ID"] += ".0"
    rows.to_csv(path, index=False)
    (mirror.parent / "dataset.lock").unlink()
    assert chestxray14.image_table(*fetch())["group"].tolist() == before.tolist()


def test_card_notes_missing_boxes(fetch, mirror):
    card, folder = fetch()
    assert card.note.endswith(" Without lesion boxes: the server or mirror has no BBox_List_2017.csv.")
    assert lesion_boxes.box_table(card, folder) is None
    (mirror / chestxray14.BOX_LIST).write_text(BOXES)
    with_boxes, folder = fetch()
    assert "boxes" not in with_boxes.note
    assert with_boxes.sha256 != card.sha256
    boxes = lesion_boxes.box_table(with_boxes, folder)
    assert boxes["class"].tolist() == [4, 3, 4]  # Mass, Infiltrate
    assert boxes["frame_width"].tolist() == [1024] * 3


def test_missing_boxes_on_server_are_noted_failures_raise(fetch, mirror):
    refused = set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            if self.path[1:] in refused:
                self.send_error(403)
                return None
            return super().send_head()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(mirror))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert "Without lesion boxes" in fetch(mirror=address)[0].note
        (mirror / chestxray14.BOX_LIST).write_text(BOXES)
        refused.add(chestxray14.BOX_LIST)
        with pytest.raises(UserError, match=r"BBox_List_2017\.csv: cannot be downloaded \(403"):
            fetch(mirror=address)
        refused.clear()
        assert chestxray14.BOX_LIST in fetch(mirror=address)[0].files
        server.shutdown()


def run_preprocess(card, folder, tmp_path, monkeypatch, small_params):
    """Run the preprocess stage on the fetched files and return the manifest rows."""
    monkeypatch.chdir(tmp_path)
    paths.RAW.parent.mkdir()
    shutil.move(folder, paths.RAW)
    manifest = build_default_manifest(card, paths.RAW, tmp_path / "splits")
    manifest.rows.attrs["split"] = manifest.split
    manifest.rows.to_parquet(paths.MANIFEST)
    preprocess.main()
    return manifest.rows


@pytest.mark.parametrize("has_boxes", [True, False])
def test_boxes_are_saved_in_array_pixels(fetch, mirror, tmp_path, monkeypatch, small_params, has_boxes):
    overrides.apply_overrides(small_params, {"preprocess": {"image_size": 16}})
    if not has_boxes:
        run_preprocess(*fetch(), tmp_path, monkeypatch, small_params)
        assert arrays.read_boxes(paths.PROCESSED, "test") is None
        return
    (mirror / chestxray14.BOX_LIST).write_text(BOXES)
    run_preprocess(*fetch(), tmp_path, monkeypatch, small_params)
    boxes = arrays.read_boxes(paths.PROCESSED, "test")
    assert boxes.drop(columns="split").to_dict("records") == [
        {"id": image_names()[100], "class": 4, "x": 8, "y": 4, "w": 2, "h": 1},
        {"id": image_names()[100], "class": 3, "x": 0, "y": 0, "w": 16, "h": 8},
    ]  # the third box has no image
    assert arrays.read_boxes(paths.PROCESSED, "val").empty


def test_nih_boxes_of_real_sample(fetched, real_data, tmp_path, monkeypatch, small_params):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for path in (real_data / "chestxray14").iterdir():
        (mirror / path.name).symlink_to(path)
    (mirror / chestxray14.BOX_LIST).write_text(SAMPLE_BOXES)
    overrides.apply_overrides(small_params, {"preprocess": {"image_size": 32}})
    card, folder = fetched(name="chestxray14", mirror=str(mirror), edition="other", archives=[1])
    rows = run_preprocess(card, folder, tmp_path, monkeypatch, small_params)
    boxes = pd.concat(arrays.read_boxes(paths.PROCESSED, split) for split in ("train", "val", "test"))
    assert len(boxes) == 9
    test_boxes = arrays.read_boxes(paths.PROCESSED, "test").set_index("id")
    assert sorted(test_boxes.index) == ["00000032_037.png", "00000149_006.png"]
    assert test_boxes.loc["00000149_006.png", ["x", "y", "w", "h"]].tolist() == pytest.approx(
        [603.6610169 / 32, 460.2395557 / 32, 249.4915254 / 32, 90.03389831 / 32]
    )
    # the finding of each box is a label of its image
    labels = rows.set_index("id")[[f"label_{i}" for i in range(14)]]
    assert all(
        labels.loc[name, f"label_{label}"] == 1 for name, label in boxes[["id", "class"]].itertuples(index=False)
    )


def test_real_chestxray14_sample(fetched, real_data, tmp_path):
    card, folder = fetched(name="chestxray14", mirror=str(real_data / "chestxray14"), edition="other", archives=[1])
    rows = build_default_manifest(card, folder, tmp_path / "splits").rows
    assert (len(rows), rows["group"].nunique()) == (1000, 264)
    assert rows["split"].value_counts()["test"] == 251
    assert rows.groupby("group")["split"].nunique().max() == 1
    positives = rows[[f"label_{i}" for i in range(14)]].sum()
    assert (positives.iloc[chestxray14.FINDINGS.index("Hernia")], positives.iloc[6]) == (9, 11)
    assert pd.Series(rows["height"]).eq(64).all()
