"""Parameter and FLOP counts against hand calculations and published numbers."""

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


def count_macs(*args, batch: int = 32, **options) -> float:
    config = architecture(*args, **options)
    return (
        complexity.count_flops(
            complexity.create_meta_model(config), complexity.random_images(config, batch, META_DEVICE)
        )
        / 2
    )


@pytest.mark.parametrize(
    ("backbone", "fade", "millions"),
    [(VIT, PUBLISHED_FADE, 88.17), (VIT, None, 85.81), ("resnet50", None, 23.53), ("efficientnet_b4", None, 17.57)],
)
def test_parameter_counts(backbone, fade, millions):
    actual = complexity.count_parameters(complexity.create_meta_model(architecture(backbone, fade)))
    assert actual / 1e6 == pytest.approx(millions, abs=0.005)


def test_vit_has_parameter_count_published_for_fadenet():
    actual = complexity.count_parameters(complexity.create_meta_model(architecture(VIT, classes=1000)))
    assert actual / 1e6 == pytest.approx(86.6, abs=0.05)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_counts_two_products(device):
    x = torch.zeros(2, 4, 10, 8, device=device)  # batch, heads, tokens, channels of a head
    assert complexity.count_flops(Attention(), x) == 2 * (2 * (2 * 4) * 10 * 10 * 8)


def test_vit_macs_match_hand_calculation_and_publication():
    tokens, width, blocks, batch = 197, 768, 12, 32
    embedding = 196 * (16 * 16 * 3) * width
    block = tokens * width * (3 * width + width + 2 * 4 * width)
    products = 2 * tokens * tokens * width
    actual = count_macs(VIT)
    assert actual == batch * (embedding + blocks * (block + products) + width * 11)
    assert (actual - batch * blocks * products / 2) / 1e9 == pytest.approx(550.57, abs=0.01)  # half counted


def test_fadenet_macs_relative_to_vit():
    assert count_macs(VIT, PUBLISHED_FADE) / count_macs(VIT) == pytest.approx(1.015, abs=5e-4)
    assert count_macs("deit_base_patch16_224") == count_macs(VIT)


def test_flops_scale_with_batch_and_keep_mode():
    config = architecture("resnet18", side=32)
    model = complexity.create_meta_model(config).train()
    single, four = (
        complexity.count_flops(model, complexity.random_images(config, batch, META_DEVICE)) for batch in (1, 4)
    )
    assert four == 4 * single
    assert model.training


def test_measure_costs_of_several_models():
    architectures = {name: architecture(name, side=32) for name in ("resnet18", "fadevit_nano")}
    cpu = torch.device("cpu")
    costs = complexity.measure_costs(architectures, batch_size=8, timed_batch_size=2, rounds=1, device=cpu)
    for name, cost in costs.items():
        assert cost.num_parameters == complexity.count_parameters(complexity.create_meta_model(architectures[name]))
        assert cost.flops / 2 == count_macs(name, batch=8, side=32)
        assert (cost.batch_size, cost.timed_batch_size) == (8, 2)
        assert cost.peak_memory_bytes > 0
        assert cost.images_per_second > 0
