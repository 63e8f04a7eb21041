"""A 3x3 convolution with bias, residual and ReLU of all members and its input gradient, at the widths of ResNet-20."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import triton_backend
from ceat_fast.ops.convolution import member_convolution, pack_weights

MEMBERS, SAMPLES = 3, 128


def one_by_one(x, weight, bias, residual):
    images = x.permute(0, 1, 4, 2, 3)  # views in channels_last
    skips = residual.permute(0, 1, 4, 2, 3)
    return [F.relu(F.conv2d(i, w, b, padding=1) + s) for i, w, b, s in zip(images, weight, bias, skips, strict=True)]


def grouped(x, weight, bias, residual):
    members, samples, height, width, channels = x.shape
    images = x.permute(1, 0, 4, 2, 3).reshape(samples, members * channels, height, width)
    skips = residual.permute(1, 0, 4, 2, 3).reshape(samples, -1, height, width)
    return [F.relu(F.conv2d(images, weight.flatten(0, 1), bias.flatten(), padding=1, groups=members) + skips)]


def ours(x, weight, bias, residual):
    return [member_convolution(x, weight, bias, residual)]


@pytest.mark.parametrize("way", [one_by_one, grouped, ours])
@pytest.mark.parametrize(("width", "side"), [(16, 32), (32, 16), (64, 8)])
def test_member_convolution(timed, device, way, width, side):
    if way is ours and triton_backend.missing(device) is not None:
        pytest.skip(str(triton_backend.missing(device)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, residual = torch.randn(2, MEMBERS, SAMPLES, side, side, width, device=device, dtype=dtype).unbind()
    weight = torch.randn(MEMBERS, width, width, 3, 3, device=device, dtype=dtype)
    bias = torch.randn(MEMBERS, width, device=device, dtype=dtype)
    weight = pack_weights(weight) if way is ours else weight
    x.requires_grad_()

    def call():
        torch.autograd.grad([out.sum() for out in way(x, weight, bias, residual)], x)

    timed(call)
