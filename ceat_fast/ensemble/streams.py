"""Members side by side on CUDA streams of their own; autograd runs each backward on the stream of its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def run_in_streams(members: Sequence[Callable[..., Any]], rows: Sequence[Tensor]) -> list[Any]:
    """Output of each member for its input; the caller's stream waits for all of them.

    Raises:
        RuntimeError: inputs that are not on a CUDA device.
    """
    device = rows[0].device
    if device.type != "cuda":
        raise RuntimeError(f"backend='streams' needs inputs on a CUDA device, got {device}; use 'loop' or 'auto'")
    caller = torch.cuda.current_stream(device)
    outputs = []
    for member, row, stream in zip(members, rows, _streams(device, len(members)), strict=True):
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            outputs.append(member(row))
        row.record_stream(stream)
    for output, stream in zip(outputs, _streams(device, len(members)), strict=True):
        caller.wait_stream(stream)
        output.record_stream(caller)
    return outputs


@lru_cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]
