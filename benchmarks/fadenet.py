"""Time, memory and FLOPs of FadeNet and its layers, against the published algorithm, plain attention and timm's ViT.

    python benchmarks/fadenet.py                    every table, on CUDA if available, else on the CPU (10 minutes)
    python benchmarks/fadenet.py layer memory       some of: layer, rules, memory, growth, network, flops

Times are medians of interleaved rounds in one process; ratios are medians of the ratios of each round. Memory is the
peak of a new process minus its memory before the forward pass.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from timm.layers.config import set_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fadeformer.models import fade_attention
from fadeformer.models.factory import FadeNet
from fadeformer.models.fade_attention import FadeAttn
from fadeformer.models.heat_diffusion import DiffusionAttn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANNELS, HEADS, POWER = 768, 8, 3
GRIDS = {(14, 14): 8, (24, 24): 8, (32, 32): 2, (64, 64): 1, (10, 40): 4}  # grid: batch size
SIDES = (7, 10, 14, 16, 20, 24, 32, 40)  # sides of the grids for the settings table
MIB = 2**20


class Published(nn.Module):
    """The published layer as published: dense graph matrices, and their eigenvalues in each forward pass."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.qkv, self.proj, self.alpha = reference.qkv, reference.proj, reference.alpha
        self.heads, self.power = reference.num_heads, reference.K
        self.laplacians: dict[tuple[int, int], Tensor] = {}

    def laplacian(self, height: int, width: int, device: torch.device) -> Tensor:
        if (height, width) not in self.laplacians:
            rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in (height, width))
            positions = torch.cartesian_prod(rows, columns).reshape(-1, 2)
            adjacency = torch.exp(torch.cdist(positions, positions).square() / -2)
            self.laplacians[height, width] = torch.diag(adjacency.sum(dim=1)) - adjacency
        return self.laplacians[height, width]

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = (
            part.reshape(batch * self.heads, channels // self.heads, height * width).transpose(1, 2).contiguous()
            for part in self.qkv(x).chunk(3, dim=1)
        )  # each B heads, N, d
        attended = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(channels // self.heads), dim=-1) @ v
        laplacian = self.laplacian(height, width, x.device)
        largest = torch.linalg.eigvalsh(laplacian)[-1]
        rescaled = 2 / largest * laplacian - torch.eye(len(laplacian), device=x.device)
        diffused = v
        for _ in range(self.power):
            diffused = rescaled @ diffused
        mixed = self.alpha * attended + (1 - self.alpha) * diffused
        mixed = mixed.reshape(batch, self.heads, height * width, -1).permute(0, 1, 3, 2).reshape(x.shape)
        return self.proj(mixed)


class PlainAttention(nn.Module):
    """Self-attention with the same projections as FadeAttn, without diffusion."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = reference.qkv, reference.proj, reference.num_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = fade_attention.split_heads(fade_attention.project(self.qkv, x), 3, self.heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # B, N, heads, d
        return self.proj(attended.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2))


class Residual(nn.Module):
    """Plain attention with the normalization and residual connection of `DiffusionAttn`."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(reference.in_channels)
        self.attention = PlainAttention(reference)

    def forward(self, x: Tensor) -> Tensor:
        normalized = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.attention(normalized)


class TimmAttention(nn.Module):
    """Attention layer of timm's ViT."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.layer = timm.layers.Attention(reference.in_channels, reference.num_heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2))


class Diffusion(nn.Module):
    """`DiffusionAttn` with channels-first input (B, C, H, W), like the other layers."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.layer = DiffusionAttn(reference.in_channels, reference.num_heads, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1))


class Pooled(nn.Module):
    """FadeAttn followed by pooling, `forward_pooled`."""

    def __init__(self, reference: FadeAttn) -> None:
        super().__init__()
        self.layer = reference

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward_pooled(x)


LAYERS: dict[str, Callable[[FadeAttn], nn.Module]] = {
    "published code": Published, "FadeAttn, map": lambda layer: layer, "FadeAttn, pooled": Pooled,
    "plain attention": PlainAttention, "plain, norm + residual": Residual, "diffusion": Diffusion,
    "timm's Attention": TimmAttention,
}  # fmt: skip


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    reference = FadeAttn(CHANNELS, HEADS, POWER, dropout=0.0)
    return {name: make(reference).to(DEVICE) for name, make in LAYERS.items()}


def tokens(grid: tuple[int, int], batch: int) -> Tensor:
    """Return a random feature map in the channels-last layout of a ViT's tokens."""
    torch.manual_seed(1)
    return torch.randn(batch, *grid, CHANNELS, device=DEVICE).permute(0, 3, 1, 2)


def seconds(step: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, after one warm-up round."""
    times_by_name: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            elapsed = seconds(step)
            if i:
                times_by_name[name].append(elapsed)
    return times_by_name


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def forward(model: nn.Module, x: Tensor, precision: torch.dtype = torch.float32) -> Callable[[], object]:
    def step() -> None:
        with torch.inference_mode(), autocast(precision):
            model(x)

    return step


def forward_backward(model: nn.Module, x: Tensor, precision: torch.dtype = torch.float32) -> Callable[[], object]:
    """Forward and backward pass, with gradients of weights and input."""
    x = x.detach().requires_grad_()

    def step() -> None:
        with autocast(precision):
            y = model(x)
        y.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        x.grad = None

    return step


def autocast(precision: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32)


def rounds_for(grid: tuple[int, int], rounds: int) -> int:
    return max(3, round(rounds * min(1.0, 576 / (grid[0] * grid[1]))))


def layer_table(rounds: int) -> None:
    heading("One layer, 768 channels, 8 heads, float32: ms, and speed-up over the published algorithm")
    print(f"{'grid':>8}{'batch':>6}  {'':24}{'forward':>10}{'ratio':>8}{'fwd + bwd':>12}{'ratio':>8}")
    for grid, batch in GRIDS.items():
        models, x = layers(), tokens(grid, batch)
        count = rounds_for(grid, rounds)
        forward_times = interleaved({name: forward(model, x) for name, model in models.items()}, count)
        both_times = {} if grid == (64, 64) and DEVICE.type == "cpu" else interleaved(
            {name: forward_backward(model, x) for name, model in models.items()}, count
        )  # fmt: skip
        for name in models:
            cells = f"{median(forward_times[name]) * 1e3:10.1f}{ratio(forward_times, 'published code', name):8.2f}"
            if both_times:
                cells += f"{median(both_times[name]) * 1e3:12.1f}{ratio(both_times, 'published code', name):8.2f}"
            print(f"{grid[0]}x{grid[1]:<5}{batch:6}  {name:24}{cells}")
        if both_times:
            for baseline in ("plain attention", "plain, norm + residual", "timm's Attention"):
                print(
                    f"{'':16}diffusion / {baseline}: {ratio(both_times, 'diffusion', baseline):.3f} forward + backward"
                )
        sys.stdout.flush()


def rules_table(rounds: int) -> None:
    heading("Settings of FadeAttn, forward + backward, batch 4, ms: application of L^^K; attention weights per chunk")
    chunks = {f"2^{power}": 2**power for power in (18, 20, 22, 24)}
    print(f"{'grid':>8}{'patches':>9}{'one matrix':>14}{'separable':>14}" + "".join(f"{name:>10}" for name in chunks))
    layer = FadeAttn(CHANNELS, HEADS, POWER, dropout=0.0).to(DEVICE)
    for side in SIDES:
        x = tokens((side, side), 4)
        steps = {
            "one matrix": with_setting(forward_backward(layer, x), "MAX_PRECOMPUTED_PATCHES", 10**9),
            "separable": with_setting(forward_backward(layer, x), "MAX_PRECOMPUTED_PATCHES", 0),
            **{
                name: with_setting(forward_backward(Pooled(layer), x), "CHUNK_SIZE", count)
                for name, count in chunks.items()
            },
        }
        timings = interleaved(steps, rounds_for((side, side), rounds)).values()
        milliseconds = [median(times) * 1e3 for times in timings]
        cells = "".join(f"{value:14.1f}" for value in milliseconds[:2])
        cells += "".join(f"{value:10.1f}" for value in milliseconds[2:])
        print(f"{side:>5}x{side:<2}{side * side:9}{cells}", flush=True)


def with_setting(step: Callable[[], object], setting: str, value: int) -> Callable[[], object]:
    """Return a step that runs with another value of a constant of `fade_attention`."""

    def step_with_setting() -> None:
        original = getattr(fade_attention, setting)
        setattr(fade_attention, setting, value)
        step()
        setattr(fade_attention, setting, original)

    return step_with_setting


def measure_peak(name: str, grid: tuple[int, int], batch: int) -> float | None:
    """Return the peak memory of a layer's forward pass in MiB, without layer and input; None if it failed."""
    command = [sys.executable, __file__, "--peak", name, *map(str, (*grid, batch))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return float(process.stdout) if process.returncode == 0 else None


def measure_peak_in_process(name: str, grid: tuple[int, int], batch: int) -> float:
    model, x = layers()[name], tokens(grid, batch)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(model, x)()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    forward(model, tokens((2, 2), 1))()  # warm-up: libraries allocate memory on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    before = resident("VmRSS")
    forward(model, x)()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """Return the resident memory of this process in KiB: VmRSS is the current value, VmHWM the peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory_table() -> None:
    heading("Peak memory of the forward pass, MiB, and relative to the published algorithm")
    names = ("published code", "FadeAttn, map", "FadeAttn, pooled", "plain attention", "diffusion")
    print(f"{'grid':>8}{'batch':>6}" + "".join(f"{name:>22}" for name in names))
    for grid, batch in {**GRIDS, (128, 128): 1}.items():
        published = None if grid == (128, 128) else measure_peak(names[0], grid, batch)
        cells = [f"{'not tried' if published is None else f'{published:.0f}':>22}"]
        for name in names[1:]:
            mib = measure_peak(name, grid, batch)
            relative = f" ({mib / published:.2f})" if published and mib is not None else ""
            cells.append(f"{'failed' if mib is None else f'{mib:.0f}{relative}':>22}")
        print(f"{grid[0]}x{grid[1]:<5}{batch:6}" + "".join(cells), flush=True)


def growth_table(rounds: int) -> None:
    heading("Scaling of the forward pass with the number of patches N: fitted exponent of N, batch 1")
    sides = {"published code": (16, 24, 32, 48)}
    print(f"{'':24}{'grids':>16}{'time':>8}{'memory':>8}")
    models = layers()
    for name in ("published code", "FadeAttn, map", "FadeAttn, pooled", "plain attention", "diffusion"):
        grid_sides = sides.get(name, (32, 48, 64, 96))
        times = {
            side: interleaved({name: forward(models[name], tokens((side, side), 1))}, max(3, rounds // 4))
            for side in grid_sides
        }
        memory = {side: measure_peak(name, (side, side), 1) for side in grid_sides}
        patches = np.log([side * side for side in grid_sides])
        exponents = [
            np.polyfit(patches, np.log(values), 1)[0]
            for values in ([median(times[side][name]) for side in grid_sides], [memory[side] for side in grid_sides])
        ]
        print(
            f"{name:24}{f'{grid_sides[0]} to {grid_sides[-1]}':>16}{exponents[0]:8.2f}{exponents[1]:8.2f}", flush=True
        )


class PublishedNet(nn.Module):
    """FadeNet with the published algorithm instead of FadeAttn."""

    def __init__(self, reference: FadeNet) -> None:
        super().__init__()
        self.net, self.attn = reference, Published(reference.attn)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.classifier(self.attn(self.net.forward_features(x)).mean(dim=(2, 3)))


def network_table(rounds: int) -> None:
    batch = 8
    heading(
        f"The network on ViT-B/16, 224 pixels, batch {batch}: ms, and speed-up over the published algorithm in fp32"
    )
    torch.manual_seed(0)
    fadenet = FadeNet(11, dropout=0.0, fade_attn_params={"dropout": 0.0}, pretrained=False)
    models = {
        "published code": PublishedNet(fadenet), "FadeNet, published": fadenet,
        "FadeNet, diffusion": FadeNet(11, 0.0, {"dropout": 0.0}, pretrained=False, variant="diffusion"),
        "timm's ViT-B/16": timm.create_model("vit_base_patch16_224", num_classes=11),
    }  # fmt: skip
    x = torch.randn(batch, 3, 224, 224, device=DEVICE)
    variants = {f"{name}, {label}": (model.to(DEVICE), dtype) for name, model in models.items()
             for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}  # fmt: skip
    forward_times = interleaved(
        {name: forward(model, x, dtype) for name, (model, dtype) in variants.items()}, max(3, rounds // 3)
    )
    both_times = interleaved(
        {name: forward_backward(model, x, dtype) for name, (model, dtype) in variants.items()}, max(3, rounds // 3)
    )
    print(f"{'':28}{'forward':>10}{'ratio':>8}{'fwd + bwd':>12}{'ratio':>8}")
    for name in variants:
        cells = "".join(
            f"{median(times[name]) * 1e3:{width}.0f}{ratio(times, 'published code, fp32', name):8.2f}"
            for times, width in ((forward_times, 10), (both_times, 12))
        )
        print(f"{name:28}{cells}", flush=True)


def flops_table() -> None:
    heading("Multiply-accumulates of one image at 224 pixels, counted by torch, attention not fused")
    set_fused_attn(False)
    vit = timm.create_model("vit_base_patch16_224", num_classes=1000)
    fadenet = FadeNet(1000, pretrained=False)
    rows = {
        "timm's ViT-B/16": vit, "published code": PublishedNet(fadenet), "FadeNet, published": fadenet,
        "FadeNet, diffusion": FadeNet(1000, pretrained=False, variant="diffusion"),
        **{name: timm.create_model(name, num_classes=1000) for name in
           ("resnet18", "resnet50", "efficientnet_b0", "efficientnet_b4", "medvit_small")},
    }  # fmt: skip
    base = macs(vit)
    print(f"{'':24}{'G MAC':>9}{'of ViT-B':>10}{'M weights':>12}")
    for name, model in rows.items():
        weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{name:24}{macs(model) / 1e9:9.2f}{macs(model) / base:10.3f}{weights:12.2f}")


def macs(model: nn.Module) -> float:
    model.eval()
    with (
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 2


def heading(text: str) -> None:
    print(f"\n{text}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {
        "layer": lambda rounds: layer_table(rounds), "rules": rules_table, "memory": lambda _: memory_table(),
        "growth": growth_table, "network": network_table, "flops": lambda _: flops_table(),
    }  # fmt: skip
    parser.add_argument("tables", nargs="*", choices=[*tables, []], default=[], help="tables to print; default all")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds for small grids")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, *numbers = args.peak
        height, width, batch = map(int, numbers)
        print(measure_peak_in_process(name, (height, width), batch))
        return
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}")
    for name in args.tables or tables:
        tables[name](args.rounds)


if __name__ == "__main__":
    main()
