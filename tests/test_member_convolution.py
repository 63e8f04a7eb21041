"""The member-batched convolution against torch's own, in Triton's interpreter or on a GPU, and its compilation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from ceat_fast.ops import convolution, triton_backend
from ceat_fast.ops.convolution import MemberWeights, pack

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


class Problem:
    """Tensors of one convolution, and its values and gradients by torch in float64, member by member."""

    def __init__(self, members, samples, side, channels, filters, stride, dtype, point=False):
        generator = torch.Generator().manual_seed(channels + filters + stride)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        self.height, self.width = side
        self.stride, self.point = stride, point
        out = -(-side[0] // stride), -(-side[1] // stride)
        self.x = draw(members, samples, *side, channels)
        self.weight = draw(members, filters, 3, 3, channels) / (3 * channels**0.5)
        if point:
            middle = self.weight[:, :, 1, 1].clone()
            self.weight.zero_()[:, :, 1, 1] = middle
        self.bias = draw(members, filters)
        self.residual, self.grad = draw(members, samples, *out, filters), draw(members, samples, *out, filters)
        self.other, self.gate = draw(*self.x.shape), draw(*self.x.shape)

    def weights(self):
        return MemberWeights(self.weight, self.bias, self.stride, self.point)

    def sums(self, x):
        rows = zip(x, self.weight.double(), self.bias.double(), strict=True)
        outs = [
            F.conv2d(a.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), b, self.stride, padding=1).permute(0, 2, 3, 1)
            for a, w, b in rows
        ]
        return torch.stack(outs)

    def right_output(self, residual, relu):
        out = self.sums(self.x.double())
        out = out + self.residual.double() if residual else out
        return out.relu() if relu else out

    def right_gradient(self, residual, gate):
        x = self.x.double().requires_grad_()
        (grad,) = torch.autograd.grad(self.sums(x), x, self.grad.double())
        grad = grad + self.other.double() if residual else grad
        return grad * (self.gate > 0) if gate else grad


def check(problem, bound):
    weights = problem.weights()
    for residual, flag in ((True, True), (False, False), (True, False)):
        out = weights.convolve(problem.x, problem.residual if residual else None, relu=flag)
        right = problem.right_output(residual, flag)
        torch.testing.assert_close(out.double(), right, rtol=bound, atol=bound)
        others = problem.other if residual else None, problem.gate if flag else None
        grad = weights.input_gradient(problem.grad, problem.height, problem.width, *others)
        right = problem.right_gradient(residual, flag)
        torch.testing.assert_close(grad.double(), right, rtol=bound, atol=bound)


SHAPES = [
    (2, 3, (5, 6), 16, 16, 1),  # pixels do not fill the last program
    (2, 1, (7, 4), 16, 32, 2),  # an odd side under stride 2
    (1, 2, (4, 4), 32, 16, 2),
    (2, 2, (1, 1), 16, 16, 1),  # eight of nine taps lie outside
    (1, 1, (6, 5), 32, 64, 2),
]


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("point", [False, True])
def test_equals_torch_convolution(shape, point):
    check(Problem(*shape, torch.float32, point), 1e-5)


@on_kernels
def test_half_precision_accumulates_in_fp32_as_torch_convolution():
    check(Problem(1, 1, (4, 4), 64, 16, 1, torch.float16), 4e-3)


@pytest.mark.skipif(not COMPILED, reason="needs a GPU")
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("filters", [16, 32, 64])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("side", [(9, 7), (32, 32), (1, 2)], ids=str)
def test_bf16_on_cuda(channels, filters, stride, point, side):
    check(Problem(3, 5, side, channels, filters, stride, torch.bfloat16, point), 3e-2)


@on_kernels
def test_no_samples_as_torch_convolution():
    problem = Problem(2, 1, (3, 3), 16, 16, 1, torch.float32)
    assert problem.weights().convolve(problem.x[:, :0].contiguous(), relu=True).shape == (2, 0, 3, 3, 16)


def test_changed_weights_are_taken_over(monkeypatch):
    monkeypatch.setattr(convolution, "_launch", lambda x, taps, *_, **__: taps)
    problem = Problem(2, 1, (3, 3), 16, 32, 1, torch.float32)
    weights = problem.weights()
    problem.weight[1, 5, 2, 0, 3] = 7.0
    weights.refresh()
    assert weights.convolve(problem.x, relu=False)[1, 6, 3, 5] == 7.0


@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("filters", [16, 32, 64])
def test_packed_weights_are_the_operands_of_the_matrix_instruction(channels, filters):
    """One tile of 16 pixels by mma.m16n8k16 as PTX defines its operands, with the places of the CUDA kernel."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, channels, generator=generator, dtype=torch.float64)
    matrix = torch.randn(channels, filters, generator=generator, dtype=torch.float64)
    packed = pack(matrix.expand(2, 9, -1, -1))
    assert packed.shape == (2, 9, channels // 16, filters // 8, 32, 4)

    def channel(step, t, place):
        return 4 * t + place if channels == 16 else 32 * (step // 2) + 8 * t + 4 * (step % 2) + place

    def filter_of(tile, column):
        if filters == 16:
            return 4 * (column // 2) + 2 * tile + column % 2
        return 32 * (tile // 4) + 8 * (column // 2) + 2 * (tile % 4) + column % 2

    slots = {(t, place): 2 * t + place % 2 + 8 * (place // 2) for t in range(4) for place in range(4)}
    sums = torch.zeros(16, filters, dtype=torch.float64)
    for tile in range(filters // 8):
        for step in range(channels // 16):
            a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
            for (t, place), k in slots.items():
                a[:, k] = pixels[:, channel(step, t, place)]
                for column in range(8):
                    b[k, column] = packed[1, 4, step, tile, 4 * column + t, place]
            for column, product in enumerate((a @ b).T):
                sums[:, filter_of(tile, column)] += product
    torch.testing.assert_close(sums, pixels @ matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": torch.zeros(2, 16, 3, 3, 3)},
            r"channels and filters must be of \(16, 32, 64, 128\), got 3 and 16",
        ),
        ({"weights": torch.zeros(2, 16, 9, 16)}, r"weights must be \(M, F, 3, 3, C\)"),
        ({"weights": torch.zeros(2, 16, 3, 16, 3).transpose(3, 4)}, "contiguous"),
        ({"bias": torch.zeros(16)}, r"bias must be \(2, 16\), contiguous, got \(16,\)"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
    ],
)
def test_bad_weights_are_refused(change, message):
    arguments = {"weights": torch.zeros(2, 16, 3, 3, 16), "bias": torch.zeros(2, 16), "stride": 1}
    with pytest.raises(ValueError, match=message):
        MemberWeights(**arguments | change)


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (
            torch.zeros(2, 1, 4, 16),
            None,
            r"x must be \(2, B, H, W, 16\), contiguous, torch.float32, got \(2, 1, 4, 16\)",
        ),
        (torch.zeros(2, 1, 4, 4, 16).double(), None, r"got \(2, 1, 4, 4, 16\) torch.float64"),
        (torch.zeros(3, 1, 4, 4, 16), None, r"x must be \(2, B, H, W, 16\)"),
        (torch.zeros(2, 1, 4, 4, 16), torch.zeros(2, 1, 4, 2, 16), r"residual must be \(2, 1, 4, 4, 16\)"),
    ],
)
def test_bad_inputs_are_refused(x, residual, message):
    weights = MemberWeights(torch.zeros(2, 16, 3, 3, 16), torch.zeros(2, 16), 1)
    with pytest.raises(ValueError, match=message):
        weights.convolve(x, residual, relu=True)
