"""What FadeNet and its baselines cost at 224 pixels, as Markdown, beside the published table.

    python benchmarks/complexity.py [--timed 4] [--rounds 5]

MACs and memory are of 32 images, as published; MACs are counted on the meta device. On a CPU fewer images at once are
timed, or a round would take a minute.
"""

from __future__ import annotations

import argparse

import torch
from fadenet import PublishedNet

from fadeformer.inference.forward import choose_device
from fadeformer.models import complexity

BATCH, CLASSES, SIDE = 32, 11, 224
FADE = {"variant": "published", "after_blocks": ["last"], "num_heads": 8, "dropout": 0.1, "K": 3, "alpha": 0.5}
NETWORKS = {
    "FadeNet": ("vit_base_patch16_224", FADE), "ViT-B/16": ("vit_base_patch16_224", None),
    "ResNet-50": ("resnet50", None), "EfficientNet-B4": ("efficientnet_b4", None),
    "DeiT-B/16": ("deit_base_patch16_224", None),
}  # fmt: skip
# G "FLOPs" of FadeFormer's README, and where they come from
PUBLISHED = {
    "FadeNet": (
        569.16,
        "MACs, the products of attention half counted, of the published algorithm; published with 86.6 M parameters,"
        " those of a ViT-B with 1000 classes",
    ),
    "ViT-B/16": (550.57, "MACs, the products of attention half counted"),
    "ResNet-50": (130.40, "MACs"),
    "EfficientNet-B4": (18.50, "could not be reproduced at any batch or size tried"),
}  # fmt: skip


def architecture(backbone: str, fade: dict | None, classes: int = CLASSES, side: int = SIDE) -> dict:
    return {
        "backbone": backbone, "num_classes": classes, "image_size": side, "in_chans": 3, "pretrained": False,
        "dropout": 0.5, "drop_path": 0.0, "fade": fade,
    }  # fmt: skip


def published_macs() -> float:
    """Of FadeNet by the published algorithm, which makes the whole map and multiplies by the Laplacian K times."""
    with complexity.META_DEVICE:
        network = PublishedNet(complexity.create_meta_model(architecture(*NETWORKS["FadeNet"])))
    return (
        complexity.count_flops(network, complexity.random_images(architecture("", None), BATCH, complexity.META_DEVICE))
        / 2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timed", type=int, default=None, help="images timed at once; 4 on a CPU, 32 on CUDA")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of the clock")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="some of them")
    parser.add_argument("--batch", type=int, default=BATCH, help="images whose operations and memory are told")
    wanted = parser.parse_args()
    device = choose_device("auto")
    timed = wanted.timed or (BATCH if device.type == "cuda" else 4)
    made = {name: architecture(*NETWORKS[name]) for name in wanted.networks}
    found = complexity.measure_costs(
        made, batch_size=wanted.batch, timed_batch_size=timed, rounds=wanted.rounds, device=device
    )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}; {SIDE} pixels, {CLASSES} classes, forward, float32\n")
    counted = f"G MACs, batch {wanted.batch} | G FLOPs | memory, MiB, batch {wanted.batch}"
    print(f'| | M parameters | {counted} | images/s, batch {timed} | published G "FLOPs" | where it differs |')
    print("| --- " * 8 + "|")
    for name, cost in found.items():
        published, reason = PUBLISHED.get(name, (None, ""))
        print(
            f"| {name} | {cost.num_parameters / 1e6:.2f} | {cost.flops / 2e9:.2f} | {cost.flops / 1e9:.2f} |"
            f" {cost.peak_memory_bytes / 2**20:.0f} | {cost.images_per_second:.2f} | {published or ''} | {reason} |"
        )
    if {"FadeNet", "ViT-B/16"} <= found.keys():
        vit, whole = found["ViT-B/16"].flops / 2, published_macs()
        print(
            f"\nMACs of FadeNet over ViT-B/16: {found['FadeNet'].flops / 2 / vit:.3f}; by the published algorithm"
            f" ({whole / 1e9:.2f} G at batch {BATCH}) {whole / (vit * BATCH / wanted.batch):.3f}."
        )


if __name__ == "__main__":
    main()
