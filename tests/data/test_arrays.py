"""Reading of preprocessed arrays."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.data import arrays
from fadeformer.errors import UserError
from tests.data.test_preprocess import pixels, write


@pytest.mark.parametrize("channels", [1, 3])
def test_load_split_returns_written_images_and_labels(tmp_path, channels):
    images = pixels(channels)
    metadata = write(tmp_path / "a", images, channels=channels)
    assert arrays.read_metadata(tmp_path / "a") == metadata
    for split, expected in images.items():
        loaded = arrays.load_split(tmp_path / "a", split)
        assert isinstance(loaded.images, np.memmap)
        np.testing.assert_array_equal(loaded.images, expected.reshape(*expected.shape[:3], channels))
        assert loaded.labels.tolist() == [[i % 3] for i in range(len(expected))]
        assert loaded.index["id"].tolist() == [f"{split}/{i}" for i in range(len(expected))]
        assert pd.isna(loaded.index["group"]).all()


def test_missing_array_folder_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="run `dvc repro preprocess` first"):
        arrays.read_metadata(tmp_path)
