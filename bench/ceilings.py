"""What the machine can do at most, measured in the same run as everything else."""

from __future__ import annotations

import torch
from timing import compare

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def ceilings(device: str, dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """FLOP/s of a large matrix product in each type, and bytes per second, read plus written, of a large copy."""
    kind = torch.device(device).type
    size = GEMM_SIZE[kind]
    calls = {}
    for name, dtype in dtypes.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls[name] = lambda a=a, b=b: torch.mm(a, b)
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda: target.copy_(source)
    timings = compare(calls, rounds=5, device=device)
    rates = {f"gemm_{name}_flops": 2 * size**3 / timings[name].median for name in dtypes}
    return rates | {"copy_bytes": 2 * COPY_BYTES[kind] / timings["copy"].median}
