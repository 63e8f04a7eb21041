"""Benchmarks of single operations: `pytest bench/suites` (pytest-benchmark saves and compares runs)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@pytest.fixture
def timed(benchmark, device):
    """Times a call, the work on the GPU included."""

    def run(call):
        def whole():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark(whole)

    return run
