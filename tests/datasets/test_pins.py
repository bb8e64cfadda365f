"""Files without a published checksum stay what they were when they were first verified."""

import json

import pytest
from pydantic import ValidationError

from fadeformer.datasets import pins
from fadeformer.datasets.pins import Pin
from fadeformer.errors import UserError

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "dataset.lock"


def test_there_are_none_at_first_and_then_those_that_were_set(lock):
    assert pins.read(lock) == {}
    found = {"b.csv": Pin(sha256=ONE, size=10, rows=3), "a.zip": Pin(sha256=TWO, size=20)}
    pins.compare(lock, found)
    assert not lock.exists()
    pins.pin(lock, found)
    assert pins.read(lock) == found
    pins.compare(lock, found)


def test_the_file_is_sorted_and_its_order_of_writing_does_not_matter(lock, tmp_path):
    one, two = {"b": Pin(sha256=ONE, size=1)}, {"a": Pin(sha256=TWO, size=2, rows=0)}
    for path, order in ((lock, (one, two)), (tmp_path / "other.lock", (two, one))):
        for found in order:
            pins.pin(path, found)
    assert lock.read_bytes() == (tmp_path / "other.lock").read_bytes()
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
@pytest.mark.parametrize("function", [pins.compare, pins.pin])
def test_a_file_that_differs_is_refused(lock, now, told, function):
    pins.pin(lock, {"a.csv": Pin(sha256=ONE, size=10, rows=3)})
    before = lock.read_bytes()
    new = {"a.csv": Pin(**{"sha256": ONE, "size": 10, "rows": 3} | now), "b.csv": Pin(sha256=ONE, size=1)}
    with pytest.raises(UserError) as error:
        function(lock, new)
    assert str(error.value).startswith(f"a.csv: {told}")
    assert f"really published a new file, delete the entry a.csv from {lock}" in str(error.value)
    assert lock.read_bytes() == before


def test_rows_may_be_counted_later_and_are_not_forgotten(lock):
    bare, counted = Pin(sha256=ONE, size=10), Pin(sha256=ONE, size=10, rows=3)
    for found in (bare, counted, bare):
        pins.pin(lock, {"a.csv": found})
    assert pins.read(lock) == {"a.csv": counted}


def test_nothing_new_is_not_written(lock):
    pins.pin(lock, {"a.csv": Pin(sha256=ONE, size=10)})
    lock.chmod(0o400)
    inode = lock.stat().st_ino
    pins.pin(lock, {"a.csv": Pin(sha256=ONE, size=10)})
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
        pins.read(lock)
    assert str(error.value).startswith(f"{lock}: ")
    assert "bring the file back from version control" in str(error.value)


def test_a_pin_is_of_a_sha256():
    with pytest.raises(ValidationError):
        Pin(sha256="750601b1f35ba3300ea97c75c52ff8f6", size=1)
