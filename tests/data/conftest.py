"""Archives in MedMNIST's layout, and datasets as the download and validate stages read them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fadeformer.config.schema import Params
from fadeformer.data import manifest
from fadeformer.data.dataset_card import DatasetCard
from fadeformer.data.manifest import Manifest
from fadeformer.data.sources.fetch import fetch_dataset

COUNTS = {"train": 60, "val": 20, "test": 30}


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    """Write an .npz archive of random images; keyword arguments replace its arrays."""

    def make(name: str = "scans.npz", *, classes: int = 3, channels: int = 3, size: int = 16, **arrays: object) -> Path:
        random = np.random.default_rng(0)
        shape = (size, size, 3) if channels == 3 else (size, size)
        contents: dict[str, object] = {}
        for split, count in COUNTS.items():
            contents[f"{split}_images"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
            contents[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
        contents |= arrays
        path = tmp_path / name
        np.savez_compressed(path, **{key: value for key, value in contents.items() if value is not None})
        return path

    return make


@pytest.fixture
def fetched(tmp_path: Path, config: Params) -> Callable[..., tuple[DatasetCard, Path]]:
    """Fetch the dataset of params.yaml, with some keys changed, into an empty folder."""

    def fetch(**changes: object) -> tuple[DatasetCard, Path]:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        files = {"downloads": tmp_path / "downloads", "lock": tmp_path / "dataset.lock", "salt": tmp_path / "salt"}
        return fetch_dataset(**{**config.dataset.model_dump(), **changes}, **files, destination=folder), folder

    return fetch


def scene(seed: int, side: int = 48) -> np.ndarray:
    """Smooth RGB image, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def build_default_manifest(card: DatasetCard, folder: Path, split_folder: Path, **changes: object) -> Manifest:
    """Build the manifest with the settings of params.yaml."""
    settings = {
        "near_duplicate_similarity": 0.98, "resplit": False, "fractions": [0.7, 0.1, 0.2], "seed": 0,
        "split_file": None, "split_folder": split_folder,
    }  # fmt: skip
    return manifest.build_manifest(card, folder, **{**settings, **changes})
