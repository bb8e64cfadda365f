"""Parts of a batch go through a network as if the whole batch did, in one process after another or in two at once."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional

from fadeformer.state import start
from fadeformer.whole_batch import WholeBatch, batch_norm, share
from tests.conftest import ROOT
from tests.test_training import RECIPE, fitted, network, results, some_images

SEED = 7


class Dropping(nn.Module):
    """All that draws, without a product of matrices, whose rounding may hang on the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Dropout2d(0.3)
        self.path = DropPath(0.4)
        self.norm = nn.LayerNorm(6)
        self.tokens = nn.Dropout(0.2)
        self.inplace = nn.Dropout(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, 6) to the same shape."""
        x = x + self.path(self.maps(x))
        x = self.tokens(self.norm(x))
        x = self.inplace(x * 1.0)
        x = functional.dropout2d(x, 0.2, self.training)
        return functional.dropout(x, p=0.1, training=self.training)


def parts_of(network: nn.Module, x: Tensor, parts: int) -> Tensor:
    """Outputs of each part, put together."""
    found = None
    for part in range(parts):
        places = share(len(x), part, parts)
        torch.manual_seed(SEED)
        with WholeBatch(places, len(x), distributed=False):
            outputs = network(x[places])
        found = outputs.new_empty((len(x), *outputs.shape[1:])) if found is None else found
        found[places] = outputs
    return found


def whole_of(network: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(SEED)
    return network(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(parts=st.integers(1, 4), more=st.integers(0, 9))
def test_what_is_dropped_is_what_the_whole_batch_drops(dtype, parts, more):
    x = torch.randn(2 * parts + more, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = Dropping().to(dtype)
    whole = whole_of(model, x)
    assert torch.equal(parts_of(model, x, parts), whole)
    assert not torch.equal(whole, model.eval()(x))  # something was dropped
    if len(x) > parts:
        assert any(not torch.equal(whole[0], image) for image in whole[1:])


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5), DropPath(0.5)]
)
def test_each_kind_of_dropout_is_that_of_the_whole_batch(layer):
    x = torch.rand(9, 8, 2, 3, 4) + 1
    x = x.flatten(2) if isinstance(layer, nn.Dropout1d) else x.flatten(3) if isinstance(layer, nn.Dropout2d) else x
    whole = whole_of(layer, x)
    assert 0 < (whole == 0).sum() < whole.numel()
    assert torch.equal(parts_of(layer, x, 3), whole)
    torch.manual_seed(SEED)
    alone = layer(x[share(9, 2, 3)])  # without it a part would drop otherwise
    assert not torch.equal(alone, whole[share(9, 2, 3)])


def test_gradients_pass_what_was_kept():
    x = torch.randn(6, 3, 4, 6)
    model = Dropping()
    gradients = []
    for forward in (whole_of, lambda model, x: parts_of(model, x, 3)):
        leaf = x.clone().requires_grad_()
        forward(model, leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_in_evaluation_nothing_changes():
    x = torch.randn(6, 3, 4, 6)
    for model in (Dropping().eval(), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()):
        with WholeBatch(share(6, 0, 2), 6, distributed=True):  # no process group is there to ask
            found = model(x[share(6, 0, 2)])
        assert torch.equal(found, model(x)[share(6, 0, 2)])


def test_a_vit_with_fade_layers_gives_the_logits_of_the_whole_batch():
    model = network(3, backbone="vit_tiny_patch16_224", dropout=0.3, drop_path=0.3)
    x = torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        whole = whole_of(model, x)
        torch.testing.assert_close(parts_of(model, x, 4), whole, rtol=1e-4, atol=1e-5)
        assert (whole - model.eval()(x)).abs().max() > 1e-2


@given(st.integers(1, 100), st.integers(1, 9), st.data())
def test_shares_partition_a_batch(count, parts, data):
    shares = [share(count, part, parts) for part in range(parts)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    place = data.draw(st.integers(0, count - 1))
    assert any({place, count - 1 - place} <= set(places.tolist()) for places in shares)
    sizes = [len(places) for places in shares]
    assert max(sizes) - min(sizes) <= 3


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4, "cutmix": 0.4}])
def test_a_step_in_four_parts_is_the_same_step(mixing):
    train, val = some_images(18, 3), some_images(9, 3, seed=1)
    recipe = replace(
        RECIPE, epochs=2, batch_size=9, optimizer="sgd", learning_rate=0.02, weight_decay=0.0, label_smoothing=0.1,
        clip=5.0,
    )  # fmt: skip
    histories, weights = [], []
    for accumulate in (1, 4):
        state = start(network(3, backbone="vit_tiny_patch16_224", dropout=0.2, drop_path=0.2), recipe)
        before = state.model.classifier.weight.detach().clone()
        changed = replace(recipe, accumulate=accumulate)
        histories.append(results(list(fitted(state, train, val, "multi-class", changed, augment=mixing))))
        weights.append(dict(state.model.named_parameters()))
        assert not torch.allclose(state.model.classifier.weight, before, atol=1e-3)
    for one, other in zip(*histories, strict=True):
        for name, value in vars(one).items():
            assert getattr(other, name) == pytest.approx(value, abs=1e-5), name
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def normalised(function, x: Tensor, channels: int, momentum: float, affine: bool) -> dict[str, Tensor | None]:
    """Output, running statistics and gradients of batch normalisation by a function."""
    random = torch.Generator().manual_seed(1)
    x = x.clone().requires_grad_()
    mean, var, weight, bias = (torch.rand(channels, generator=random) + 0.5 for _ in range(4))
    weight, bias = (weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None)
    y = function(x, mean, var, weight, bias, True, momentum, 1e-3)
    (y.float() * torch.rand(y.shape, generator=random)).square().sum().backward()
    found = {"output": y.detach(), "mean": mean, "var": var, "x": x.grad}
    return {**found, "weight": weight.grad, "bias": bias.grad} if affine else found


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("shape", [(6, 3), (2, 5), (5, 3, 7), (4, 3, 5, 6), (2, 3, 2, 3, 4)])
def test_batch_normalisation_of_one_process_is_torchs(alone, shape, momentum, affine):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2
    found, expected = (normalised(f, x, shape[1], momentum, affine) for f in (batch_norm, functional.batch_norm))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_batch_normalisation_of_bfloat16_is_torchs(alone):
    x = (3 * torch.randn(8, 3, 5, 6, generator=torch.Generator().manual_seed(0)) + 2).bfloat16()
    found, expected = (normalised(f, x, 3, 0.1, True) for f in (batch_norm, functional.batch_norm))
    assert found["output"].dtype == found["x"].dtype == torch.bfloat16
    assert found["mean"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=0.02, atol=0.02, msg=name)


def test_batch_normalisation_without_running_statistics_is_torchs(alone):
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(
        batch_norm(x, None, None, training=True), functional.batch_norm(x, None, None, training=True)
    )


def test_a_batch_normalisation_layer_is_torchs(alone):
    x, one, other = torch.randn(6, 3, 4, 4), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    expected = one(x)
    with WholeBatch(np.arange(6), 6, distributed=True):
        found = other(x)
    torch.testing.assert_close(found, expected)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    assert not torch.equal(one.running_mean, torch.zeros(3))


COUNT, PROCESSES = 7, 2
ONE_OF_TWO = """
import sys
import torch
from torch import distributed
from torch.nn import functional
from fadeformer.whole_batch import WholeBatch, share

folder, rank, processes, seed = sys.argv[1], *map(int, sys.argv[2:])
distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes)
model, x, labels = torch.load(f"{folder}/whole.pt", weights_only=False)
places = share(len(x), rank, processes)
torch.manual_seed(seed)
with WholeBatch(places, len(x), distributed=True):
    outputs = model(x[places])
(functional.cross_entropy(outputs, labels[places], reduction="sum") / len(x)).backward()
for weight in model.parameters():
    distributed.all_reduce(weight.grad)
gradients = {name: weight.grad for name, weight in model.named_parameters()}
torch.save((outputs.detach(), model.state_dict(), gradients), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_with_unequal_parts_are_the_whole_batch(tmp_path):
    """Batch normalisation of maps and of vectors, and dropout: outputs, running statistics and gradients."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(), nn.Linear(4 * 4 * 4, 5),
        nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2),
    )  # fmt: skip
    x, labels = torch.randn(COUNT, 3, 6, 6), torch.randint(0, 2, (COUNT,))
    torch.save((model, x, labels), tmp_path / "whole.pt")
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, tmp_path, str(rank), str(PROCESSES), str(SEED)], cwd=ROOT)
        for rank in range(PROCESSES)
    ]
    whole = whole_of(model, x)
    functional.cross_entropy(whole, labels).backward()
    assert [process.wait(120) for process in processes] == [0] * PROCESSES
    sizes = []
    for rank in range(PROCESSES):
        outputs, state, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        sizes.append(len(outputs))
        torch.testing.assert_close(outputs, whole[share(COUNT, rank, PROCESSES)], rtol=1e-5, atol=1e-5)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5, msg=name)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert sizes == [4, 3]
