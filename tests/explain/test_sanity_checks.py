"""Model randomization test: it must detect maps that do not depend on the network."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from fadeformer.explain.attribution import grad_cam
from fadeformer.explain.sanity_checks import available_methods, model_randomization_test, rank_correlations
from tests.explain.test_attribution import CLASSES, DIFFUSION, GRAY, assert_same_state, build_network, noise, snapshot


def brightness(model, pixels, normalization, classes):
    """Attribution method that ignores the network."""
    return pixels[..., 0].astype(np.float64)


def head_only(model, pixels, normalization, classes):
    """Attribution method that depends only on the classifier."""
    weights = model.classifier.weight.detach().numpy()[classes][:, :49].astype(np.float64)
    return weights.reshape(-1, 7, 7)


@pytest.fixture
def model():
    return build_network()


def test_map_independent_of_network_fails(model):
    results = model_randomization_test(
        model, noise(), GRAY, CLASSES, methods={"brightness": brightness, "head": head_only}
    )
    assert results["brightness"].rho == pytest.approx(1.0)
    assert results["brightness"].magnitude == pytest.approx(1.0)
    assert not results["brightness"].depends_on_weights
    assert results["head"].depends_on_weights
    assert results["head"].magnitude < 0.3


def test_limit_is_applied(model):
    methods = {"head": head_only}
    strict = model_randomization_test(model, noise(), GRAY, CLASSES, methods=methods, limit=0.0)["head"]
    assert not strict.depends_on_weights
    assert strict.limit == 0.0


@pytest.mark.parametrize("cascade", [False, True])
def test_model_and_random_state_are_unchanged(model, cascade):
    before, random = snapshot(model), torch.get_rng_state()
    model_randomization_test(model, noise(2), GRAY, CLASSES[:2], cascade=cascade)
    assert_same_state(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_results_depend_only_on_seed(model):
    inputs = model, noise(2), GRAY, CLASSES[:2]
    torch.manual_seed(1)
    first = model_randomization_test(*inputs, seed=3)
    torch.manual_seed(2)
    assert model_randomization_test(*inputs, seed=3) == first
    assert model_randomization_test(*inputs, seed=4) != first


def test_cascade_ends_with_fully_randomized_network(model):
    inputs = model, noise(2), GRAY, CLASSES[:2]
    all_at_once, cascade = (model_randomization_test(*inputs, cascade=cascade) for cascade in (False, True))
    for name, result in cascade.items():
        steps = [part for part, _ in result.steps]
        assert steps == [
            "classifier", "attn", "norm", "blocks.3", "blocks.2", "blocks.1", "blocks.0", "patch_embed",
            "direct parameters",
        ]  # fmt: skip
        assert result.steps[-1][1] == result.magnitude == all_at_once[name].magnitude
        assert all_at_once[name].steps == (("all weights", result.magnitude),)


def test_every_weight_is_shuffled(model):
    shuffled = {}

    def spy(network, pixels, normalization, classes):
        shuffled.update({name: value.clone() for name, value in network.state_dict().items()})
        return brightness(network, pixels, normalization, classes)

    model_randomization_test(model, noise(), GRAY, CLASSES, methods={"spy": spy})
    for name, weight in model.named_parameters():
        assert torch.equal(shuffled[name].flatten().sort().values, weight.flatten().sort().values)
        if weight.unique().numel() > 1:
            assert not torch.equal(shuffled[name], weight), name
    for name, buffer in model.named_buffers():
        assert torch.equal(shuffled[name], buffer)


@pytest.mark.parametrize(
    ("backbone", "fade"), [("fadevit_nano", DIFFUSION), ("fadevit_nano", None), ("resnet18", None)]
)
def test_other_networks_have_only_grad_cam(backbone, fade):
    assert available_methods(build_network(backbone, fade)) == {"grad_cam": grad_cam}


def test_constant_maps_are_left_out(model):
    methods = {"constant": lambda *_: np.zeros((5, 7, 7))}
    result = model_randomization_test(model, noise(), GRAY, CLASSES, methods=methods)["constant"]
    assert (result.rho, result.magnitude, result.depends_on_weights) == (None, None, False)
    assert (result.images, result.constant) == (0, 5)


def test_rank_correlations_use_absolute_values():
    rng = np.random.default_rng(0)
    maps, others = rng.normal(size=(2, 4, 7, 7))
    expected = [spearmanr(np.abs(a).ravel(), np.abs(b).ravel()).statistic for a, b in zip(maps, others, strict=True)]
    np.testing.assert_allclose(rank_correlations(maps, others), expected)
    np.testing.assert_allclose(rank_correlations(maps, -3 * maps), 1.0)
    others[2] = 1.0
    assert np.isnan(rank_correlations(maps, others)).tolist() == [False, False, True, False]
