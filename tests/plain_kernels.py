"""The CUDA kernels' ops in plain torch on the CPU: what is built on them runs without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import chain, convolution
from ceat_fast.ops.chain import Chain
from ceat_fast.ops.convolution import pack


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> torch.library.Library:
    """Convolutions on the CPU go to these ops; until the library that is returned is destroyed."""
    library = torch.library.Library("ceat_fast", "IMPL")
    library.impl("member_chain_native", _run, "CPU")
    library.impl("member_chain_gradient_native", _run_back, "CPU")
    library.impl("member_convolution_native", _convolve_members, "CPU")
    monkeypatch.setattr(chain, "_shared_memory", lambda device: 200_000)
    monkeypatch.setattr(convolution, "_fastest", lambda weights: "cuda")
    monkeypatch.setattr(convolution, "padded_channels", lambda channels, kind: max(16, channels))
    monkeypatch.setattr(Chain, "_images", lambda self, x: 1)
    return library


def _taps(weights):
    links, members, _, channels = *weights.shape[:3], 16 * weights.shape[3]
    return weights.permute(0, 1, 2, 3, 7, 6, 8, 4, 5).reshape(links, members, 9, channels, channels)


def _convolve(x, taps):
    filters = taps.unflatten(1, (3, 3)).permute(0, 4, 3, 1, 2)
    rows = zip(x.permute(0, 1, 4, 2, 3), filters, strict=True)
    return torch.stack([F.conv2d(row, own, padding=1).permute(0, 2, 3, 1) for row, own in rows])


def _run(x, weights, bias, residual, residuals, relus, masked, images):
    before, masks = residual, []
    for number, taps in enumerate(_taps(weights)):
        sums = _convolve(x, taps) + bias[number][:, None, None, None]
        sums = sums + before if residuals >> number & 1 else sums
        before, x = x, sums.relu() if relus >> number & 1 else sums
        masks.append(sums > 0)
    return x, torch.stack(masks) if masked else x.new_empty(0)


def _run_back(grad, weights, masks, gate, residuals, relus, images):
    taps, last, after = _taps(weights).flip(2), len(weights) - 1, None
    grad = grad * masks[last] if relus >> last & 1 else grad
    for number in range(last, -1, -1):
        total = _convolve(grad, taps[number])
        total = total + after if number < last and residuals >> (number + 1) & 1 else total
        total = total * masks[number - 1] if number and relus >> (number - 1) & 1 else total
        after, grad = grad, total
    return grad if gate is None else grad * (gate > 0), after if residuals & 1 else grad.new_empty(0)


def _unpacked(weights, shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    return weights.new_empty(len(numbers.flatten())).scatter_(0, pack(numbers).flatten(), weights.flatten()).view(shape)


def _convolve_members(x, weights, bias, residual, gate, filters, height, width, direction, point, flipped, relu):
    members, channels = x.shape[0], x.shape[4]
    taps = _unpacked(weights, (members, 1 if point else 9, channels, filters))
    taps = F.pad(taps, (0, 0, 0, 0, 4, 4)) if point else taps
    kernels = taps.flip(1 if flipped else ()).unflatten(1, (3, 3)).permute(0, 4, 3, 1, 2)
    rows = []
    for row, own in zip(x.permute(0, 1, 4, 2, 3), kernels, strict=True):
        if direction == 2:
            size = x.shape[1], filters, height, width
            rows.append(torch.nn.grad.conv2d_input(size, own.transpose(0, 1), row, stride=2, padding=1))
        else:
            rows.append(F.conv2d(row, own, stride=1 + direction, padding=1))
    out = torch.stack(rows).permute(0, 1, 3, 4, 2)
    out = out if bias is None else out + bias[:, None, None, None]
    out = out if residual is None else out + residual
    out = out.relu() if relu else out
    return (out if gate is None else out * (gate > 0)).contiguous()
