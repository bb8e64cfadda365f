"""What is counted is what a hand counts, of the published model the published numbers where they can be reproduced."""

import pytest
import torch
from torch import nn

from fadeformer.models import complexity
from fadeformer.models.complexity import META_DEVICE

PUBLISHED_FADE = {
    "variant": "published", "after_blocks": ["last"], "num_heads": 8, "dropout": 0.1, "K": 3, "alpha": 0.5
}  # fmt: skip
VIT = "vit_base_patch16_224"


def architecture(backbone: str, fade: dict | None = None, classes: int = 11, side: int = 224) -> dict:
    return {
        "backbone": backbone, "num_classes": classes, "image_size": side, "in_chans": 3, "pretrained": False,
        "dropout": 0.5, "drop_path": 0.0, "fade": fade,
    }  # fmt: skip


def macs(*of, batch: int = 32, **options) -> float:
    described = architecture(*of, **options)
    return (
        complexity.count_flops(
            complexity.create_meta_model(described), complexity.random_images(described, batch, META_DEVICE)
        )
        / 2
    )


@pytest.mark.parametrize(
    ("backbone", "fade", "millions"),
    [(VIT, PUBLISHED_FADE, 88.17), (VIT, None, 85.81), ("resnet50", None, 23.53), ("efficientnet_b4", None, 17.57)],
)
def test_parameters_of_the_networks_compared(backbone, fade, millions):
    found = complexity.count_parameters(complexity.create_meta_model(architecture(backbone, fade)))
    assert found / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_vit_with_1000_classes_has_the_86_6_million_that_are_published_for_fadenet():
    found = complexity.count_parameters(complexity.create_meta_model(architecture(VIT, classes=1000)))
    assert found / 1e6 == pytest.approx(86.6, abs=0.05)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_counts_its_two_products(device):
    x = torch.zeros(2, 4, 10, 8, device=device)  # batch, heads, tokens, channels of a head
    assert complexity.count_flops(Attention(), x) == 2 * (2 * (2 * 4) * 10 * 10 * 8)


def test_vit_by_hand_and_as_it_is_published():
    tokens, width, blocks, batch = 197, 768, 12, 32
    embedding = 196 * (16 * 16 * 3) * width
    block = tokens * width * (3 * width + width + 2 * 4 * width)
    products = 2 * tokens * tokens * width
    found = macs(VIT)
    assert found == batch * (embedding + blocks * (block + products) + width * 11)
    assert (found - batch * blocks * products / 2) / 1e9 == pytest.approx(550.57, abs=0.01)  # half counted


def test_fadenet_beside_vit():
    assert macs(VIT, PUBLISHED_FADE) / macs(VIT) == pytest.approx(1.015, abs=5e-4)
    assert macs("deit_base_patch16_224") == macs(VIT)


def test_operations_grow_with_the_batch_and_the_mode_is_left_as_it_was():
    described = architecture("resnet18", side=32)
    model = complexity.create_meta_model(described).train()
    one, four = (
        complexity.count_flops(model, complexity.random_images(described, batch, META_DEVICE)) for batch in (1, 4)
    )
    assert four == 4 * one
    assert model.training


def test_costs_are_told_of_every_network():
    described = {name: architecture(name, side=32) for name in ("resnet18", "fadevit_nano")}
    found = complexity.measure_costs(described, batch_size=8, timed_batch_size=2, rounds=1, device=torch.device("cpu"))
    for name, cost in found.items():
        assert cost.num_parameters == complexity.count_parameters(complexity.create_meta_model(described[name]))
        assert cost.flops / 2 == macs(name, batch=8, side=32)
        assert (cost.batch_size, cost.timed_batch_size) == (8, 2)
        assert cost.peak_memory_bytes > 0
        assert cost.images_per_second > 0
