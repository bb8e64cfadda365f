"""The sanity check by random weights: it must tell maps of a network from maps that know nothing of it."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from fadeformer.explain.attribution import grad_cam
from fadeformer.explain.sanity_checks import available_methods, model_randomization_test, rank_correlations
from tests.explain.test_attribution import CLASSES, DIFFUSION, GREY, assert_same_state, network, noise, state_of


def brightness(model, pixels, normalisation, classes):
    """An explanation that never looks at the network."""
    return pixels[..., 0].astype(np.float64)


def head_only(model, pixels, normalisation, classes):
    """One that knows nothing but the classifier."""
    weights = model.classifier.weight.detach().numpy()[classes][:, :49].astype(np.float64)
    return weights.reshape(-1, 7, 7)


@pytest.fixture
def model():
    return network()


def test_a_map_that_ignores_the_network_is_found_out(model):
    told = model_randomization_test(
        model, noise(), GREY, CLASSES, methods={"brightness": brightness, "head": head_only}
    )
    assert told["brightness"].rho == pytest.approx(1.0)
    assert told["brightness"].magnitude == pytest.approx(1.0)
    assert not told["brightness"].depends_on_weights
    assert told["head"].depends_on_weights
    assert told["head"].magnitude < 0.3


def test_the_limit_decides(model):
    methods = {"head": head_only}
    strict = model_randomization_test(model, noise(), GREY, CLASSES, methods=methods, limit=0.0)["head"]
    assert not strict.depends_on_weights
    assert strict.limit == 0.0


@pytest.mark.parametrize("cascade", [False, True])
def test_the_model_and_the_random_state_stay_as_they_are(model, cascade):
    before, random = state_of(model), torch.get_rng_state()
    model_randomization_test(model, noise(2), GREY, CLASSES[:2], cascade=cascade)
    assert_same_state(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_seed_decides_alone(model):
    given = model, noise(2), GREY, CLASSES[:2]
    torch.manual_seed(1)
    one = model_randomization_test(*given, seed=3)
    torch.manual_seed(2)
    assert model_randomization_test(*given, seed=3) == one
    assert model_randomization_test(*given, seed=4) != one


def test_a_cascade_goes_from_the_classifier_down_and_ends_where_all_at_once_ends(model):
    given = model, noise(2), GREY, CLASSES[:2]
    whole, cascade = (model_randomization_test(*given, cascade=cascade) for cascade in (False, True))
    for name, told in cascade.items():
        steps = [part for part, _ in told.steps]
        assert steps == [
            "classifier", "attn", "norm", "blocks.3", "blocks.2", "blocks.1", "blocks.0", "patch_embed",
            "direct parameters",
        ]  # fmt: skip
        assert told.steps[-1][1] == told.magnitude == whole[name].magnitude
        assert whole[name].steps == (("all weights", told.magnitude),)


def test_every_weight_takes_part_and_keeps_its_values(model):
    seen = {}

    def spy(given, pixels, normalisation, classes):
        seen.update({name: value.clone() for name, value in given.state_dict().items()})
        return brightness(given, pixels, normalisation, classes)

    model_randomization_test(model, noise(), GREY, CLASSES, methods={"spy": spy})
    for name, weight in model.named_parameters():
        assert torch.equal(seen[name].flatten().sort().values, weight.flatten().sort().values)
        if weight.unique().numel() > 1:
            assert not torch.equal(seen[name], weight), name
    for name, buffer in model.named_buffers():
        assert torch.equal(seen[name], buffer)


@pytest.mark.parametrize(
    ("backbone", "fade"), [("fadevit_nano", DIFFUSION), ("fadevit_nano", None), ("resnet18", None)]
)
def test_other_networks_have_grad_cam_alone(backbone, fade):
    assert available_methods(network(backbone, fade)) == {"grad_cam": grad_cam}


def test_flat_maps_cannot_be_judged(model):
    told = model_randomization_test(model, noise(), GREY, CLASSES, methods={"flat": lambda *_: np.zeros((5, 7, 7))})[
        "flat"
    ]
    assert (told.rho, told.magnitude, told.depends_on_weights, told.images, told.constant) == (None, None, False, 0, 5)


def test_rank_correlations_are_of_absolute_values():
    rng = np.random.default_rng(0)
    maps, others = rng.normal(size=(2, 4, 7, 7))
    expected = [spearmanr(np.abs(a).ravel(), np.abs(b).ravel()).statistic for a, b in zip(maps, others, strict=True)]
    np.testing.assert_allclose(rank_correlations(maps, others), expected)
    np.testing.assert_allclose(rank_correlations(maps, -3 * maps), 1.0)
    others[2] = 1.0
    assert np.isnan(rank_correlations(maps, others)).tolist() == [False, False, True, False]
