"""Training members as one network: kernels and layers against torch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from importlib.metadata import version

import numpy
import pytest
import torch
from packaging.version import Version
from plain_kernels import use_plain_kernels
from torch import nn
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.ensemble.fused_training import FusedTraining, TrainedConvolution
from ceat_fast.ensemble.traced import NotFusableError
from ceat_fast.loss import ceat_loss
from ceat_fast.models import digits_resnet, resnet20
from ceat_fast.models.resnet import ResNet
from ceat_fast.ops import member_training, triton_backend
from ceat_fast.ops.member_training import Norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and triton_backend.missing("cuda") is None
DEVICE = "cuda" if COMPILED else "cpu"
on_kernels = pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="runs in the interpreter, in a child process")
on_gpu = pytest.mark.skipif(not COMPILED, reason="needs a GPU")


@pytest.mark.skipif(INTERPRETED or COMPILED, reason="the kernels are tested in this very process")
@pytest.mark.skipif(triton_backend.missing("cuda") == "triton is not installed", reason="triton is not installed")
def test_in_the_interpreter():
    # It makes numbers of tensors with one element, by a conversion that NumPy 2.5 refuses.
    if Version(numpy.__version__) >= Version("2.5") and Version(version("triton")) < Version("3.8"):
        pytest.skip("Triton's interpreter before 3.8 cannot run these kernels under NumPy 2.5")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


def images_of(rows):
    return rows.double().permute(0, 3, 1, 2)


def near(got, right, bound=1e-5):
    torch.testing.assert_close(got.double(), right, rtol=bound, atol=bound * right.abs().max().item())


@on_kernels
@pytest.mark.parametrize(
    ("shape", "residual", "relu"),
    [
        ((2, 3, 5, 7, 16), True, True),  # rows do not fill the last tile
        ((1, 2, 4, 4, 32), False, True),
        ((3, 2, 9, 33, 64), True, False),
        ((2, 5, 3, 3, 16), False, False),
        ((2, 4, 40, 40, 16), True, True),  # several programs
    ],
    ids=str,
)
def test_batch_norm(shape, residual, relu):
    torch.manual_seed(0)
    members, channels = shape[0], shape[-1]
    y, grad = 2 * draw(*shape) + 3, draw(*shape)
    skip = draw(*shape) if residual else None
    weight, bias, mean, var = (draw(members, channels).abs() + 0.5 for _ in range(4))
    before = mean.double(), var.double()
    out, saved = member_training.normalise(y, Norm(weight, bias, mean, var, 0.1, 1e-5), skip, relu=relu)
    found = member_training.norm_gradients(grad, out, y, saved, weight, residual=residual, relu=relu)
    for m in range(members):
        tensors = [images_of(y[m]), weight[m].double(), bias[m].double()]
        tensors += [images_of(skip[m])] if residual else []
        tensors = [tensor.requires_grad_() for tensor in tensors]
        statistics = [value[m].clone() for value in before]
        right = F.batch_norm(tensors[0], *statistics, *tensors[1:3], True, 0.1, 1e-5)
        right = right + tensors[3] if residual else right
        right = right.relu() if relu else right
        grads = torch.autograd.grad(right, tensors, images_of(grad[m]))
        near(images_of(out[m]), right.detach())
        near(mean[m], statistics[0])
        near(var[m], statistics[1])
        near(images_of(found.x[m]), grads[0])
        near(found.weight[m], grads[1])
        near(found.bias[m], grads[2])
        if residual:
            near(images_of(found.residual[m]), grads[3])


@on_kernels
@pytest.mark.parametrize(
    ("size", "filters", "stride", "point", "channels"),
    [
        ((2, 3, 5, 7, 16), 16, 1, False, 3),
        ((1, 2, 6, 5, 16), 32, 2, False, 16),
        ((2, 2, 8, 8, 32), 64, 2, True, 32),
        ((1, 9, 8, 8, 64), 64, 1, False, 64),
        ((2, 3, 7, 7, 32), 16, 2, False, 20),
    ],
    ids=str,
)
def test_weight_gradient(size, filters, stride, point, channels):
    torch.manual_seed(0)
    x = draw(*size)
    grad = draw(*size[:2], *(-(-side // stride) for side in size[2:4]), filters)
    found = member_training.weight_gradient(x, grad, stride, point=point, channels=channels)
    side = 1 if point else 3
    for m in range(size[0]):
        right = torch.nn.grad.conv2d_weight(
            images_of(x[m, ..., :channels]),
            (filters, channels, side, side),
            images_of(grad[m]),
            stride=stride,
            padding=side // 2,
        )
        near(found[m], right)
    assert found.is_contiguous()


class Small(nn.Module):
    """Every kind of layer: shortcuts with and without a convolution, an addition without ReLU, an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.inner = ResNet((0, 1), (16, 32), 5, ((0.5,) * 3, (0.5,) * 3))
        self.extra = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.again = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=0.3))
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        a = self.extra(x)
        return self.inner(x) + self.last((self.again(a) + a).mean((2, 3)))


def trained(build, count=2):
    torch.manual_seed(0)
    members = [build().to(DEVICE).train() for _ in range(count)]
    for module in (module for member in members for module in member.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return members


@pytest.fixture(params=[False, True], ids=["", "as the CUDA kernels are called"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not request.param:
        yield False
        return
    if COMPILED:
        pytest.skip("in the interpreter only")
    monkeypatch.setattr(TrainedConvolution, "_kernel", lambda *_: "cuda")
    library = use_plain_kernels(monkeypatch)
    yield True
    library._destroy()


@on_kernels
@pytest.mark.parametrize("build", [Small, lambda: digits_resnet(5, 3)], ids=["Small", "digits_resnet"])
def test_a_network(kernels, build):
    ours, plain = trained(build), trained(build)
    xs = [draw(2 * 3, 3, 8, 8).sigmoid() for _ in range(2)]
    fused = FusedTraining(ours, xs[0][:3], torch.float32)
    layers = [step.layer for step in fused._layers._steps if hasattr(step, "layer")]
    assert any(getattr(layer, "chain", None) is not None for layer in layers) == kernels or COMPILED
    for x in xs:
        logits = [fused(x), torch.cat([member(part) for member, part in zip(plain, x.chunk(2), strict=True)])]
        grads = []
        for members, of in zip((ours, plain), logits, strict=True):
            parameters = [parameter for member in members for parameter in member.parameters()]
            grads.append(torch.autograd.grad(of.square().sum(), parameters))
        near(logits[0].detach(), logits[1].detach().double(), 1e-4)
        for found, right in zip(*grads, strict=True):
            near(found, right.double(), 2e-3)
        for found, right in zip(*(list(nn.ModuleList(members).buffers()) for members in (ours, plain)), strict=True):
            near(found, right.double(), 1e-4)
        with torch.no_grad():
            for parameter in itertools.chain(*(member.parameters() for member in (*ours, *plain))):
                parameter.mul_(0.9)
    assert fused.is_current()
    next(module for module in ours[1].modules() if isinstance(module, nn.BatchNorm2d)).eval()
    assert not fused.is_current()
    ours[1].train()
    assert fused.is_current()
    ours[0].to(torch.float64)
    assert not fused.is_current()


class MixesSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = digits_resnet(5, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


class OfOneType(MixesSamples):
    """Runs in autocast alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x):
        return self.inner(self.first(x.to(torch.bfloat16)))


def _in_eval_mode():
    module = digits_resnet(5, 3)
    module.bn1.eval()
    return module


def _partly_frozen():
    module = digits_resnet(5, 3)
    module.conv1.weight.requires_grad_(False)
    return module


def _hooked():
    module = digits_resnet(5, 3)
    module.conv1.register_forward_hook(lambda *_: None)
    return module


@on_kernels
@pytest.mark.parametrize("build", [MixesSamples, OfOneType, _in_eval_mode, _partly_frozen, _hooked])
def test_what_has_to_run_another_way(build):
    members = [build().to(DEVICE) for _ in range(2)]
    if build is not _in_eval_mode:
        members = [member.train() for member in members]
    before = [buffer.clone() for member in members for buffer in member.buffers()]
    x = draw(8, 3, 8, 8)
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=build is OfOneType)
    with autocast, pytest.raises(NotFusableError, match="not in fp32" if build is OfOneType else ""):
        FusedTraining(members, x[:4], torch.float32)(x)
    after = [buffer for member in members for buffer in member.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@on_gpu
@pytest.mark.parametrize("per_member", [False, True])
def test_in_bf16_on_cuda(per_member):
    members = trained(lambda: resnet20(), 3)
    ours, plain = Ensemble(members, "fused").train(), Ensemble(trained(lambda: resnet20(), 3), "loop").train()
    x = torch.rand(*((3,) if per_member else ()), 64, 3, 32, 32, device=DEVICE)
    y = torch.randint(10, (64,), device=DEVICE)
    grads = []
    for ensemble in (ours, plain):
        with torch.autocast("cuda", torch.bfloat16):
            logits = ensemble.member_logits(x, per_member)
        loss = ceat_loss(logits, logits.flip(1), y).sum()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(ensemble.parameters()))]))
    assert ours._trained is not None
    assert (grads[0] - grads[1]).norm() < 0.15 * grads[1].norm()
    assert type(ours._trained[0][1]) is FusedTraining


@on_gpu
def test_other_passes_are_the_members_own():
    ensemble = Ensemble(trained(lambda: digits_resnet(5, 3)), "fused").train()
    x = torch.rand(4, 3, 8, 8, device=DEVICE)
    ensemble.member_logits(x)  # in fp32
    with torch.autocast("cuda", torch.bfloat16):
        ensemble.member_logits(x.clone().requires_grad_())
        with torch.no_grad():
            ensemble.member_logits(x)
    assert ensemble._trained is None
