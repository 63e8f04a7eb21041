"""The Winograd convolution against torch's in float64, and where an ensemble uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, run_with_isa
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.ensemble import convolutions, frozen
from ceat_fast.ensemble.convolutions import WinogradConvolutions
from ceat_fast.models import resnet20
from ceat_fast.ops import winograd
from ceat_fast.ops.winograd import filters_at_points, suits, winograd_convolution

pytestmark = pytest.mark.skipif(winograd.missing() is not None, reason=f"no native kernels: {winograd.missing()}")

# Rounding of F(4x4, 3x3) in fp32, relative to the outputs' scale: measured at most 3e-5 on these sizes.
CLOSE = 1e-4


def problem(samples: int, channels: int, filters: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, height, width, generator=generator)
    weight = torch.randn(filters, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    return x, weight, torch.randn(filters, generator=generator)


def direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


SIZES = [
    (2, 16, 16, 32, 32),  # the first stage of a CIFAR ResNet
    (3, 16, 32, 7, 9),  # tiles that stick out on both sides, more filters than channels
    (1, 64, 16, 13, 5),  # fewer filters, one sample
    (40, 32, 48, 4, 4),  # one tile an image; three blocks of filters
    (300, 16, 16, 1, 1),  # an image of one pixel
    (2, 16, 16, 1, 300),  # of one row
    (0, 16, 16, 8, 8),  # no sample
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients(size, with_bias):
    x, weight, bias = problem(*size)
    leaves = [x, weight, bias] if with_bias else [x, weight]
    for leaf in leaves:
        leaf.requires_grad_()
    output = winograd_convolution(x, weight, bias if with_bias else None)
    expected = direct(x, weight, bias if with_bias else None)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=CLOSE)
    if x.numel():
        last = {"memory_format": torch.channels_last}
        assert output.is_contiguous(**(last if x.is_contiguous(**last) else {}))
        outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(output, leaves, outer)
        for grad, right in zip(grads, torch.autograd.grad(expected, leaves, outer.double()), strict=True):
            torch.testing.assert_close(grad, right, rtol=0, atol=CLOSE * float(right.abs().max().clamp(min=1)))


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 5),
    channels=st.integers(1, 4),
    filters=st.integers(1, 4),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    last=st.booleans(),
)
def test_any_size_and_layout(samples, channels, filters, height, width, last):
    x, weight, bias = problem(samples, 16 * channels, 16 * filters, height, width)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    torch.testing.assert_close(
        winograd_convolution(x, weight, bias).double(), direct(x, weight, bias), rtol=0, atol=CLOSE
    )


def test_a_sample_does_not_depend_on_its_batch():
    x, weight, bias = problem(30, 16, 16, 6, 6)  # tiles of a sample lie in different blocks
    whole = winograd_convolution(x, weight, bias)
    for part in (slice(0, 1), slice(7, 8), slice(13, 30)):
        assert torch.equal(winograd_convolution(x[part], weight, bias), whole[part])


def test_padding_is_zero_and_values_pass_through():
    """The identity filter gives the input back, to the rounding, with nothing from beyond the border."""
    weight = torch.zeros(16, 16, 3, 3)
    weight[range(16), range(16), 1, 1] = 1.0
    x = torch.full((1, 16, 5, 6), 7.0)
    torch.testing.assert_close(winograd_convolution(x, weight), x, rtol=0, atol=1e-5)
    weight[range(16), range(16), 1, 1], weight[range(16), range(16), 0, 1] = 0.0, 1.0  # the pixel above
    shifted = winograd_convolution(x, weight)
    assert shifted[:, :, 0].abs().max() < 1e-5
    torch.testing.assert_close(shifted[:, :, 1:], x[:, :, 1:], rtol=0, atol=1e-5)


def test_gradients_of_gradients():
    x, weight, bias = problem(2, 16, 16, 12, 12)
    seconds = []
    for convolve in (winograd_convolution, direct):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        first = torch.autograd.grad(convolve(*leaves).tanh().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for ours, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_do_not_depend_on_what_is_set_around(dtype):
    taps = problem(1, 16, 16, 1, 1)[1].flatten(2).permute(2, 1, 0)[None].to(dtype)
    right = filters_at_points(taps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(filters_at_points(taps), right)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(filters_at_points(taps), right)
    finally:
        torch.set_default_dtype(torch.float32)


def test_opcheck_and_refusals():
    x, weight, bias = problem(2, 16, 32, 5, 6)
    op = torch.ops.ceat_fast.winograd_convolution_native
    last = x.contiguous(memory_format=torch.channels_last)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (last, weight, bias, False), test_utils=utils)
    torch.library.opcheck(op, (torch.randn(2, 32, 5, 6).to(memory_format=torch.channels_last), weight, None, True))
    for arguments, message in [
        ((x, weight, bias, False), "dense in channels_last"),
        ((last.double(), weight, bias, False), "x must be float32"),
        ((last, weight[:, :, :2], bias, False), r"shape \(F, C, 3, 3\)"),
        ((last, weight, bias, True), "x must have 32 channels, got 16"),
        ((last, weight[:20], None, False), "multiples of 16, got 16 and 20"),
        ((last, weight, bias[:5], False), r"bias must be float32 of shape \(32,\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    code = (
        "from test_winograd import CLOSE, direct, problem\n"
        "from ceat_fast.ops.winograd import winograd_convolution\n"
        "arguments = problem(3, 32, 48, 7, 9)\n"
        "assert (winograd_convolution(*arguments) - direct(*arguments)).abs().max() < CLOSE\n"
    )
    run_with_isa(isa, code)


class Counted(nn.Module):
    """Convolutions of every kind, of which the first two are the kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding="same", bias=False)])
        self.others = nn.ModuleList(
            [
                nn.Conv2d(32, 32, 3, stride=2, padding=1),
                nn.Conv2d(32, 32, 3, padding=2, dilation=2),
                nn.Conv2d(32, 32, 3, padding=1, groups=2),
                nn.Conv2d(32, 32, 3, padding=0),
                nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
                nn.Conv2d(32, 32, 1),
                nn.Conv2d(32, 20, 3, padding=1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.kernel, *self.others):
            x = layer(x).tanh()
        return x.mean((2, 3))


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs that went to the kernel."""
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(x.shape))
        return winograd_convolution(x, weight, bias)

    monkeypatch.setattr(convolutions, "winograd_convolution", spy)
    return seen


def test_only_what_it_computes_is_taken(calls):
    model, x = Counted(), torch.randn(2, 16, 16, 16)
    with WinogradConvolutions():
        output = model(x)
    assert calls == [(2, 16, 16, 16), (2, 16, 16, 16)]
    torch.testing.assert_close(output, model(x), rtol=0, atol=CLOSE)
    assert len(calls) == 2  # outside the block, none
    with WinogradConvolutions():
        copy.deepcopy(model).double()(x.double())
        torch.vmap(model)(x.unsqueeze(1))
        model(x[:1, :, :15, :15])  # too few pixels for it to pay
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    assert len(calls) == 2


def test_suits_says_no_to_foreign_shapes():
    x, weight, _ = problem(2, 16, 16, 16, 16)
    assert suits(x, weight)
    assert not suits(x[0], weight)
    assert not suits(x, weight[:, :8])
    assert not suits(x, weight[:8])
    assert not suits(x.half(), weight.half())
    assert not suits(x[:1, :, :15, :15], weight)


def ensemble(backend: str = "auto") -> Ensemble:
    torch.manual_seed(0)
    return Ensemble([resnet20() for _ in range(2)], backend)


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet20()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits if bool(logits.isfinite().all()) else torch.zeros_like(logits)


def test_attacks_and_training_use_it_and_verdicts_do_not(calls):
    ens, x = ensemble("loop+channels_last+winograd").eval(), images()
    ens(x)
    assert not calls
    PGD(eps=0.1, alpha=0.05, steps=1)(ens, x, torch.zeros(4, dtype=torch.int64))
    assert len(calls) == 2 * 16  # 19 convolutions a member: not the stem and those of stride 2
    ens.train()(x)
    assert len(calls) == 4 * 16
    calls.clear()
    PGD(eps=0.1, alpha=0.05, steps=1)(Branching().eval(), x, torch.zeros(4, dtype=torch.int64))
    assert len(calls) == 16  # a plain module too, if it cannot be fused
    calls.clear()
    fused = ensemble().eval()
    fused(x)
    assert not calls
    fused.train()(x)
    assert len(calls) == 2 * 16  # training does where attacks are fused


def test_a_backend_without_it_is_obeyed(calls):
    ens = ensemble("loop+channels_last").eval()
    PGD(eps=0.1, alpha=0.05, steps=1)(ens, images(), torch.zeros(4, dtype=torch.int64))
    ens.train()(images())
    assert not calls


class Smooth(nn.Module):
    """Convolutions and BatchNorm without a kink, at which a rounding could change a gradient by any amount."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Softplus()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Softplus()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Softplus()),
        )

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features.flatten(2).square().mean(2)


def test_attack_and_training_gradients_are_those_of_the_loop():
    torch.manual_seed(0)
    members = [Smooth() for _ in range(2)]
    plain, ens = (Ensemble(copy.deepcopy(members), f"loop+channels_last{option}") for option in ("", "+winograd"))
    x = images().requires_grad_()
    grads = []
    for each in (plain.eval(), ens.eval()):
        with frozen(each) as view:
            grads += torch.autograd.grad(view(x)[:, 0].sum(), x)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-4 * float(grads[0].abs().max()))
    for each in (plain.train(), ens.train()):
        each.member_logits(images()).square().sum().backward()
    for (name, ours), expected in zip(ens.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith(("0.bias", "6.bias")):  # before a BatchNorm: zero but for rounding
            assert (ours.grad - expected.grad).norm() < 1e-4 * expected.grad.norm(), name


@pytest.mark.parametrize("backend", ["vmap+winograd", "streams+winograd", "loop+compile+winograd"])
def test_combinations_that_cannot_be_are_refused(backend):
    with pytest.raises(ValueError, match=r"winograd is for 'loop', and without compile"):
        Ensemble([resnet20()], backend)


def test_missing_kernels_are_an_error_where_asked_for(monkeypatch):
    monkeypatch.setattr(convolutions, "missing", lambda: "no compiler was found")
    with pytest.raises(RuntimeError, match=r"'loop\+winograd' cannot run: no compiler was found"):
        ensemble("loop+winograd").train()(images())
