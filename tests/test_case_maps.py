"""Maps of the worst mistakes: as large as the image, of the class that was called, and told how far to trust them."""

import numpy as np
import pandas as pd
import pytest
import torch

from fadeformer.case_maps import case_maps
from fadeformer.models import create_model
from fadeformer.trained import Trained

FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 4, "dropout": 0.1, "K": 3, "alpha": 0.5}


def trained(folder, *, fade=FADE, backbone="fadevit_nano", head="auto", task="ordinal-regression", calibration=None):
    outputs = 4 if head == "cumulative" else 5
    network = {
        "backbone": backbone, "num_classes": outputs, "image_size": 28, "in_chans": 1, "pretrained": False,
        "dropout": 0.0, "drop_path": 0.0, "fade": fade,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.save(create_model(**network).state_dict(), folder / "weights.pth")
    described = {
        "model": network, "task": task, "head": head, "precision": "32",
        "normalise": {"mean": [0.5], "std": [0.25]}, "calibration": calibration or {"slope": [1.0], "offset": [0.0]},
    }  # fmt: skip
    return Trained(described, folder / "weights.pth", torch.device("cpu"))


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
WRONG = pd.DataFrame({"row": [3, 7], "class": [4, 0]})


def test_maps_have_the_image_s_side_and_sum_to_what_the_logits_differ_by(tmp_path):
    model = trained(tmp_path)
    found = case_maps(model, WRONG, PIXELS, np.zeros(20, np.int64), 0)
    assert list(found.maps) == ["Attention part (alpha 0.50)", "Laplacian part", "Grad-CAM"]
    assert all(of.shape == (2, 28, 28) for of in found.maps.values())
    assert found.numbers["alpha"] == pytest.approx(0.5)
    assert set(found.numbers["randomisation"]) == {"grad_cam", "attention", "laplacian"}
    assert len(found.sentences) == 5
    others = case_maps(model, WRONG.assign(**{"class": [1, 1]}), PIXELS, np.zeros(20, np.int64), 0)
    assert not np.allclose(found.maps["Attention part (alpha 0.50)"], others.maps["Attention part (alpha 0.50)"])
    again = case_maps(model, WRONG, PIXELS, np.zeros(20, np.int64), 0)
    assert again.numbers == found.numbers


def test_a_plain_backbone_has_grad_cam_alone_and_grades_tell_which_output_it_is_of(tmp_path):
    found = case_maps(trained(tmp_path, fade=None, head="cumulative"), WRONG, PIXELS, np.full(20, 4), 0)
    assert list(found.maps) == ["Grad-CAM"]
    assert found.numbers["alpha"] is None
    assert "the lowest grade from the others" in found.sentences[-1]


def test_without_mistakes_the_check_is_made_all_the_same(tmp_path):
    found = case_maps(trained(tmp_path), WRONG.iloc[:0], PIXELS, np.zeros(20, np.int64), 0)
    assert found.maps == {}
    assert set(found.numbers["randomisation"]) == {"grad_cam", "attention", "laplacian"}


def test_calibrated_scores_and_features_of_the_same_images(tmp_path):
    model = trained(tmp_path, calibration={"slope": [0.5], "offset": [0.0]})
    raw, features = model.raw_scores_and_features(PIXELS, 8)
    assert np.array_equal(raw, model.raw_scores(PIXELS, 8))
    assert features.shape == (20, model.model.num_features)
    assert not model.model.get_classifier()._forward_pre_hooks
    after = model.scores(PIXELS, 8)
    assert after == pytest.approx(np.sqrt(raw) / np.sqrt(raw).sum(axis=1, keepdims=True))
