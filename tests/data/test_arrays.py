"""Arrays that are mapped by everything after preprocess."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.data import arrays
from fadeformer.errors import UserError
from tests.data.test_preprocess import pixels, write


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_labels_come_back_as_they_were(tmp_path, channels):
    made = pixels(channels)
    meta = write(tmp_path / "a", made, channels=channels)
    assert arrays.read_metadata(tmp_path / "a") == meta
    for split, expected in made.items():
        found = arrays.load_split(tmp_path / "a", split)
        assert isinstance(found.images, np.memmap)
        np.testing.assert_array_equal(found.images, expected.reshape(*expected.shape[:3], channels))
        assert found.labels.tolist() == [[i % 3] for i in range(len(expected))]
        assert found.index["id"].tolist() == [f"{split}/{i}" for i in range(len(expected))]
        assert pd.isna(found.index["group"]).all()


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="run `dvc repro preprocess` first"):
        arrays.read_metadata(tmp_path)
