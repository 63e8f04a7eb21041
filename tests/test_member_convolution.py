"""The member-batched convolution against torch's own, in Triton's interpreter or on a GPU, and its compilation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.ops import triton_backend
from ceat_fast.ops.convolution import member_convolution, pack_weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and triton_backend.missing("cuda") is None
DEVICE = "cuda" if COMPILED else "cpu"
on_kernels = pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="runs in the interpreter, in a child process")


@pytest.mark.skipif(INTERPRETED or COMPILED, reason="the kernel is tested in this very process")
@pytest.mark.skipif(triton_backend.missing("cuda") == "triton is not installed", reason="triton is not installed")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "torch_convolution", __file__]
    child = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout
    assert "skipped" not in child.stdout, child.stdout


def problem(members, samples, side, channels, filters, stride, dtype):
    generator = torch.Generator().manual_seed(channels + filters + stride)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    out = -(-side[0] // stride), -(-side[1] // stride)
    return (
        draw(members, samples, *side, channels),
        draw(members, filters, channels, 3, 3) / (3 * channels**0.5),
        draw(members, filters),
        draw(members, samples, *out, filters),
    )


def expected(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, stride: int, relu: bool) -> Tensor:
    """Member by member, channels first, in float64."""
    out = torch.stack(
        [F.conv2d(a.permute(0, 3, 1, 2), w, b, stride, padding=1) for a, w, b in zip(x, weight, bias, strict=True)]
    ).permute(0, 1, 3, 4, 2)
    out = out + residual
    return out.relu() if relu else out


@on_kernels
@pytest.mark.parametrize(
    ("members", "samples", "side", "channels", "filters", "stride", "relu"),
    [
        (2, 3, (5, 6), 16, 16, 1, True),  # pixels do not fill the last program
        (2, 1, (7, 4), 16, 32, 2, True),  # an odd side under stride 2
        (1, 2, (4, 4), 32, 16, 2, False),
        (2, 2, (1, 1), 16, 16, 1, True),  # eight of nine taps lie outside
    ],
)
def test_equals_torch_convolution(members, samples, side, channels, filters, stride, relu):
    tensors = problem(members, samples, side, channels, filters, stride, torch.float32)
    x, weight, bias, residual = (t.double().requires_grad_() for t in tensors)
    right = expected(x, weight, bias, residual, stride, relu)
    upstream = torch.randn(right.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    right_grads = torch.autograd.grad(right, (x, residual), upstream.double())
    x, weight, bias, residual = tensors
    x.requires_grad_(), residual.requires_grad_()
    out = member_convolution(x, pack_weights(weight), bias, residual, stride=stride, relu=relu)
    grads = torch.autograd.grad(out, (x, residual), upstream)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    for grad, right_grad in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(grad.double(), right_grad, rtol=1e-5, atol=1e-5)


@on_kernels
def test_half_precision_accumulates_in_fp32_as_torch_convolution():
    x, weight, bias, residual = problem(1, 1, (4, 4), 64, 16, 1, torch.float16)
    out = member_convolution(x, pack_weights(weight), bias, residual)
    right = expected(x.double(), weight.double(), bias.double(), residual.double(), 1, True)
    torch.testing.assert_close(out.double(), right, rtol=2e-3, atol=2e-3)


@on_kernels
def test_without_residual_and_for_no_samples_as_torch_convolution():
    x, weight, bias, residual = problem(2, 1, (3, 3), 16, 16, 1, torch.float32)
    out = member_convolution(x, pack_weights(weight), bias)
    right = expected(x.double(), weight.double(), bias.double(), 0 * residual.double(), 1, True)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    assert member_convolution(x[:, :0], pack_weights(weight), bias).shape == (2, 0, 3, 3, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 4, 4, 3)}, r"channels and filters must be of \(16, 32, 64, 128\), got 3 and 16"),
        ({"x": torch.zeros(2, 1, 4, 16)}, r"x must be \(M, B, H, W, C\)"),
        ({"x": torch.zeros(2, 1, 4, 16, 4).transpose(3, 4)}, "contiguous"),
        ({"x": torch.zeros(2, 1, 4, 4, 16, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"x": torch.zeros(3, 1, 4, 4, 16)}, r"weight must be \(3, 9, 16, 16\)"),
        ({"weight": torch.zeros(2, 9, 16, 16, dtype=torch.float16)}, r"weight must be .*\.float32, got .*\.float16"),
        ({"weight": torch.zeros(2, 9, 16, 16, requires_grad=True)}, "must not require a gradient"),
        ({"bias": torch.zeros(16)}, r"bias must be \(2, 16\), got \(16,\)"),
        ({"residual": torch.zeros(2, 1, 4, 2, 16)}, r"residual must be \(2, 1, 4, 4, 16\)"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.zeros(2, 1, 4, 4, 16), "weight": torch.zeros(2, 9, 16, 16), "bias": torch.zeros(2, 16)}
    with pytest.raises(ValueError, match=message):
        member_convolution(**arguments | change)


def test_packed_weights_are_one_matrix_per_tap():
    weight = torch.randn(2, 5, 4, 3, 3)
    packed = pack_weights(weight)
    assert packed.shape == (2, 9, 4, 5)
    assert packed[1, 5, 3, 2] == weight[1, 2, 3, 1, 2]
