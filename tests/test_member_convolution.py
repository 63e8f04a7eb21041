"""The member-batched convolution against torch's own: on the CPU, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from emulated import bf16_tensor, build_emulator, emulate
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, run_with_isa
from torch.nn import functional as F

from ceat_fast.ops import convolution, native, triton_backend
from ceat_fast.ops.convolution import MemberWeights, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and triton_backend.missing("cuda") is None
DEVICE = "cuda" if COMPILED else "cpu"
BF16_BOUND = 0.2  # of single elements by the CPU's kernels: ten times the usual error by Winograd's transforms
on_native = pytest.mark.skipif(
    INTERPRETED or native.missing("cpu") is not None, reason=f"no native kernels: {native.missing('cpu')}"
)
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

    def __init__(self, members, samples, side, channels, filters, stride, dtype, point=False, device=DEVICE):
        generator = torch.Generator().manual_seed(channels + filters + stride)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

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

    def weights(self, kernel=None):
        return MemberWeights(self.weight, self.bias, self.stride, self.point, kernel=kernel)

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


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return build_emulator("convolution", tmp_path_factory.mktemp("simt"))


@on_native
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, (7, 9), 16, 16, 1),
        (1, 2, (6, 4), 16, 64, 1),
        (1, 1, (5, 6), 64, 16, 1),
        (2, 2, (7, 4), 16, 32, 2),
        (1, 3, (6, 9), 32, 64, 2),
        (1, 1, (4, 4), 64, 16, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("point", [False, True])
def test_emulated_cuda_kernel(emulator, monkeypatch, shape, point):
    """The convolution as MemberWeights calls it, on the kernel emulated on the host."""
    problem = Problem(*shape, torch.bfloat16, point, "cpu")

    def call(x, weights, bias, residual, gate, filters, height, width, direction, point, flipped, relu):
        members, samples, *sides, channels = x.shape
        flags = point, flipped, relu, *(tensor is not None for tensor in (bias, residual, gate))
        numbers = channels, filters, members, samples, *sides, height, width, direction, *flags
        found = emulate(emulator, numbers, [x, weights, bias, residual, gate])
        return bf16_tensor(found, (members, samples, height, width, filters))

    monkeypatch.setattr(convolution, "_convolve", call)
    monkeypatch.setattr(convolution, "padded_channels", lambda channels, kind: channels)
    check(problem, 0.04, "cuda")


def check(problem, bound, kernel=None, scaled=False):
    """With `scaled`, the bound of single elements grows with the results."""
    weights = problem.weights(kernel)
    for residual, flag in ((True, True), (False, False), (True, False)):
        out = weights.convolve(problem.x, problem.residual if residual else None, relu=flag)
        right = problem.right_output(residual, flag)
        torch.testing.assert_close(out.double(), right, rtol=bound, atol=bound * (scale_of(right) if scaled else 1))
        others = problem.other if residual else None, problem.gate if flag else None
        grad = weights.input_gradient(problem.grad, problem.height, problem.width, *others)
        right = problem.right_gradient(residual, flag)
        torch.testing.assert_close(grad.double(), right, rtol=bound, atol=bound * (scale_of(right) if scaled else 1))


def scale_of(tensor):
    """The root of its mean square, which grows with the number of filters, or 1."""
    return max(1.0, float(tensor.square().mean().sqrt())) if tensor.numel() else 1.0


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
    check(Problem(*shape, torch.float32, point), 1e-5, "triton")


@on_native
@pytest.mark.parametrize("shape", [*SHAPES, (3, 30, (13, 9), 32, 48, 1), (2, 40, (9, 11), 16, 32, 2)], ids=str)
@pytest.mark.parametrize("point", [False, True])
def test_on_the_cpu(shape, point):
    check(Problem(*shape, torch.float32, point, "cpu"), 1e-4, "cpu")


@on_native
@pytest.mark.parametrize("shape", [*SHAPES, (3, 30, (13, 9), 32, 48, 1), (2, 40, (9, 11), 16, 32, 2)], ids=str)
@pytest.mark.parametrize("point", [False, True])
def test_bf16_on_the_cpu(shape, point):
    check_bf16(Problem(*shape, torch.bfloat16, point, "cpu"))


def check_bf16(problem, share=0.02):
    """What Winograd's transforms multiply is rounded: an error of a hundredth, at single elements more."""
    check(problem, BF16_BOUND, "cpu", scaled=True)
    weights = problem.weights("cpu")
    out, right = weights.convolve(problem.x, relu=False), problem.right_output(False, False)
    assert (out - right).norm() <= share * right.norm()
    grad, right = (
        weights.input_gradient(problem.grad, problem.height, problem.width),
        problem.right_gradient(False, False),
    )
    assert (grad - right).norm() <= share * right.norm()


@on_native
@settings(max_examples=60, deadline=None)
@given(
    members=st.integers(1, 3),
    samples=st.integers(0, 5),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    channels=st.integers(1, 3),
    filters=st.integers(1, 3),
    stride=st.integers(1, 2),
    point=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size_on_the_cpu(members, samples, height, width, channels, filters, stride, point, dtype):
    shape = members, samples, (height, width), 16 * channels, 16 * filters, stride
    problem = Problem(*shape, dtype, point, "cpu")
    if dtype == torch.float32:
        check(problem, 1e-4, "cpu")
    else:
        check_bf16(problem, 0.05)  # of a few numbers the norm varies


@on_native
@pytest.mark.parametrize("inputs", [1, 3, 16, 17])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, BF16_BOUND)])
def test_channels_that_are_zeros_need_not_be_given(inputs, stride, dtype, bound):
    problem = Problem(2, 3, (9, 6), 32, 16, stride, dtype, device="cpu")
    problem.weight[..., inputs:] = 0.0
    weights = MemberWeights(problem.weight, problem.bias, stride, inputs=inputs, kernel="cpu")
    assert weights.channels_in == (inputs if dtype == torch.float32 else inputs + inputs % 2)
    x = problem.x[..., : weights.channels_in].contiguous()
    out = weights.convolve(x, problem.residual, relu=True)
    torch.testing.assert_close(out.double(), problem.right_output(True, True), rtol=bound, atol=bound)
    grad = weights.input_gradient(problem.grad, 9, 6)
    torch.testing.assert_close(grad.double(), problem.right_gradient(False, False), rtol=bound, atol=bound)


@on_native
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_passes_a_relu_on_the_cpu(stride):
    problem = Problem(1, 1, (4, 4), 16, 16, stride, torch.float32, device="cpu")
    problem.x[0, 0, 1, 1, 0] = torch.nan
    assert problem.weights("cpu").convolve(problem.x, relu=True).isnan().any()


@on_native
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_the_cpu(isa):
    code = (
        "import torch\n"
        "from test_member_convolution import Problem, check, check_bf16\n"
        "for stride in (1, 2):\n"
        "    check(Problem(2, 3, (7, 9), 32, 48, stride, torch.float32, device='cpu'), 1e-4, 'cpu')\n"
        "    check_bf16(Problem(2, 3, (7, 9), 32, 48, stride, torch.bfloat16, device='cpu'))\n"
    )
    run_with_isa(isa, code)


@on_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 1, 4, 4, 16).bfloat16()}, "x must be contiguous .* of out's type"),
        ({"x": torch.zeros(2, 1, 4, 4, 3)}, "weights must be contiguous, of out's type"),
        ({"bias": torch.zeros(16)}, "bias must be contiguous, of out's type"),
        ({"residual": torch.zeros(2, 1, 4, 4, 32)}, "residual must be contiguous, of out's type"),
        ({"gate": torch.zeros(2, 1, 4, 2, 16)}, "gate must be contiguous, of out's type"),
        ({"out": torch.zeros(2, 1, 4, 4, 24)}, "filters must be a multiple of 16, got 24"),
        ({"direction": 1}, "do not go with the direction"),
        ({"out": torch.zeros(2, 2, 4, 4, 16)}, "out must have the members and samples of x"),
        ({"out": torch.zeros(2, 1, 4, 16)}, "out must be contiguous"),
        ({"out": torch.zeros(2, 1, 4, 4, 16).half()}, "out must be float32 or bfloat16"),
        ({"weights": torch.zeros(2, 1, 9, 16, 16, 1), "direction": 3}, "direction must be 0, 1 or 2, got 3"),
        ({"out": torch.zeros(2, 1, 5, 4, 16)}, "an output of 5 x 4 does not belong to an input of 4 x 4"),
    ],
)
def test_the_native_op_refuses_what_it_would_misread(change, message):
    arguments = {
        "out": torch.ones(2, 1, 4, 4, 16),
        "x": torch.zeros(2, 1, 4, 4, 16),
        "weights": torch.zeros(2, 1, 36, 16, 16, 1),
        "bias": None,
        "residual": None,
        "gate": None,
        "direction": 0,
        "point": False,
        "flipped": False,
        "relu": False,
    }
    op = torch.ops.ceat_fast.member_convolution_into_native
    op(*arguments.values())
    assert not arguments["out"].any()
    with pytest.raises(RuntimeError, match=message):
        op(*(arguments | change).values())


@on_kernels
def test_half_precision_accumulates_in_fp32_as_torch_convolution():
    check(Problem(1, 1, (4, 4), 64, 16, 1, torch.float16), 4e-3, "triton")


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
    assert problem.weights("triton").convolve(problem.x[:, :0].contiguous(), relu=True).shape == (2, 0, 3, 3, 16)


def test_changed_weights_are_taken_over(monkeypatch):
    monkeypatch.setattr(convolution, "_launch", lambda x, taps, *_, **__: taps)
    problem = Problem(2, 1, (3, 3), 16, 32, 1, torch.float32)
    weights = problem.weights("triton")
    problem.weight[1, 5, 2, 0, 3] = 7.0
    weights.refresh()
    assert weights.convolve(problem.x, relu=False)[1, 6, 3, 5] == 7.0


@on_native
@pytest.mark.parametrize("stride", [1, 2])
def test_changed_weights_are_taken_over_on_the_cpu(stride):
    problem = Problem(2, 2, (5, 6), 16, 32, stride, torch.float32, device="cpu")
    weights = problem.weights("cpu")
    problem.weight.mul_(-2.0)
    weights.refresh()
    out = weights.convolve(problem.x, relu=False)
    torch.testing.assert_close(out.double(), problem.right_output(False, False), rtol=1e-4, atol=1e-4)
    grad = weights.input_gradient(problem.grad, 5, 6)
    torch.testing.assert_close(grad.double(), problem.right_gradient(False, False), rtol=1e-4, atol=1e-4)


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
        ({"weights": torch.zeros(2, 24, 3, 3, 16), "kernel": "cpu"}, "must be multiples of 16, got 16 and 24"),
        ({"weights": torch.zeros(2, 16, 9, 16)}, r"weights must be \(M, F, 3, 3, C\)"),
        ({"weights": torch.zeros(2, 16, 3, 16, 3).transpose(3, 4)}, "contiguous"),
        ({"bias": torch.zeros(16)}, r"bias must be \(2, 16\), contiguous, got \(16,\)"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
    ],
)
def test_bad_weights_are_refused(change, message):
    arguments = {"weights": torch.zeros(2, 16, 3, 3, 16), "bias": torch.zeros(2, 16), "stride": 1, "kernel": "triton"}
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
    weights = MemberWeights(torch.zeros(2, 16, 3, 3, 16), torch.zeros(2, 16), 1, kernel="triton")
    with pytest.raises(ValueError, match=message):
        weights.convolve(x, residual, relu=True)
    with pytest.raises(ValueError, match=message.replace("x must", "grad must")):
        weights.input_gradient(x, 4, 4, residual)
