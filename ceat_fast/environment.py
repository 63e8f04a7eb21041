"""What a result depends on beyond its settings: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("ceat-fast", "torch", "torchvision", "triton", "numpy", "scikit-learn", "safetensors")


def describe_environment() -> dict[str, Any]:
    """Versions, processor, threads and GPUs, as plain JSON values."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()} {''.join(platform.libc_ver())}".rstrip(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cache_folder() -> Path:
    """Where measurements of this machine are kept: $CEAT_FAST_CACHE, or ceat_fast in the user's cache folder."""
    if folder := os.environ.get("CEAT_FAST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ceat_fast"


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def library_versions() -> dict[str, str | None]:
    """Versions of what determines speed."""
    return {name: _version(name) for name in ("ceat-fast", "torch", "triton")}


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(
            f'device {name!r} cannot be used here ({reason}); allowed: "auto", "cpu", "cuda", "cuda:1"'
        ) from error
    return device


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name and its instructions, such as "AMD EPYC (AVX512, bf16)": virtual ones share a name."""
    instructions = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        instructions.append("bf16")
    return f"{_cpu_model()} ({', '.join(instructions)})"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
