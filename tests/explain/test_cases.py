"""Maps of the worst mistakes: as large as the image, of the class that was called, and told how far to trust them."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.explain.cases import explain_cases
from tests.packages import load, write_model

SMALL = {"side": 28, "channels": 1, "classes": ["a", "b", "c", "d", "e"]}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
WRONG = pd.DataFrame({"row": [3, 7], "class": [4, 0]})


def test_maps_have_the_image_s_side_and_sum_to_what_the_logits_differ_by(tmp_path):
    model = load(write_model(tmp_path, "multi-class", **SMALL))
    found = explain_cases(model, WRONG, PIXELS, np.zeros(20, np.int64), 0)
    assert list(found.maps) == ["Attention part (alpha 0.50)", "Laplacian part", "Grad-CAM"]
    assert all(of.shape == (2, 28, 28) for of in found.maps.values())
    assert found.results["alpha"] == pytest.approx(0.5)
    assert set(found.results["randomization"]) == {"grad_cam", "attention", "laplacian"}
    assert len(found.sentences) == 5
    others = explain_cases(model, WRONG.assign(**{"class": [1, 1]}), PIXELS, np.zeros(20, np.int64), 0)
    assert not np.allclose(found.maps["Attention part (alpha 0.50)"], others.maps["Attention part (alpha 0.50)"])
    again = explain_cases(model, WRONG, PIXELS, np.zeros(20, np.int64), 0)
    assert again.results == found.results


def test_a_plain_backbone_has_grad_cam_alone_and_grades_tell_which_output_it_is_of(tmp_path):
    found = explain_cases(load(write_model(tmp_path, "grades", fade=None, **SMALL)), WRONG, PIXELS, np.full(20, 4), 0)
    assert list(found.maps) == ["Grad-CAM"]
    assert found.results["alpha"] is None
    assert "the lowest grade from the others" in found.sentences[-1]


def test_without_mistakes_the_check_is_made_all_the_same(tmp_path):
    model = load(write_model(tmp_path, "multi-class", **SMALL))
    found = explain_cases(model, WRONG.iloc[:0], PIXELS, np.zeros(20, np.int64), 0)
    assert found.maps == {}
    assert set(found.results["randomization"]) == {"grad_cam", "attention", "laplacian"}
