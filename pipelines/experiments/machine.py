"""The machine that something was computed on, in words that name no host."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil


def machine() -> str:
    """The GPU, or the processor and its threads, with cores, memory and versions."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()}, {threads} threads a run"
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return f"{device}, {os.cpu_count()} cores, {memory}, torch {version('torch')}, timm {version('timm')}"


def _processor() -> str:
    """The processor's name, which only Linux has in a file; elsewhere its kind."""
    file = Path("/proc/cpuinfo")
    names = [line for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()
