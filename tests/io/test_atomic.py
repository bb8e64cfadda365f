"""Atomic writes: files and folders appear completely, or the previous content stays."""

import pytest

from fadeformer.io.atomic import atomic_folder, atomic_write, checksum, read_json, write_json


def test_atomic_write_creates_file_on_exit(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def raise_in(manager):
    with manager as temporary:
        (temporary / "partial" if temporary.is_dir() else temporary).write_text("partial")
        raise ZeroDivisionError


def test_error_keeps_the_previous_content(tmp_path):
    path, folder = tmp_path / "a.txt", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(ZeroDivisionError):
        raise_in(atomic_write(path))
    with pytest.raises(ZeroDivisionError):
        raise_in(atomic_folder(folder))
    assert path.read_text() == "old"
    assert sorted(entry.relative_to(tmp_path).as_posix() for entry in tmp_path.rglob("*")) == [
        "a.txt",
        "folder",
        "folder/old",
    ]


def test_atomic_folder_replaces_the_old_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["new"]


def test_json_is_deterministic_and_rejects_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 0.1, "a": [None, "é"]})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "b": 0.1,\n  "a": [\n    null,\n    "é"\n  ]\n}\n'.encode()
    assert read_json(tmp_path / "a.json") == {"b": 0.1, "a": [None, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_checksum_matches_known_md5(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
