"""MedMNIST archives from a folder or over HTTP: always verified, never partial."""

import functools
import hashlib
import http.server
import threading

import pytest

from fadeformer.data.sources import medmnist
from fadeformer.data.sources.fetch import fetch_dataset
from fadeformer.errors import UserError


@pytest.fixture
def published(archive, monkeypatch):
    """Write breastmnist archives of two sizes, and patch their MD5 into the table."""
    folder = archive("breastmnist.npz", classes=2, channels=1, size=28).parent
    archive("breastmnist_64.npz", classes=2, channels=1, size=64)
    checksums = {
        size: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        for size, name in ((28, "breastmnist.npz"), (64, "breastmnist_64.npz"))
    }
    info = medmnist.DATASETS["breastmnist"]._replace(md5={**medmnist.DATASETS["breastmnist"].md5, **checksums})
    monkeypatch.setitem(medmnist.DATASETS, "breastmnist", info)
    return folder


@pytest.fixture
def server(published):
    """Serve the folder over HTTP; yields the URL and the requested paths."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.path = self.path.split("?")[0]
            super().do_GET()

        def log_message(self, *args):
            """Suppress the access log."""

    handler = functools.partial(Handler, directory=published)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", requested
        running.shutdown()


@pytest.fixture
def fetch(tmp_path):
    (tmp_path / "out").mkdir()
    folders = {"downloads": tmp_path / "downloads", "lock": tmp_path / "lock.json", "salt": tmp_path / "salt"}
    defaults = {
        "root": "",
        "classes": None,
        "pixel_range": "auto",
        "images": 0,
        "task": None,
        "seed": 0,
        "edition": "published",
        "archives": [],
    }

    def fetch_set(size, mirror, name="breastmnist"):
        return fetch_dataset(name=name, size=size, mirror=mirror, **defaults, **folders, destination=tmp_path / "out")

    return fetch_set


def test_fetch_from_folder(published, fetch, tmp_path):
    card = fetch(64, str(published))
    assert (tmp_path / "out" / "breastmnist_64.npz").read_bytes() == (published / "breastmnist_64.npz").read_bytes()
    assert card.counts == {"train": 546, "val": 78, "test": 156}
    assert card.classes == ("malignant", "normal, benign")


def test_fetch_over_http_uses_cache(server, fetch, tmp_path):
    address, requested = server
    fetch(28, address + "/")
    fetch(28, address)
    assert requested == ["/breastmnist.npz"]
    assert (tmp_path / "out" / "breastmnist.npz").is_file()


def test_fetch_from_published_url(server, fetch, monkeypatch):
    address, requested = server
    monkeypatch.setattr(medmnist, "BASE_URL", address)
    fetch(64, None)
    assert requested == ["/breastmnist_64.npz?download=1"]


def test_checksum_mismatch_reports_both_checksums(server, fetch, published, tmp_path):
    address, _ = server
    expected = medmnist.DATASETS["breastmnist"].md5[28]
    (published / "breastmnist.npz").write_bytes(b"something else")
    digest = hashlib.md5(b"something else", usedforsecurity=False).hexdigest()
    for mirror in (address, str(published)):
        with pytest.raises(UserError) as error:
            fetch(28, mirror)
        assert digest in str(error.value)
        assert expected in str(error.value)
    assert not list((tmp_path / "downloads").iterdir())
    assert (published / "breastmnist.npz").is_file()


def test_dataset_table_is_complete():
    assert len(medmnist.DATASETS) == 12
    images = sum(sum(info.counts) for info in medmnist.DATASETS.values())
    assert images == 707_962  # MedMNIST 3.0.2, two-dimensional sets
    sums = [md5 for info in medmnist.DATASETS.values() for md5 in info.md5.values()]
    assert len(set(sums)) == 48
    assert all(len(md5) == 32 for md5 in sums)


def test_official_file_is_accepted_rebuilt_file_rejected(real_data, fetch):
    card = fetch(28, str(real_data / "medmnist"), "retinamnist")
    assert card.task == "ordinal-regression"
    with pytest.raises(UserError, match="28209eda62fecd6e6a2d98b1501bb15f"):
        fetch(28, str(real_data / "npz"), "pneumoniamnist")
