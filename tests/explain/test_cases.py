"""Attribution maps of the most confident errors, and the sanity check that comes with them."""

import numpy as np
import pandas as pd
import pytest

from fadeformer.explain.cases import explain_cases
from tests.packages import load, write_model

SMALL = {"side": 28, "channels": 1, "classes": ["a", "b", "c", "d", "e"]}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
ERRORS = pd.DataFrame({"row": [3, 7], "class": [4, 0]})


def test_maps_have_image_size_and_depend_on_class(tmp_path):
    model = load(write_model(tmp_path, "multi-class", **SMALL))
    explanations = explain_cases(model, ERRORS, PIXELS, np.zeros(20, np.int64), 0)
    assert list(explanations.maps) == ["Attention part (alpha 0.50)", "Laplacian part", "Grad-CAM"]
    assert all(heatmap.shape == (2, 28, 28) for heatmap in explanations.maps.values())
    assert explanations.results["alpha"] == pytest.approx(0.5)
    assert set(explanations.results["randomization"]) == {"grad_cam", "attention", "laplacian"}
    assert len(explanations.sentences) == 5
    others = explain_cases(model, ERRORS.assign(**{"class": [1, 1]}), PIXELS, np.zeros(20, np.int64), 0)
    assert not np.allclose(explanations.maps["Attention part (alpha 0.50)"], others.maps["Attention part (alpha 0.50)"])
    repeated = explain_cases(model, ERRORS, PIXELS, np.zeros(20, np.int64), 0)
    assert repeated.results == explanations.results


def test_plain_backbone_with_grades_has_only_grad_cam(tmp_path):
    explanations = explain_cases(
        load(write_model(tmp_path, "grades", fade=None, **SMALL)), ERRORS, PIXELS, np.full(20, 4), 0
    )
    assert list(explanations.maps) == ["Grad-CAM"]
    assert explanations.results["alpha"] is None
    assert "the lowest grade from the others" in explanations.sentences[-1]


def test_sanity_check_runs_without_errors_to_explain(tmp_path):
    model = load(write_model(tmp_path, "multi-class", **SMALL))
    explanations = explain_cases(model, ERRORS.iloc[:0], PIXELS, np.zeros(20, np.int64), 0)
    assert explanations.maps == {}
    assert set(explanations.results["randomization"]) == {"grad_cam", "attention", "laplacian"}
