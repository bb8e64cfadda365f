"""Files without a published checksum stay what they were when they were first verified."""

import json

import pytest

from fadeformer.data.download import lockfile
from fadeformer.data.download.lockfile import Pin
from fadeformer.errors import UserError

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "dataset.lock"


def test_pins_are_sorted_and_kept(lock):
    assert lockfile.read_pins(lock) == {}
    found = {"b": Pin(sha256=ONE, size=1), "a": Pin(sha256=TWO, size=2, rows=0)}
    for name in found:
        lockfile.verify_or_pin(lock, {name: found[name]})
    lockfile.verify_or_pin(lock, found)
    assert lockfile.read_pins(lock) == found
    assert json.loads(lock.read_text()) == {"a": {"sha256": TWO, "size": 2, "rows": 0}, "b": {"sha256": ONE, "size": 1}}
    assert lock.read_text().index('"a"') < lock.read_text().index('"b"')


@pytest.mark.parametrize(
    ("now", "told"),
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
def test_a_file_that_differs_is_refused(lock, now, told):
    lockfile.verify_or_pin(lock, {"a.csv": Pin(sha256=ONE, size=10, rows=3)})
    before = lock.read_bytes()
    new = {"a.csv": Pin(**{"sha256": ONE, "size": 10, "rows": 3} | now), "b.csv": Pin(sha256=ONE, size=1)}
    with pytest.raises(UserError) as error:
        lockfile.verify_or_pin(lock, new)
    assert str(error.value).startswith(f"a.csv: {told}")
    assert f"published a new version, delete the entry a.csv from {lock}" in str(error.value)
    assert lock.read_bytes() == before


def test_nothing_new_is_not_written(lock):
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
def test_a_damaged_file_of_pins_is_told(lock, text, message):
    lock.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        lockfile.read_pins(lock)
    assert str(error.value).startswith(f"{lock}: ")
    assert "restore the file from version control" in str(error.value)
