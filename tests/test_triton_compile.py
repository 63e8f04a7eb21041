"""Every Triton kernel compiles to machine code for every GPU generation that we name, without a GPU or a driver.

The ops are called as always, but their launches are turned into compilations for a stated target: signatures, tile
sizes and specialisations are those of a real launch.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ceat_fast.ops import convolution, member_training, triton_backend
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.member_training import Norm
from ceat_fast.ops.reference import CeatSettings

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
CAPABILITIES = [80, 90, 100, 120]
SHARED_MEMORY_LIMIT = 99 * 1024  # bytes per block on sm_120, the least of the four
F64_ARITHMETIC = re.compile(r"\b(?:add|sub|mul|mad|fma|div|rcp|sqrt|ex2|lg2|min|max|neg|abs|setp\.\w+|selp)\.[\w.]*f64")


class OfflineDriver:
    """What triton asks of a driver when it compiles but does not launch."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # triton keeps one cache of compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileInsteadOfLaunch:
    def __init__(self, kernel, compiled: list):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def compile_launches(request, monkeypatch):
    """Function that makes a call of the backend and returns the kernels which the call would have launched."""
    from triton.runtime import driver

    from ceat_fast.ops import convolution_kernel, training_kernels, triton_kernels

    compiled = []
    names = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    kernels = {name: CompileInsteadOfLaunch(getattr(triton_kernels, name), compiled) for name in names}
    monkeypatch.setattr(triton_backend, "_kernels", lambda: SimpleNamespace(tl=triton_kernels.tl, **kernels))

    member_convolution = CompileInsteadOfLaunch(convolution_kernel.member_convolution_kernel, compiled)
    monkeypatch.setattr(convolution, "_kernel", lambda: member_convolution)
    names = [name for name in vars(training_kernels) if name.endswith("_kernel")]
    training = {name: CompileInsteadOfLaunch(getattr(training_kernels, name), compiled) for name in names}
    monkeypatch.setattr(member_training, "_kernels", lambda: SimpleNamespace(**training))

    def run(call, *args):
        compiled.clear()
        call(*args)
        return list(compiled)

    driver.set_active(OfflineDriver(request.param))
    yield run
    driver.set_active(None)  # triton finds the real one again when it is next asked


def assert_good_machine_code(kernels, *, f64: bool = False, count: int = 1):
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel.asm["cubin"].startswith(b"\x7fELF")
        assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT
        assert bool(F64_ARITHMETIC.search(kernel.asm["ptx"])) == f64


def ceat_arguments(members: int, classes: int, dtype: torch.dtype, pair_reduction: int):
    adv, nat = torch.zeros(2, members, 4, classes, dtype=dtype)
    settings = CeatSettings(1.0, 1.0, 5.0, 1.0, 5.0, float("inf"), pair_reduction, 1, False)
    return adv, nat, torch.zeros(4, dtype=torch.long), *settings, True, True


def logit_loads(kernel) -> int:
    """How often a (members, samples, classes) tile is read."""
    return len(re.findall(r"tt\.load .*tensor<\d+x\d+x\d+x!tt\.ptr", kernel.asm["ttgir"]))


@pytest.mark.parametrize(
    ("members", "classes", "dtype", "pair_reduction", "reads"),
    [
        (3, 10, torch.float32, 0, 2),  # one tile: adversarial and clean logits are read once each
        (5, 10_000, torch.bfloat16, 1, 6),  # several tiles: three passes over both
    ],
)
def test_ceat_loss(compile_launches, members, classes, dtype, pair_reduction, reads):
    kernels = compile_launches(triton_backend._ceat_loss, *ceat_arguments(members, classes, dtype, pair_reduction))
    assert_good_machine_code(kernels)
    assert logit_loads(kernels[0]) == reads


@pytest.mark.parametrize("compile_launches", [90], indirect=True)
@pytest.mark.parametrize(
    ("members", "classes", "dtype"), [(3, 10, torch.float64), (128, 100, torch.float16), (1, 2, torch.float32)]
)
def test_extremes_of_ceat_loss(compile_launches, members, classes, dtype):
    kernels = compile_launches(triton_backend._ceat_loss, *ceat_arguments(members, classes, dtype, 2))
    assert_good_machine_code(kernels, f64=dtype == torch.float64)


@pytest.mark.parametrize(("classes", "reads"), [(10, 1), (10_000, 2)])
def test_ensemble_cross_entropy(compile_launches, classes, reads):
    logits = torch.zeros(3, 4, classes)
    target = torch.zeros(4, dtype=torch.long)
    kernels = compile_launches(triton_backend._ensemble_cross_entropy, logits, target, 1, True)
    assert_good_machine_code(kernels)
    assert logit_loads(kernels[0]) == reads


def test_pgd_step(compile_launches):
    x = torch.zeros(2, 3, 8, 8)
    assert_good_machine_code(compile_launches(triton_backend._pgd_step, x, x.bfloat16(), x, 2 / 255, 8 / 255))


def test_scale_gradients(compile_launches):
    grad = torch.zeros(3, 4, 10, dtype=torch.bfloat16)
    assert_good_machine_code(compile_launches(triton_backend._scale_gradients, grad, grad, torch.ones(3)))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("channels", "filters", "stride"), [(16, 16, 1), (32, 64, 2)])
def test_member_convolution(compile_launches, channels, filters, stride, backward):
    bf16 = {"dtype": torch.bfloat16}
    tensors = torch.zeros(3, filters, 3, 3, channels, **bf16), torch.zeros(3, filters, **bf16)
    weights = MemberWeights(*tensors, stride, kernel="triton")
    x = torch.zeros(3, 4, 8, 8, channels, **bf16)
    out = torch.zeros(3, 4, 8 // stride, 8 // stride, filters, **bf16)
    if backward:
        kernels = compile_launches(weights.input_gradient, out, 8, 8, x, x)
    else:
        kernels = compile_launches(lambda: weights.convolve(x, out, relu=True))
    assert_good_machine_code(kernels)
    assert re.search("mma.sync|wgmma|tcgen05.mma", kernels[0].asm["ptx"])
    assert re.search(r"st\.local|ld\.local", kernels[0].asm["ptx"]) is None


@pytest.mark.parametrize("compile_launches", [90], indirect=True)
def test_member_convolution_in_fp32_is_small(compile_launches):
    """Products in fp32 are many instructions; those of nine taps one after the other were 2 MB."""
    weights = MemberWeights(torch.zeros(3, 64, 3, 3, 64), torch.zeros(3, 64), 1, kernel="triton")
    kernels = compile_launches(lambda: weights.convolve(torch.zeros(3, 4, 8, 8, 64), None, relu=True))
    assert_good_machine_code(kernels)
    assert len(kernels[0].asm["cubin"]) < 500_000


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_training(compile_launches, channels):
    rows = torch.zeros(3, 4, 8, 8, channels, dtype=torch.bfloat16)
    norm = Norm(*(torch.zeros(3, channels) for _ in range(4)), 0.1, 1e-5)
    assert_good_machine_code(compile_launches(lambda: member_training.normalise(rows, norm, rows, relu=True)), count=2)
    saved = torch.zeros(3, 2, channels)
    call = partial(member_training.norm_gradients, rows, rows, rows, saved, norm.weight, residual=True, relu=True)
    assert_good_machine_code(compile_launches(call), count=2)
    call = partial(member_training.weight_gradient, rows, rows, 1, point=False, channels=channels)
    assert_good_machine_code(compile_launches(call))
