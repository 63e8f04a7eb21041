"""One gradient step of an attack in every execution, and what entering the frozen view costs."""

from __future__ import annotations

import pytest
import torch
from contenders import Setting

from ceat_fast import Ensemble
from ceat_fast.ensemble import frozen

SMALL = Setting(batch=16)


@pytest.mark.parametrize("backend", ["loop", "loop+channels_last", "vmap", "streams"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attack_gradient(timed, device, backend, precision):
    if backend == "streams" and device == "cpu":
        pytest.skip("streams are CUDA's")
    ensemble = Ensemble([m.to(device) for m in SMALL.build()], backend)
    x = SMALL.data()[0].to(device).requires_grad_()
    with frozen(ensemble, precision) as view:
        timed(lambda: torch.autograd.grad(view(x).sum(), x))


def test_refresh_of_the_view(timed, device):
    ensemble = Ensemble([m.to(device) for m in SMALL.build()])

    def enter():
        with frozen(ensemble):
            pass

    timed(enter)
