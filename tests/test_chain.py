"""Chains of convolutions: the kernel emulated on the host or on a GPU, and how networks are cut into chains."""

from __future__ import annotations

import pytest
import torch
from emulated import bf16_tensor, build_emulator, emulate
from plain_kernels import use_plain_kernels
from torch import nn
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.ensemble import chains, frozen
from ceat_fast.ensemble.member_layers import Convolution
from ceat_fast.models import build_model
from ceat_fast.ops import chain, native
from ceat_fast.ops.chain import Chain, Link
from ceat_fast.ops.convolution import MemberWeights

BF16 = torch.bfloat16
on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or native.missing("cuda") is not None, reason="needs a GPU and the CUDA library"
)


class Problem:
    """A chain, its input and the gradient of its output, with values by torch in float64, rounded after each link."""

    def __init__(self, channels, side, members, samples, count, outside=False, relus=None):
        generator = torch.Generator().manual_seed(channels + count)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(BF16)

        size = members, samples, *side, channels
        self.x, self.grad, self.gate = draw(*size), draw(*size), draw(*size)
        self.residual = draw(*size) if outside else None
        self.taps = [(draw(members, 9, channels, channels) / (3 * channels**0.5)) for _ in range(count)]
        self.bias = [draw(members, channels) for _ in range(count)]
        self.residuals = [number % 2 == (0 if outside else 1) for number in range(count)]
        self.relus = relus or [True] * count
        self.values = self._values()

    def _values(self):
        values = [self.x]
        for number in range(len(self.taps)):
            sums = convolve(values[-1], self.taps[number]) + self.bias[number].double()[:, None, None, None]
            if self.residuals[number]:
                sums = sums + (values[number - 1] if number else self.residual).double()
            values.append((sums.relu() if self.relus[number] else sums).float().to(BF16))
        return values

    def right_gradients(self):
        """(that for x behind the gate, that for the residual from outside)"""
        count = len(self.taps)
        sums = [None] * count  # gradients of the links' sums, before their ReLUs
        total = self.grad.double()
        for number in reversed(range(count)):
            passed = self.values[number + 1] > 0 if self.relus[number] else torch.ones_like(total, dtype=torch.bool)
            sums[number] = (total * passed).float().to(BF16)
            total = convolve(sums[number], self.taps[number].flip(1).transpose(2, 3))
            if number + 1 < count and self.residuals[number + 1]:
                total = total + sums[number + 1].double()
        return (total * (self.gate > 0)).float().to(BF16), sums[0]


def convolve(x, taps):
    filters = taps.double().unflatten(1, (3, 3)).permute(0, 4, 3, 1, 2)
    rows = zip(x.double().permute(0, 1, 4, 2, 3), filters, strict=True)
    return torch.stack([F.conv2d(row, own, padding=1).permute(0, 2, 3, 1) for row, own in rows])


def close(got, right):
    """A sum near 0 may fall on the other side of a ReLU, and with it a few gradients: few may differ, and no norm."""
    got, right = got.double(), right.double()
    differs = (got - right).abs() > 0.02 * right.abs().max() + 0.02 * right.abs()
    assert differs.double().mean() < 1e-3
    assert (got - right).norm() < 0.01 * right.norm()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return build_emulator("chain", tmp_path_factory.mktemp("simt"))


def run_emulated(program, x, links, *, images, threads, turned=False, residual=None, gate=None, gated_by=-1, masks=b""):
    """(out, before_last, masks) of the kernel; links: (taps, bias, mask, residual, relu, gated)."""
    members, samples, height, width, channels = x.shape
    flags = residual is not None, gate is not None, turned, True, turned
    numbers = [channels, members, samples, height, width, images, threads, len(links), len(links), gated_by, *flags]
    tensors = [x, residual, gate]
    for taps, bias, *settings in links:
        numbers += [*settings, bias is not None]
        tensors += [chain._by_lane(taps), bias]
    found = emulate(program, numbers, [*tensors, masks])
    count = 2 * x.numel()
    outputs = [bf16_tensor(found[i * count :], x.shape) for i in range(1 + turned)]
    return *outputs, found[count * (1 + turned) :]


@pytest.mark.parametrize(
    ("channels", "side", "members", "samples", "count", "images", "threads", "outside"),
    [
        (16, (8, 8), 2, 3, 3, 2, 64, False),  # the last block has one image
        (16, (16, 32), 1, 2, 3, 1, 64, True),  # two strips of columns, two of rows
        (32, (8, 16), 2, 1, 2, 1, 128, False),
        (32, (24, 8), 1, 2, 4, 2, 96, False),
        (64, (8, 8), 1, 3, 2, 3, 384, True),
    ],
)
def test_emulated_kernel(emulator, channels, side, members, samples, count, images, threads, outside):
    problem = Problem(channels, side, members, samples, count, outside)
    settings = {"images": images, "threads": threads}
    tasks = side[0] // 8 * max(1, side[1] // 16) * (channels // 16)
    masks = bytes(members * samples * count * tasks * 32 * (4 if side[1] == 8 else 8))
    links = [(problem.taps[i], problem.bias[i], i, problem.residuals[i], problem.relus[i], False) for i in range(count)]
    out, masks = run_emulated(emulator, problem.x, links, residual=problem.residual, masks=masks, **settings)
    close(out, problem.values[-1])
    back = [
        (problem.taps[i].transpose(2, 3), None, max(i - 1, 0), i + 1 < count and problem.residuals[i + 1], False, i > 0)
        for i in reversed(range(count))
    ]
    grad, for_residual, _ = run_emulated(
        emulator, problem.grad, back, turned=True, gate=problem.gate, gated_by=count - 1, masks=masks, **settings
    )
    right, right_for_residual = problem.right_gradients()
    close(grad, right)
    close(for_residual, right_for_residual)


@on_cuda
@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("side", [(8, 8), (24, 8), (16, 16), (8, 32), (32, 32)], ids=str)
@pytest.mark.parametrize(("members", "samples", "outside"), [(1, 1, False), (3, 50, True), (2, 401, False)])
def test_on_cuda(channels, side, members, samples, outside):
    problem = Problem(channels, side, members, samples, 3, outside, [True, False, True])
    links = []
    for number, (taps, bias) in enumerate(zip(problem.taps, problem.bias, strict=True)):
        weight = taps.unflatten(1, (3, 3)).permute(0, 4, 1, 2, 3).contiguous().cuda()
        weights = MemberWeights(weight, bias.cuda(), 1)
        if not chain.can_be_link(weights, *side):
            pytest.skip("does not fit into shared memory")
        links.append(Link(weights, problem.residuals[number], problem.relus[number]))
    ours = Chain(links)
    residual = None if problem.residual is None else problem.residual.cuda()
    out, masks = ours.run(problem.x.cuda(), residual, masked=True)
    close(out.cpu(), problem.values[-1])
    assert torch.equal(ours.run(problem.x.cuda(), residual, masked=False)[0], out)
    grad, for_residual = ours.input_gradient(problem.grad.cuda(), masks, problem.gate.cuda())
    right, right_for_residual = problem.right_gradients()
    close(grad.cpu(), right)
    if outside:
        close(for_residual.cpu(), right_for_residual)


# How networks are cut into chains, with the ops in plain torch.


@pytest.fixture
def plain_kernels(monkeypatch):
    library = use_plain_kernels(monkeypatch)
    yield
    library._destroy()


class Crossed(nn.Module):
    """Residuals from further away than a chain keeps them, an output that is used twice, a convolution without ReLU."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(16 if i else 3, 16, 3, padding=1) for i in range(7))
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        a = torch.relu(self.layers[0](x))
        b = self.layers[1](a)
        c = torch.relu(self.layers[2](b) + a)
        d = torch.relu(self.layers[3](c))
        e = self.layers[4](d) + a
        f = self.layers[6](torch.relu(self.layers[5](torch.relu(e))))
        return self.last((f + c).mean((2, 3)))


@pytest.mark.skipif(native.missing("cpu") is not None, reason=f"no native kernels: {native.missing('cpu')}")
@pytest.mark.parametrize(
    ("build", "side", "lengths"),
    [
        (lambda: build_model("resnet20", 10, 3), (32, 32), [7, 5, 5]),
        (Crossed, (16, 8), [1, 2, 1, 2, 1]),
    ],
)
def test_networks_in_chains(plain_kernels, build, side, lengths):
    torch.manual_seed(0)
    members = [build().eval() for _ in range(2)]
    for module in (module for member in members for module in member.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ensemble = Ensemble(members, "fused")
    for size in (side, (8, 24), side):  # chains are made for the first
        x = torch.rand(2, 3, *size, requires_grad=True)
        with frozen(ensemble) as view:
            plain = torch.stack([member(x) for member in members])
            ours = view.member_logits(x)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
            grads = [torch.autograd.grad(logits.logsumexp(-1).sum() + logits[0].sum(), x) for logits in (ours, plain)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[1][0].abs().max().item())
        with torch.no_grad():
            for parameter in ensemble.parameters():
                parameter.mul_(1.1)
    ((_, fused),) = view._fused
    found = [step for step in fused.program._chained if isinstance(step, chains.MemberChain)]
    assert [len(step.convolutions) for step in found] == lengths
    assert not any(step.layer.is_tied for step in fused.program.steps if isinstance(step, Convolution))
