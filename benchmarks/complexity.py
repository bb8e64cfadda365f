"""Computational cost of FadeNet and its baselines at 224 pixels, as Markdown, next to the published table.

    python benchmarks/complexity.py [--timed 4] [--rounds 5]

MACs and memory are for 32 images, as published; MACs are counted on the meta device. On a CPU fewer images are timed at
once, or a round would take a minute.
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
# G "FLOPs" of FadeFormer's published README, and how they were counted
PUBLISHED = {
    "FadeNet": (
        569.16,
        "MACs of the published algorithm, with only one of attention's two products; published with 86.6 M parameters,"
        " which are those of a ViT-B with 1000 classes",
    ),
    "ViT-B/16": (550.57, "MACs, with only one of attention's two products"),
    "ResNet-50": (130.40, "MACs"),
    "EfficientNet-B4": (18.50, "could not be reproduced with any batch or image size"),
}  # fmt: skip


def architecture(backbone: str, fade: dict | None, classes: int = CLASSES, side: int = SIDE) -> dict:
    return {
        "backbone": backbone, "num_classes": classes, "image_size": side, "in_chans": 3, "pretrained": False,
        "dropout": 0.5, "drop_path": 0.0, "fade": fade,
    }  # fmt: skip


def published_macs() -> float:
    """Count FadeNet's MACs with the published algorithm: the full output map, and K products with the Laplacian."""
    with complexity.META_DEVICE:
        network = PublishedNet(complexity.create_meta_model(architecture(*NETWORKS["FadeNet"])))
    return (
        complexity.count_flops(network, complexity.random_images(architecture("", None), BATCH, complexity.META_DEVICE))
        / 2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--timed", type=int, default=None, help="images of a timed batch; default 4 on a CPU, 32 on CUDA"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved timing rounds")
    parser.add_argument(
        "--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="models to measure; default all"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a batch for MACs and memory")
    args = parser.parse_args()
    device = choose_device("auto")
    timed = args.timed or (BATCH if device.type == "cuda" else 4)
    architectures = {name: architecture(*NETWORKS[name]) for name in args.networks}
    costs = complexity.measure_costs(
        architectures, batch_size=args.batch, timed_batch_size=timed, rounds=args.rounds, device=device
    )
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}; {SIDE} pixels, {CLASSES} classes, forward, float32\n")
    headings = f"G MACs, batch {args.batch} | G FLOPs | memory, MiB, batch {args.batch}"
    print(f'| | M parameters | {headings} | images/s, batch {timed} | published G "FLOPs" | how it was counted |')
    print("| --- " * 8 + "|")
    for name, cost in costs.items():
        published, reason = PUBLISHED.get(name, (None, ""))
        print(
            f"| {name} | {cost.num_parameters / 1e6:.2f} | {cost.flops / 2e9:.2f} | {cost.flops / 1e9:.2f} |"
            f" {cost.peak_memory_bytes / 2**20:.0f} | {cost.images_per_second:.2f} | {published or ''} | {reason} |"
        )
    if {"FadeNet", "ViT-B/16"} <= costs.keys():
        vit, published = costs["ViT-B/16"].flops / 2, published_macs()
        print(
            f"\nMACs of FadeNet over ViT-B/16: {costs['FadeNet'].flops / 2 / vit:.3f}; by the published algorithm"
            f" ({published / 1e9:.2f} G at batch {BATCH}) {published / (vit * BATCH / args.batch):.3f}."
        )


if __name__ == "__main__":
    main()
