"""MedMNIST's archives: from a folder or over HTTP, always verified, never left in part."""

import functools
import hashlib
import http.server
import threading

import pytest

from fadeformer.data.sources import medmnist, registry
from fadeformer.errors import UserError


@pytest.fixture
def published(archive, monkeypatch):
    """A folder with breastmnist at two sizes, whose MD5 the table is made to expect."""
    folder = archive("breastmnist.npz", classes=2, channels=1, size=28).parent
    archive("breastmnist_64.npz", classes=2, channels=1, size=64)
    sums = {
        size: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        for size, name in ((28, "breastmnist.npz"), (64, "breastmnist_64.npz"))
    }
    facts = medmnist.DATASETS["breastmnist"]._replace(md5={**medmnist.DATASETS["breastmnist"].md5, **sums})
    monkeypatch.setitem(medmnist.DATASETS, "breastmnist", facts)
    return folder


@pytest.fixture
def server(published):
    """The same folder over HTTP; yields its address and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.path = self.path.split("?")[0]
            super().do_GET()

        def log_message(self, *args):
            """Says nothing."""

    handler = functools.partial(Handler, directory=published)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


@pytest.fixture
def fetch(tmp_path):
    (tmp_path / "out").mkdir()
    kept = {"downloads": tmp_path / "downloads", "lock": tmp_path / "lock.json", "salt": tmp_path / "salt"}
    own = {"root": "", "classes": None, "images": 0, "task": None, "seed": 0, "edition": "published", "archives": []}

    def bring(size, mirror, name="breastmnist"):
        return registry.fetch_dataset(name=name, size=size, mirror=mirror, **own, **kept, destination=tmp_path / "out")

    return bring


def test_from_a_folder(published, fetch, tmp_path):
    facts = fetch(64, str(published))
    assert (tmp_path / "out" / "breastmnist_64.npz").read_bytes() == (published / "breastmnist_64.npz").read_bytes()
    assert facts.counts == {"train": 546, "val": 78, "test": 156}
    assert facts.classes == ("malignant", "normal, benign")


def test_over_http_and_only_once(server, fetch, tmp_path):
    address, asked = server
    fetch(28, address + "/")
    fetch(28, address)
    assert asked == ["/breastmnist.npz"]
    assert (tmp_path / "out" / "breastmnist.npz").is_file()


def test_from_the_published_address(server, fetch, monkeypatch):
    address, asked = server
    monkeypatch.setattr(medmnist, "BASE_URL", address)
    fetch(64, None)
    assert asked == ["/breastmnist_64.npz?download=1"]


def test_a_wrong_checksum_stops_with_both_sums(server, fetch, published, tmp_path):
    address, _ = server
    expected = medmnist.DATASETS["breastmnist"].md5[28]
    (published / "breastmnist.npz").write_bytes(b"something else")
    found = hashlib.md5(b"something else", usedforsecurity=False).hexdigest()
    for mirror in (address, str(published)):
        with pytest.raises(UserError) as error:
            fetch(28, mirror)
        assert found in str(error.value)
        assert expected in str(error.value)
    assert not list((tmp_path / "downloads").iterdir())
    assert (published / "breastmnist.npz").is_file()


def test_the_table_is_complete():
    assert len(medmnist.DATASETS) == 12
    images = sum(sum(facts.counts) for facts in medmnist.DATASETS.values())
    assert images == 707_962  # MedMNIST 3.0.2, two-dimensional sets
    sums = [md5 for facts in medmnist.DATASETS.values() for md5 in facts.md5.values()]
    assert len(set(sums)) == 48
    assert all(len(md5) == 32 for md5 in sums)


def test_the_official_retinamnist_is_taken_and_a_rebuilt_file_is_not(real_data, fetch):
    facts = fetch(28, str(real_data / "medmnist"), "retinamnist")
    assert facts.task == "ordinal-regression"
    with pytest.raises(UserError, match="28209eda62fecd6e6a2d98b1501bb15f"):
        fetch(28, str(real_data / "npz"), "pneumoniamnist")
