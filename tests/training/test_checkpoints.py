"""Checkpoints: whole or not there, the last two kept, read without running code, and a full disk is told."""

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
    """Nested, of all the types that a training's state has."""
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


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(other) is dict and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(other) is type(one) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def kept(tmp_path) -> CheckpointManager:
    """Two checkpoints, of steps 1 and 2."""
    checkpoints = CheckpointManager(tmp_path / "run", 1)
    for step in (1, 2):
        checkpoints.save(some_state(step), step)
    return checkpoints


def names(checkpoints: CheckpointManager) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    checkpoints = CheckpointManager(tmp_path, 1)
    assert checkpoints.load_latest() is None
    for number, step in enumerate((1, 9, 10, 123_456)):
        checkpoints.save(some_state(step), step)
        assert len(names(checkpoints)) == min(2, number + 1)
        assert same(checkpoints.load_latest(), some_state(step))
    assert names(checkpoints) == ["step-00000010.pt", "step-00123456.pt"]
    assert same(CheckpointManager(tmp_path, 1).load_latest(), some_state(123_456))  # by another process too
    assert not same(some_state(1), some_state(2))  # else all this would say nothing


def test_a_process_killed_while_it_writes_leaves_the_ones_before(kept):
    """A real one: killed by itself when all but the name is there."""
    program = (
        "import os, signal, sys; from pathlib import Path; import torch;"
        " from fadeformer.training.checkpoints import Checkpoints;"
        " os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL);"
        " Checkpoints(Path(sys.argv[1]), 1).save({'step': torch.tensor(3)}, 3)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(kept.folder)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert len(names(kept)) == 3
    again = CheckpointManager(kept.folder, 1)
    assert names(again) == ["step-00000001.pt", "step-00000002.pt"]
    assert same(again.load_latest(), some_state(2))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit of a weight is another: a file that torch reads without a word."""
    weight = some_state(2)["model"]["weight"].numpy().tobytes()
    place = content.index(weight) + 5
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "cut": cut, "empty": lambda _: b"", "zeros": lambda content: bytes(len(content)), "one bit": flipped,
    "text": lambda _: b"no checkpoint", "end gone": lambda content: content[:-1],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_newest_is_passed_over_and_if_none_can_be_read_this_is_told(kept, damage):
    newest, before = kept.paths
    damaged = damage(newest.read_bytes())
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match=rf"{newest} is damaged .* and was skipped"):
        found = kept.newest()
    assert same(found, some_state(1))
    before.write_bytes(damaged)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UserError, match=rf"{kept.folder}: none of the checkpoints can be read; remove the folder"),
    ):
        kept.newest()


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_file_that_would_run_code_is_refused(tmp_path):
    checkpoints, ran = CheckpointManager(tmp_path / "run", 1), tmp_path / "ran"
    checkpoints.save({"model": Marker(ran)}, 1)
    with pytest.raises(UserError, match="none of the checkpoints can be read"):
        checkpoints.load_latest()
    assert not ran.exists()
    torch.load(checkpoints.paths[0], weights_only=False)
    assert ran.exists()  # so it would have run


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


def test_a_file_that_may_not_grow_is_told_with_the_checkpoint_before(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    before = tmp_path / "step-00000001.pt"
    assert f"{tmp_path}: the checkpoint of step 2 could not be written (File too large)" in first
    assert "there is no checkpoint yet" in first
    assert f"the previous checkpoint, {before}, is intact; free some disk space, then run again" in second
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    assert CheckpointManager(tmp_path, 1).load_latest() == {"epoch": 1}


def test_a_checkpoint_is_due_when_the_last_one_is_old_enough(tmp_path, monkeypatch):
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
