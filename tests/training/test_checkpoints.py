"""Checkpoints: atomic writes, rotation, damaged files, safe loading and a full disk."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fadeformer.errors import UserError
from fadeformer.training.checkpoints import CheckpointManager
from tests.conftest import ROOT


def some_state(number: int = 0, size: int = 10) -> dict[str, object]:
    """Return a nested state with all types that occur in a training state."""
    random = torch.Generator().manual_seed(number)
    return {
        "model": {"weight": torch.rand(size, 3, generator=random), "half": torch.rand(2, generator=random).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(number)), "exp_avg": torch.rand(size, generator=random)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        },
        "counts": torch.arange(number), "best": float("-inf"), "epoch": number, "seen": True, "name": "état",
        "history": [{"epoch": 1, "val_auc": None}],
    }  # fmt: skip


def is_equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(b) is type(a) and len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def two_checkpoints(tmp_path) -> CheckpointManager:
    """Return a manager with the checkpoints of steps 1 and 2."""
    checkpoints = CheckpointManager(tmp_path / "run", 1)
    for step in (1, 2):
        checkpoints.save(some_state(step), step)
    return checkpoints


def file_names(checkpoints: CheckpointManager) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_keeps_two_and_loads_latest(tmp_path):
    checkpoints = CheckpointManager(tmp_path, 1)
    assert checkpoints.load_latest() is None
    for number, step in enumerate((1, 9, 10, 123_456)):
        checkpoints.save(some_state(step), step)
        assert len(file_names(checkpoints)) == min(2, number + 1)
        assert is_equal(checkpoints.load_latest(), some_state(step))
    assert file_names(checkpoints) == ["step-00000010.pt", "step-00123456.pt"]
    assert is_equal(CheckpointManager(tmp_path, 1).load_latest(), some_state(123_456))  # by a new manager
    assert not is_equal(some_state(1), some_state(2))  # the comparison can fail


def test_killed_write_keeps_previous_checkpoints(two_checkpoints):
    """The process kills itself after writing the temporary file, before renaming it."""
    program = (
        "import os, signal, sys; from pathlib import Path; import torch;"
        " from fadeformer.training.checkpoints import CheckpointManager;"
        " os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL);"
        " CheckpointManager(Path(sys.argv[1]), 1).save({'step': torch.tensor(3)}, 3)"
    )
    process = subprocess.run([sys.executable, "-c", program, str(two_checkpoints.folder)], cwd=ROOT, check=False)
    assert process.returncode == -9
    assert len(file_names(two_checkpoints)) == 3
    reopened = CheckpointManager(two_checkpoints.folder, 1)
    assert file_names(reopened) == ["step-00000001.pt", "step-00000002.pt"]
    assert is_equal(reopened.load_latest(), some_state(2))


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_bit(content: bytes) -> bytes:
    """Flip one bit of a weight; torch loads such a file without an error."""
    weight = some_state(2)["model"]["weight"].numpy().tobytes()
    position = content.index(weight) + 5
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES = {
    "cut": truncate, "empty": lambda _: b"", "zeros": lambda content: bytes(len(content)), "one bit": flip_bit,
    "text": lambda _: b"no checkpoint", "end gone": lambda content: content[:-1],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_checkpoints_are_skipped_or_raise(two_checkpoints, damage):
    newest, previous = two_checkpoints.paths
    damaged = damage(newest.read_bytes())
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match=rf"{newest} is damaged .* and was skipped"):
        state = two_checkpoints.load_latest()
    assert is_equal(state, some_state(1))
    previous.write_bytes(damaged)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(
            UserError, match=rf"{two_checkpoints.folder}: none of the checkpoints can be read; remove the folder"
        ),
    ):
        two_checkpoints.load_latest()


class UnpickleMarker:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_pickled_code_is_not_run(tmp_path):
    checkpoints, marker_folder = CheckpointManager(tmp_path / "run", 1), tmp_path / "ran"
    checkpoints.save({"model": UnpickleMarker(marker_folder)}, 1)
    with pytest.raises(UserError, match="none of the checkpoints can be read"):
        checkpoints.load_latest()
    assert not marker_folder.exists()
    torch.load(checkpoints.paths[0], weights_only=False)
    assert marker_folder.exists()  # unsafe loading runs it


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from fadeformer.training.checkpoints import CheckpointManager
from fadeformer.errors import UserError

checkpoints = CheckpointManager(Path(sys.argv[1]), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
large = {"epoch": 2, "weights": torch.rand(100_000)}
for state in (large, {"epoch": 1}, large):
    try:
        checkpoints.save(state, state["epoch"])
    except UserError as error:
        print(error)
"""


def test_full_disk_error_names_previous_checkpoint(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = process.stdout.splitlines()
    previous = tmp_path / "step-00000001.pt"
    assert f"{tmp_path}: the checkpoint of step 2 could not be written (File too large)" in first
    assert "there is no checkpoint yet" in first
    assert f"the previous checkpoint, {previous}, is intact; free some disk space, then run again" in second
    assert [path.name for path in tmp_path.iterdir()] == [previous.name]
    assert CheckpointManager(tmp_path, 1).load_latest() == {"epoch": 1}


def test_is_due_after_interval(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoints = CheckpointManager(tmp_path, 2)
    assert not checkpoints.is_due()
    now += 119
    assert not checkpoints.is_due()
    now += 1
    assert checkpoints.is_due()
    checkpoints.save({}, 1)
    assert not checkpoints.is_due()
    now += 120
    assert checkpoints.is_due()
