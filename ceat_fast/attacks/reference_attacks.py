"""The authors' attacks, for comparison: the package pyautoattack (0.2.0), or upstream's autoattack, if installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ceat_fast.attacks.apgd import APGD
from ceat_fast.attacks.fab import FAB
from ceat_fast.attacks.outputs import answers
from ceat_fast.attacks.search_attack import SearchAttack
from ceat_fast.attacks.square import Square

_PACKAGES = ("pyautoattack", "autoattack")


def reference_attacks(
    stages: Mapping[str, SearchAttack], model: nn.Module, x: Tensor
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The authors' implementation of each attack on `model`, with the same settings: (x, y) -> x_adv.

    They return x itself where they fail. Parameter gradients and torch's random numbers are afterwards as before.

    Raises:
        ImportError: neither package is installed.
        ValueError: x is not fp32.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"backend='reference' needs float32 inputs, got {x.dtype}")
    classes = answers(model, x[:1]).shape[1]
    return {name: _guarded(_make(attack, model, x.device, classes), model) for name, attack in stages.items()}


def _make(attack: SearchAttack, model: nn.Module, device: torch.device, classes: int) -> Any:
    common = {
        "norm": attack.norm,
        "eps": attack.radius,
        "seed": attack.seed,
        "device": device,
        "verbose": False,
    }
    if isinstance(attack, Square):
        return _module("square").SquareAttack(
            model,
            n_queries=attack.queries,
            p_init=attack.p_init,
            n_restarts=attack.restarts,
            resc_schedule=attack.rescale_schedule,
            **common,
        )
    if isinstance(attack, FAB):
        return _module("fab_pt").FABAttack_PT(
            model,
            n_restarts=attack.restarts,
            n_iter=attack.steps,
            targeted=attack.targeted,
            n_target_classes=min(attack.targets, classes - 1),
            alpha_max=attack.alpha_max,
            eta=attack.eta,
            beta=attack.beta,
            **common,
        )
    if not isinstance(attack, APGD):
        raise TypeError(f"the reference has no {type(attack).__name__}")
    common |= {"n_iter": attack.steps, "n_restarts": attack.restarts, "eot_iter": attack.eot, "rho": attack.rho}
    if attack.loss == "dlr-targeted":
        targets = min(attack.targets, classes - 1)
        return _module("autopgd_base").APGDAttack_targeted(model, n_target_classes=targets, **common)
    return _module("autopgd_base").APGDAttack(model, loss=attack.loss, **common)


def _module(name: str) -> Any:
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(f"{package}.{name}")
    raise ImportError(
        "backend='reference' needs the package pyautoattack, which is not installed: "
        'pip install "ceat_fast[autoattack]"'
    )


def _guarded(attack: Any, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices), _kept_gradients(model):
            result: Tensor = attack.perturb(x.clone(), y.clone())
        return result.detach()

    return run


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Their FAB adds to the parameters' gradients."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
