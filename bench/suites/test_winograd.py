"""The Winograd convolutions and torch's at the widths of ResNet-20, and their rounding.

In fp32 forward and input gradient, as layers are trained; in bf16 a layer of three frozen members, as it is attacked.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import winograd
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.winograd import winograd_convolution

pytestmark = pytest.mark.skipif(winograd.missing() is not None, reason=str(winograd.missing()))
SAMPLES = 128


def direct(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("way", [direct, winograd_convolution])
@pytest.mark.parametrize(("width", "side"), [(16, 32), (32, 16), (64, 8)])
def test_winograd(benchmark, way, width, side):
    torch.manual_seed(0)
    x, outer = (torch.randn(SAMPLES, width, side, side).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(width, width, 3, 3) / (3 * width**0.5)
    weight, bias = weight.to(memory_format=torch.channels_last), torch.randn(width)
    exact = direct(x.double(), weight.double(), bias.double())
    error = way(x, weight, bias).double() - exact
    benchmark.extra_info["relative_error"] = float(error.norm() / exact.norm())
    x.requires_grad_()
    benchmark(lambda: torch.autograd.grad(way(x, weight, bias), x, outer))


@pytest.mark.parametrize("way", ["direct", "winograd"])
@pytest.mark.parametrize(("width", "side"), [(16, 32), (32, 16), (64, 8)])
def test_members_in_bf16(benchmark, way, width, side):
    torch.manual_seed(0)
    members = 3
    x = torch.randn(members, SAMPLES, side, side, width).bfloat16()
    weight = (torch.randn(members, width, 3, 3, width) / (3 * width**0.5)).bfloat16()
    images, filters = (t.permute(0, 1, 4, 2, 3) for t in (x, weight))
    last = [f.contiguous(memory_format=torch.channels_last) for f in filters]
    weights = MemberWeights(weight, torch.zeros(members, width).bfloat16(), 1)
    weights.buffers.open()

    def run():
        if way == "winograd":
            return weights.convolve(x, relu=False).permute(0, 1, 4, 2, 3)
        return [F.conv2d(image, f, padding=1) for image, f in zip(images, last, strict=True)]

    exact = F.conv2d(images[0].double(), filters[0].double(), padding=1)
    benchmark.extra_info["relative_error"] = float((run()[0].double() - exact).norm() / exact.norm())
    benchmark(run)
