"""Timing of alternatives side by side: one round times each in turn, so that a slow minute hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(
    candidates: dict[str, Callable[[], object]],
    rounds: int = 11,
    round_seconds: float = 0.05,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Seconds per call of each candidate: interleaved rounds of about `round_seconds` after a warm-up."""
    repeats = {name: _repeats(call, round_seconds, device) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            samples[name].append(_seconds(call, repeats[name], device) / repeats[name])
    return {name: _summary(times) for name, times in samples.items()}


def _repeats(call: Callable[[], object], round_seconds: float, device: str) -> int:
    """Warms up, with one call where calls are long."""
    first = _seconds(call, 1, device)
    if first > 1.0:
        return 1
    for _ in range(3):
        _seconds(call, 1, device)
    return max(1, round(round_seconds / max(_seconds(call, 3, device) / 3, 1e-7)))


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return Timing(median, low, high)
