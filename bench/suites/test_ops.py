"""The fused operations of every backend."""

from __future__ import annotations

import pytest
import torch

from ceat_fast.loss import ceat_loss, ensemble_cross_entropy
from ceat_fast.ops import dispatch

SIZES = [(3, 128, 10), (3, 128, 100), (3, 1024, 1000)]


def logits(size, device, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(size, device=device).to(dtype).requires_grad_()


def labels(size, device):
    return torch.randint(0, size[2], (size[1],), device=device)


def require(backend, device):
    reason = dispatch.missing(backend, device)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ceat_loss(timed, device, backend, size, dtype):
    require(backend, device)
    adv, nat, target = logits(size, device, dtype), logits(size, device, dtype), labels(size, device)
    timed(lambda: ceat_loss(adv, nat, target, impl=backend).sum().backward())


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ensemble_cross_entropy(timed, device, backend, size):
    require(backend, device)
    z, target = logits(size, device), labels(size, device)
    timed(lambda: ensemble_cross_entropy(z, target, impl=backend).backward())


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_pgd_step(timed, device, backend):
    require(backend, device)
    x, grad, center = (torch.rand(128, 3, 32, 32, device=device) for _ in range(3))
    timed(lambda: dispatch.pgd_step(x, grad, center, 2 / 255, 8 / 255, impl=backend))
