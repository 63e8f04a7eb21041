"""A 3x3 convolution with bias, residual and ReLU of all members and its input gradient, at the widths of ResNet-20."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import convolution
from ceat_fast.ops.convolution import MemberWeights

MEMBERS, SAMPLES = 3, 128


def one_by_one(x, weight, bias, residual):
    """Each member's by torch, on views in channels_last."""
    images, skips, filters = (t.permute(0, 1, 4, 2, 3) for t in (x, residual, weight))

    def call():
        point = images.detach().requires_grad_()
        outs = [
            F.relu(F.conv2d(i, w, b, padding=1) + s) for i, w, b, s in zip(point, filters, bias, skips, strict=True)
        ]
        torch.autograd.grad([out.sum() for out in outs], point)

    return call


def grouped(x, weight, bias, residual):
    """One grouped convolution by torch."""
    members, samples, *size, _ = x.shape
    images, skips = (t.permute(1, 0, 4, 2, 3).reshape(samples, -1, *size) for t in (x, residual))
    filters = weight.permute(0, 1, 4, 2, 3).flatten(0, 1)

    def call():
        point = images.detach().requires_grad_()
        out = F.relu(F.conv2d(point, filters, bias.flatten(), padding=1, groups=members) + skips)
        torch.autograd.grad(out.sum(), point)

    return call


def ours(x, weight, bias, residual):
    weights = MemberWeights(weight, bias, 1)

    def call():
        out = weights.convolve(x, residual, relu=True)
        weights.input_gradient(out, *x.shape[2:4], gate=x)

    return call


@pytest.mark.parametrize("way", [one_by_one, grouped, ours])
@pytest.mark.parametrize(("width", "side"), [(16, 32), (32, 16), (64, 8)])
def test_member_convolution(timed, device, way, width, side):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if way is ours and convolution.missing(device, dtype) is not None:
        pytest.skip(str(convolution.missing(device, dtype)))
    x, residual = torch.randn(2, MEMBERS, SAMPLES, side, side, width, device=device, dtype=dtype).unbind()
    weight = torch.randn(MEMBERS, width, 3, 3, width, device=device, dtype=dtype)
    bias = torch.randn(MEMBERS, width, device=device, dtype=dtype)
    timed(way(x, weight, bias, residual))
