"""What exists on this machine and why something is missing."""

from __future__ import annotations

from typing import Any

import torch

from ceat_fast.ops import dispatch, native


def build_info() -> dict[str, Any]:
    """Which backends exist, how they were built, and why one is missing.

    Returns:
        "backends": for each device type and backend "available" or the reason why not, and under "auto" the backend
        that `impl="auto"` takes; "cpu_isa": the instruction set of the native CPU kernels ("portable", "avx2",
        "avx512", "avx512_bf16") or None; "build": compiler, CUDA compiler and architectures, and the torch versions of
        the native parts, or the reason why there are none.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    backends = {
        device: {
            **{name: dispatch.missing(name, device) or "available" for name in dispatch.BACKENDS},
            "auto": dispatch.backend_name("auto", device),
        }
        for device in devices
    }
    if "cuda" not in backends:
        backends["cuda"] = {"native": native.missing("cuda") or "available, but there is no GPU"}
    return {
        "backends": backends,
        "cpu_isa": native.cpu_isa(),
        "build": native.build_record() or native.missing("cpu"),
    }
