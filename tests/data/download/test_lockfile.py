"""Lock file: files without a published checksum must not change after the first download."""

import json

import pytest

from fadeformer.data.download import lockfile
from fadeformer.data.download.lockfile import Pin
from fadeformer.errors import UserError

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "dataset.lock"


def test_pins_are_saved_sorted(lock):
    assert lockfile.read_pins(lock) == {}
    pins = {"b": Pin(sha256=ONE, size=1), "a": Pin(sha256=TWO, size=2, rows=0)}
    for name in pins:
        lockfile.verify_or_pin(lock, {name: pins[name]})
    lockfile.verify_or_pin(lock, pins)
    assert lockfile.read_pins(lock) == pins
    assert json.loads(lock.read_text()) == {"a": {"sha256": TWO, "size": 2, "rows": 0}, "b": {"sha256": ONE, "size": 1}}
    assert lock.read_text().index('"a"') < lock.read_text().index('"b"')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": TWO}, f"sha256 is {TWO}, but {ONE} is pinned"),
        ({"size": 11}, "size is 11, but 10 is pinned"),
        ({"rows": 4}, "rows is 4, but 3 is pinned"),
        (
            {"sha256": TWO, "size": 11, "rows": 4},
            f"sha256 is {TWO}, but {ONE} is pinned; size is 11, but 10 is pinned;",
        ),
    ],
)
def test_changed_file_raises_error(lock, changes, message):
    lockfile.verify_or_pin(lock, {"a.csv": Pin(sha256=ONE, size=10, rows=3)})
    content = lock.read_bytes()
    new = {"a.csv": Pin(**{"sha256": ONE, "size": 10, "rows": 3} | changes), "b.csv": Pin(sha256=ONE, size=1)}
    with pytest.raises(UserError) as error:
        lockfile.verify_or_pin(lock, new)
    assert str(error.value).startswith(f"a.csv: {message}")
    assert f"published a new version, delete the entry a.csv from {lock}" in str(error.value)
    assert lock.read_bytes() == content


def test_unchanged_lockfile_is_not_rewritten(lock):
    lockfile.verify_or_pin(lock, {"a.csv": Pin(sha256=ONE, size=10)})
    lock.chmod(0o400)
    inode = lock.stat().st_ino
    lockfile.verify_or_pin(lock, {"a.csv": Pin(sha256=ONE, size=10)})
    assert lock.stat().st_ino == inode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<<<<<<< ours\n{}", "Invalid JSON"),
        ("[]", "should be"),
        ('{"a.csv": {"sha256": "12", "size": 1}}', r"a\.csv\.sha256: .*match pattern"),
        (f'{{"a.csv": {{"sha256": "{ONE}", "size": "1"}}}}', r"a\.csv\.size: "),
        (f'{{"a.csv": {{"sha256": "{ONE}", "size": 1, "row": 1}}}}', r"a\.csv\.row: "),
    ],
)
def test_invalid_lockfile_raises_error(lock, text, message):
    lock.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        lockfile.read_pins(lock)
    assert str(error.value).startswith(f"{lock}: ")
    assert "restore the file from version control" in str(error.value)
