"""The Winograd convolution and torch's, forward and input gradient, at the widths of ResNet-20, and their rounding."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import winograd
from ceat_fast.ops.winograd import winograd_convolution

SAMPLES = 128


def direct(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("way", [direct, winograd_convolution])
@pytest.mark.parametrize(("width", "side"), [(16, 32), (32, 16), (64, 8)])
def test_winograd(benchmark, way, width, side):
    if winograd.missing() is not None:
        pytest.skip(str(winograd.missing()))
    torch.manual_seed(0)
    x, outer = (torch.randn(SAMPLES, width, side, side).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(width, width, 3, 3) / (3 * width**0.5)
    weight, bias = weight.to(memory_format=torch.channels_last), torch.randn(width)
    exact = direct(x.double(), weight.double(), bias.double())
    error = way(x, weight, bias).double() - exact
    benchmark.extra_info["relative_error"] = float(error.norm() / exact.norm())
    x.requires_grad_()
    benchmark(lambda: torch.autograd.grad(way(x, weight, bias), x, outer))
