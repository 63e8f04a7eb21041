"""Frozen members as one network: what is fused, equal outputs and gradients, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import unittest.mock

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.ensemble import ensemble, frozen, fused, member_layers, traced
from ceat_fast.ensemble.execution import Execution
from ceat_fast.ensemble.fused import FusedMembers
from ceat_fast.ensemble.member_layers import Convolution, MemberModule
from ceat_fast.ensemble.traced import NotFusableError
from ceat_fast.models import digits_resnet, resnet20
from ceat_fast.ops import native, winograd
from ceat_fast.ops.convolution import MemberWeights

on_native = pytest.mark.skipif(native.missing("cpu") is not None, reason="no native kernels")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class PlainWeights(MemberWeights):
    """The contract of the kernels on a GPU, in torch."""

    calls = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, kernel="triton")

    def convolve(self, x, residual=None, *, relu):
        self.calls += 1
        out = torch.stack([self._one(m, row) for m, row in enumerate(x)])
        out = out if residual is None else out + residual
        return (out.relu() if relu else out).contiguous()

    def input_gradient(self, grad, height, width, residual=None, gate=None):
        self.calls += 1
        x = grad.new_zeros(*grad.shape[:2], height, width, self.channels, requires_grad=True)
        with torch.enable_grad():
            out = torch.stack([self._one(m, row) for m, row in enumerate(x)])
        (inner,) = torch.autograd.grad(out, x, grad)
        inner = inner if residual is None else inner + residual
        return (inner if gate is None else inner * (gate > 0)).contiguous()

    def _one(self, member, x):
        weight = self.taps[member].permute(2, 1, 0).unflatten(2, (3, 3))
        images = x.permute(0, 3, 1, 2)
        return F.conv2d(images, weight, self.bias[member], self.stride, padding=1).permute(0, 2, 3, 1)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(fused.convolution, "missing", lambda device, dtype: None)
    monkeypatch.setattr(member_layers, "MemberWeights", PlainWeights)
    monkeypatch.setitem(fused._OUTPUT_SLACK, "cpu", 1e-9)


def lived_in(build, members=3):
    torch.manual_seed(0)
    models = [build().double() for _ in range(members)]
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(0.1 * torch.rand_like(tensor))
    return models


def images(count=4, channels=3, side=8):
    return torch.rand(count, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Odd(nn.Module):
    """What a foreign model may do: a projection on both sides, in-place additions, pooling, other convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 32, 1, 2, bias=False), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.wide = nn.Conv2d(32, 32, 5, padding=2)
        self.slope = nn.PReLU(32)
        self.relu = nn.LeakyReLU(0.3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 2)
        out = self.left(x)
        out += self.right(x)
        out = self.relu(out)
        out = self.slope(self.wide(out)) + out
        out = torch.relu(out + out.mean((2, 3), keepdim=True))
        return self.head(self.norm(self.pool(out).view(out.size(0), -1)))


class Broadcast(nn.Module):
    """An addition of other shape behind a convolution is not the kernel's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.a(x)
        return self.fc(F.relu(self.b(x) + x.mean((2, 3), keepdim=True)).mean((2, 3)))


MODELS = {"resnet20": resnet20, "odd": Odd, "broadcast": Broadcast}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("per_member", [False, True])
def test_the_same_function_and_gradient(on_cpu, model, per_member):
    models = lived_in(MODELS[model])
    x = torch.stack([images() + 0.1 * m for m in range(3)]) if per_member else images()
    results = []
    for backend in ("loop", "fused"):
        with frozen(Ensemble(models, backend)) as view:
            point = x.clone().requires_grad_()
            logits = view.member_logits(point, per_member=per_member)
            (grad,) = torch.autograd.grad(logits.square().sum(), point)
            results.append((logits.detach(), grad))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)


def test_every_convolution_of_a_resnet_takes_its_epilogue_along(on_cpu):
    with frozen(Ensemble(lived_in(resnet20), "fused")) as view:
        x = images().requires_grad_()
        logits = view.member_logits(x)
        steps = view._fused[0][1].program.steps
        convolutions = [step for step in steps if isinstance(step, Convolution)]
        others = [step.call for step in steps if isinstance(step, fused.Operation)]
        assert len(convolutions) == 21
        assert [step.relu for step in convolutions].count(True) == 19
        assert [step.residual is None for step in convolutions].count(False) == 9
        # Normalisation and head; the average. The identities in place of BatchNorm and in the shortcuts are gone.
        assert [type(call) for call in others].count(MemberModule) == 2
        assert {type(call) for call in others} == {MemberModule, traced._Method}
        before = [step.layer.weights.calls for step in convolutions]
        masks = []
        gate = torch.ops.aten.threshold_backward
        with unittest.mock.patch.object(
            fused.torch.ops.aten, "threshold_backward", lambda *a: masks.append(a) or gate(*a)
        ):
            torch.autograd.grad(logits.sum(), x)
        assert [step.layer.weights.calls for step in convolutions] == [count + 1 for count in before]
        assert len(masks) == 1  # of the last ReLU, whose gradient comes from the average


def test_it_follows_the_weights_and_the_groups(on_cpu):
    models = [*lived_in(resnet20, 2), *lived_in(Odd, 2)]
    for model in models[2:]:
        model.head = nn.Linear(32, 10).double()
    ensemble, plain = Ensemble(models, "fused"), Ensemble(models, "loop")
    for _ in range(2):
        with frozen(ensemble) as view, frozen(plain) as right:
            torch.testing.assert_close(view(images()), right(images()), rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            for parameter in ensemble.parameters():
                parameter.mul_(1.01).add_(0.001)
            for model in models[:2]:
                model.bn1.running_mean.add_(0.3)


def test_attacks_and_training_with_it(on_cpu):
    models = lived_in(lambda: digits_resnet(in_channels=3), 2)
    attack, y = PGD(0.1, 0.03, 3, seed=0, goal="members"), torch.zeros(4, dtype=torch.int64)
    found = [attack(Ensemble(models, backend).eval(), images(), y) for backend in ("loop", "fused")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


class Mixing(Odd):
    def forward(self, x):
        return super().forward(x) + super().forward(x).mean(0)


class OwnTensor(Odd):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return super().forward(x) * self.scale


class Tied(Broadcast):
    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.again.weight = self.b.weight

    def forward(self, x):
        return self.fc(F.relu(self.again(self.b(self.a(x)))).mean((2, 3)))


class BatchMean(Broadcast):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class Branching(Broadcast):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Drawing(Broadcast):
    def forward(self, x):
        return super().forward(x * random.uniform(0.9, 1.1))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class OwnGradient(Broadcast):
    def forward(self, x):
        return super().forward(StraightThrough.apply(x))


class Pair(Broadcast):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Mixing, "stem is called twice"),
        (Tied, "again shares a tensor with another module"),
        (OwnTensor, "the forward uses a tensor of the module itself, scale"),
        (BatchMean, "the forward does not treat every sample by itself"),
        (Drawing, "the forward is another one every time"),
        (OwnGradient, "the forward has a gradient of its own making"),
        (Pair, r"the forward does not return logits \(B, K\)"),
        (Branching, r"torch.fx cannot trace the forward \(TraceError\)"),
    ],
)
def test_what_cannot_be_fused(on_cpu, model, text):
    with frozen(Ensemble(lived_in(model), "fused")) as view, pytest.raises(RuntimeError, match=text):
        view.member_logits(images())


@pytest.mark.parametrize("model", [BatchMean, Branching])
def test_auto_loops_over_what_cannot_be_fused(on_cpu, monkeypatch, model):
    monkeypatch.setattr(ensemble, "default_execution", lambda *_: Execution("fused"))
    models = lived_in(model)
    x = images()
    with frozen(Ensemble(models)) as view, frozen(Ensemble(models, "loop")) as right:
        for _ in range(2):
            torch.testing.assert_close(view.member_logits(x), right.member_logits(x), rtol=1e-9, atol=1e-11)


def test_refused():
    with pytest.raises(NotFusableError, match=r"for torch\.float32 and torch\.bfloat16, not for torch\.float64"):
        FusedMembers([resnet20().double()], torch.rand(1, 3, 8, 8).double())
    with pytest.raises(ValueError, match="'fused' goes with no option but graph"):
        Ensemble([resnet20()], "fused+channels_last")


class Smooth(nn.Module):
    """Without a kink, at which a rounding could change a gradient by any amount; widths that no kernel has, too."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.down, self.short = nn.Conv2d(32, 48, 3, 2, padding=1), nn.Conv2d(32, 48, 1, 2)
        self.odd, self.last = nn.Conv2d(48, 20, 3, padding=1), nn.Conv2d(20, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.softplus(self.norm(self.stem(x)))
        x = F.softplus(self.down(x) + self.short(x))
        x = F.softplus(self.last(F.softplus(self.odd(x)))).mean((2, 3))
        return self.head(x)


@on_native
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("side", [8, 13])
def test_the_kernels_of_the_cpu(per_member, side):
    models = [model.float() for model in lived_in(Smooth)]
    x = torch.rand(3, 7, 3, side, side) if per_member else torch.rand(7, 3, side, side)
    results = []
    for backend, double in (("loop", True), ("fused", False), ("auto", False)):
        view_of = [copy.deepcopy(model).double() for model in models] if double else models
        with frozen(Ensemble(view_of, backend)) as view:
            point = (x.double() if double else x.clone()).requires_grad_()
            logits = view.member_logits(point, per_member=per_member)
            results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), point)[0]))
            assert double or view._fused is not None
    for found in results[1:]:
        for got, right in zip(found, results[0], strict=True):
            assert (got - right).norm() < 1e-5 * right.norm()


@on_native
@pytest.mark.parametrize("kind", ["ensemble", "module"])
@pytest.mark.parametrize("build", [Smooth, resnet20])
def test_bf16_on_the_cpu_is_no_further_from_fp32_than_its_proof_allows(kind, build):
    torch.manual_seed(0)
    models = [build() for _ in range(3 if kind == "ensemble" else 1)]
    for model in models:
        for _ in range(5):  # of its BatchNorm's statistics
            model.train()(torch.rand(32, 3, 32, 32))
    x = torch.rand(16, 3, 32, 32)
    results = {}
    for way, backend, precision in (("right", "loop", "fp32"), ("torch", "loop", "bf16"), ("ours", "auto", "bf16")):
        model = Ensemble(models, backend) if kind == "ensemble" else copy.deepcopy(models[0])  # a view of its own
        plain = contextlib.nullcontext() if way == "ours" else without_kernels()
        with plain, frozen(model, precision) as view:
            point = x.clone().requires_grad_()
            logits = view.member_logits(point).flatten(0, 1) if kind == "ensemble" else view(point)
            assert logits.dtype == torch.float32
            results[way] = logits.detach(), torch.autograd.grad(logits[:, 0].sum(), point)[0]
            assert (view._fused is not None) == (way == "ours")
    for ours, torchs, right in zip(results["ours"], results["torch"], results["right"], strict=True):
        assert right.norm().isfinite()
        assert (ours - right).norm() < 2.5 * (torchs - right).norm() + 1e-3 * right.norm()


@contextlib.contextmanager
def without_kernels():
    """As where the native kernels were not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "missing", lambda: "switched off")
        yield


@on_native
def test_a_plain_module_and_its_weights():
    (model,) = (model.float() for model in lived_in(Smooth, 1))
    x = torch.rand(7, 3, 8, 8)
    for _ in range(2):
        with frozen(model) as view, frozen(copy.deepcopy(model).double()) as right:
            assert (view(x) - right(x.double())).norm() < 1e-5 * right(x.double()).norm()
            assert view._fused is not None
            with pytest.raises(RuntimeError, match="channels"):
                view(torch.rand(2, 5, 8, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01).add_(0.001)


@on_native
def test_a_resnet_on_the_cpu_at_any_number_of_threads():
    models = [model.float() for model in lived_in(resnet20)]
    x, found = torch.rand(5, 3, 32, 32), []
    for threads in (1, 2):
        with one_thread() if threads == 1 else contextlib.nullcontext(), frozen(Ensemble(models, "fused")) as view:
            point = x.clone().requires_grad_()
            found.append(torch.autograd.grad(view(point)[:, 0].sum(), point)[0])
    assert torch.equal(*found)


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@on_native
def test_gradients_again_and_gradients_of_gradients():
    models = [model.float() for model in lived_in(Smooth)]
    x = torch.rand(7, 3, 8, 8)
    seconds = []
    for backend, cast in (("loop", torch.Tensor.double), ("fused", torch.Tensor.float)):
        members = [copy.deepcopy(model).to(cast(x).dtype) for model in models]
        with frozen(Ensemble(members, backend)) as view:
            point = cast(x).requires_grad_()
            logits = view.member_logits(point)
            first, again = (torch.autograd.grad(logits.sum(), point, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, again)
            (inner,) = torch.autograd.grad(logits.square().sum(), point, create_graph=True)
            seconds.append(torch.autograd.grad(inner.square().sum(), point)[0])
    assert (seconds[1] - seconds[0]).norm() < 1e-4 * seconds[0].norm()


class InBf16(nn.Module):
    """A forward with a type of its own, so that there is nothing in fp32 to compare with."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.conv(x.to(torch.bfloat16)).relu().mean((2, 3)))


@on_native
def test_what_cannot_be_compared_in_fp32_loops():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    models = [InBf16() for _ in range(2)]
    with frozen(Ensemble(models), "bf16") as view, frozen(Ensemble(models, "loop"), "bf16") as right:
        assert torch.equal(view.member_logits(x), right.member_logits(x))
    with frozen(Ensemble(models, "fused"), "bf16") as view, pytest.raises(RuntimeError, match="do not run in fp32"):
        view.member_logits(x)


@on_native
def test_kernels_are_for_the_types_that_they_have():
    layer = nn.Conv2d(16, 16, 3, padding=1)
    assert traced.has_kernel(layer)
    assert traced.has_kernel(copy.deepcopy(layer).bfloat16())
    assert not traced.has_kernel(copy.deepcopy(layer).half())
    assert not traced.has_kernel(copy.deepcopy(layer).double())


@on_native
def test_inputs_of_another_type_than_the_weights_are_refused_by_torch():
    x = torch.rand(2, 1, 8, 8)
    with frozen(Ensemble([digits_resnet() for _ in range(2)], "fused").eval()) as view:
        view(x)
        with pytest.raises(RuntimeError, match=r"double.*float.* should be the same"):
            view(x.double())


@on_native
def test_a_derivative_in_forward_mode_is_not_dropped():
    x = torch.rand(2, 3, 8, 8)
    with frozen(Ensemble([model.float() for model in lived_in(Smooth)], "fused")) as view, torch.no_grad():
        view.member_logits(x)
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            view.member_logits(forward_ad.make_dual(x, torch.ones_like(x)))


class Detached(Smooth):
    def forward(self, x):
        return super().forward((x * 16).round().detach())


@on_native
def test_outputs_without_a_gradient_say_so():
    for backend in ("loop", "fused"):
        with frozen(Ensemble([model.float() for model in lived_in(Detached)], backend)) as view:
            assert not view(torch.rand(2, 3, 8, 8).requires_grad_()).requires_grad


@on_native
def test_transforms_and_autocast_leave_it_to_torch():
    models = [model.float() for model in lived_in(Smooth)]
    x = torch.rand(6, 3, 8, 8)
    for target in (Ensemble(models, "fused"), Ensemble(models), models[0]):
        with frozen(target) as view:
            right = view(x)
            assert (torch.vmap(view)(x.view(2, 3, 3, 8, 8)).flatten(0, 1) - right).abs().max() < 1e-4
            (tangent,) = torch.func.vjp(view, x)[1](torch.ones_like(right))
            assert tangent.shape == x.shape
            with torch.autocast("cpu", torch.bfloat16):
                assert (view(x) - right).abs().max() < 0.02 * right.abs().max()


@on_native
def test_no_samples():
    with frozen(Ensemble([model.float() for model in lived_in(Smooth)], "fused")) as view:
        assert view(torch.rand(0, 3, 8, 8)).shape == (0, 5)
        assert view.member_logits(torch.rand(3, 0, 3, 8, 8), per_member=True).shape == (3, 0, 5)


@on_native
def test_memory_is_used_again_and_never_under_somebody():
    with frozen(Ensemble([model.float() for model in lived_in(resnet20)], "fused")) as view:
        batches = [torch.rand(count, 3, 16, 16) for count in (4, 4, 7, 4, 4)]

        def passes(x):
            point = x.clone().requires_grad_()
            logits = view(point)
            return point, logits

        def gradient(point, logits):
            return torch.autograd.grad(logits[:, 0].sum(), point)[0]

        alone = [gradient(*passes(x)) for x in batches]
        kept = memory(view)
        assert len(kept) >= 21
        gradient(*passes(batches[0]))
        assert memory(view) == kept
        together = [passes(x) for x in batches]
        for found, right in zip([gradient(*pair) for pair in reversed(together)], reversed(alone), strict=True):
            assert torch.equal(found, right)
        assert memory(view)
    assert not memory(view)


def memory(view):
    kept = view._fused[0][1]._buffers._kept
    return {tensor.data_ptr() for tensors in kept.values() for tensor, _ in tensors}


@on_native
def test_nothing_is_kept_once_a_gradient_was_taken():
    """Tensors of a pass go with the last reference to its outputs, without waiting for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        with frozen(Ensemble([model.float() for model in lived_in(resnet20)], "fused")) as view:
            point = torch.rand(2, 3, 32, 32).requires_grad_()
            logits = view(point)
            records = [o for o in gc.get_objects() if type(o) is fused._Record]
            assert len(records) == 1
            torch.autograd.grad(logits.sum(), point)
            del logits, records
            assert not [o for o in gc.get_objects() if type(o) is fused._Record]
    finally:
        gc.enable()


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["fused", "fused+graph"])
def test_on_cuda(precision, backend):
    models = [model.float().cuda() for model in lived_in(resnet20)]
    x = images(33, side=32).float().cuda()
    with frozen(Ensemble([m.double() for m in lived_in(resnet20)], "loop").cuda()) as view:
        point = x.double().requires_grad_()
        right = view.member_logits(point)
        (right_grad,) = torch.autograd.grad(right.sum(), point)
    with frozen(Ensemble(models, backend), precision) as view:
        for _ in range(2):
            point = x.clone().requires_grad_()
            logits = view.member_logits(point)
            (grad,) = torch.autograd.grad(logits.sum(), point)
    bound = 1e-4 if precision == "fp32" else 5e-2
    assert (logits - right).norm() < bound * right.norm()
    assert (grad - right_grad).norm() < 2 * bound * right_grad.norm()
