"""Archives in MedMNIST's layout, made for tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

COUNTS = {"train": 60, "val": 20, "test": 30}


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """Writes an archive of random images; arrays given by name replace those it would have."""

    def make(name: str = "scans.npz", *, classes: int = 3, channels: int = 3, size: int = 16, **arrays: object) -> Path:
        random = np.random.default_rng(0)
        shape = (size, size, 3) if channels == 3 else (size, size)
        made: dict[str, object] = {}
        for split, count in COUNTS.items():
            made[f"{split}_images"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            made[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
        made |= arrays
        path = tmp_path / name
        np.savez_compressed(path, **{key: value for key, value in made.items() if value is not None})
        return path

    return make
