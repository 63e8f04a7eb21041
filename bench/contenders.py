"""The problems that throughput.py measures, and each way of solving them as a call without arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ceat_fast import Ensemble
from ceat_fast.attacks import PGD
from ceat_fast.ensemble import frozen, tune
from ceat_fast.methods import CEAT
from ceat_fast.methods.base import Batch
from ceat_fast.models import build_model
from ceat_fast.models.resnet import CIFAR10_STATISTICS, ResNet
from ceat_fast.ops import winograd
from ceat_fast.training import AttackConfig, TrainConfig
from ceat_fast.training.distributed import Layout
from ceat_fast.training.step import Stepper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One problem: an ensemble, a batch and an attack."""

    model: str = "resnet20"
    members: int = 3
    batch: int = 128
    side: int = 32
    width: int = 16  # channels of the first stage; another width is for ResNet-20
    steps: int = 10
    device: str = "cpu"
    precision: str = "fp32"  # that of the attack's search
    compile_mode: str | None = None  # of torch.compile, in the loops that we are compared with

    def build(self) -> list[nn.Module]:
        torch.manual_seed(0)
        return [self._network().to(self.device).train() for _ in range(self.members)]

    def _network(self) -> nn.Module:
        if self.width == 16:
            return build_model(self.model, 10, 3)
        return ResNet([3] * 3, [self.width, 2 * self.width, 4 * self.width], 10, CIFAR10_STATISTICS)

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch, 3, self.side, self.side, generator=generator)
        return x.to(self.device), torch.randint(0, 10, (self.batch,), generator=generator).to(self.device)


def sgd(members: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """One optimizer per member, as the paper has it."""
    return [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9, weight_decay=1e-4) for m in members]


def peer_calls(members: list[nn.Module], setting: Setting, compiled: bool) -> list[Callable[[Tensor], Tensor]]:
    """The members as the plain loops call them: in bf16 through autocast, where the attack is in bf16."""
    calls = [torch.compile(m, mode=setting.compile_mode) for m in members] if compiled else list(members)
    if setting.precision == "fp32":
        return calls

    def cast(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast(torch.device(setting.device).type, DTYPES[setting.precision]):
                return call(x)

        return run

    return [cast(call) for call in calls]


def our_ensemble(setting: Setting, compiled: bool, captured: bool = False) -> Ensemble:
    """Our ensemble; with `compiled`, in the executions that are the fastest here for a long job."""
    ensemble = Ensemble(setting.build())
    if compiled or setting.device.startswith("cuda"):
        tune(
            ensemble,
            setting.data()[0],
            precision=setting.precision,
            training_precision=setting.precision,
            captured=captured,
            passes=1_000_000 if compiled else 0,
            updates=1_000_000 if compiled else 0,
            remember=False,
        )
    return ensemble


def our_attack(setting: Setting) -> PGD:
    return PGD(peers.EPS, peers.ALPHA, setting.steps, seed=0, precision=setting.precision)


def pgd_candidates(setting: Setting, compiled: bool) -> dict[str, Callable[[], object]]:
    """One PGD attack on one batch, each way."""
    x, y = setting.data()
    author, plain = setting.build(), [m.eval().requires_grad_(False) for m in setting.build()]
    ensemble, attack = our_ensemble(setting, compiled), our_attack(setting)
    index = torch.arange(len(x), device=x.device)
    candidates: dict[str, Callable[[], object]] = {
        "author": lambda: peers.author_pgd(author, x, y, setting.steps),
        "eager": lambda: peers.eager_pgd(peer_calls(plain, setting, False), x, y, setting.steps),
    }
    if compiled:
        calls = peer_calls([m.eval().requires_grad_(False) for m in setting.build()], setting, True)
        candidates["compiled"] = lambda: peers.eager_pgd(calls, x, y, setting.steps)
    candidates["ceat_fast"] = lambda: attack.perturb(ensemble, x, y, index)
    return candidates


def ladder_candidates(setting: Setting, compiled: bool) -> dict[str, Callable[[], object]]:
    """The attack with one optimisation after the other: what each is worth."""
    x, y = setting.data()
    author, plain = setting.build(), [m.eval().requires_grad_(False) for m in setting.build()]
    candidates: dict[str, Callable[[], object]] = {
        "author": lambda: peers.author_pgd(author, x, y, setting.steps),
        "eval mode, no weight gradients": lambda: peers.eager_pgd(plain, x, y, setting.steps),
    }
    on_gpu = setting.device.startswith("cuda")
    rungs = {"folded BatchNorm, fused step": "loop", "channels_last": "loop+channels_last", "or vmap": "vmap"}
    if on_gpu:
        rungs |= {"or streams": "streams", "streams in a graph": "streams+graph", "vmap in a graph": "vmap+graph"}
        rungs |= {"streams, channels_last, in a graph": "streams+channels_last+graph"}
        rungs |= {"members as one network": "fused", "members as one network, in a graph": "fused+graph"}
    elif winograd.missing() is None:
        rungs["channels_last, Winograd"] = "loop+channels_last+winograd"
        rungs["members as one network"] = "fused"
    if compiled:
        rungs["channels_last, compiled"] = "loop+channels_last+compile"
    attack = our_attack(setting)
    for name, backend in rungs.items():
        ensemble = Ensemble(setting.build(), backend)
        candidates[name] = partial(attack.perturb, ensemble, x, y)
    return candidates


def our_step(setting: Setting, compiled: bool) -> Callable[[], object]:
    """One CEAT step as the trainer makes it: on a GPU one replay of a graph."""
    ensemble = our_ensemble(setting, compiled, captured=setting.device.startswith("cuda"))
    x, y = setting.data()
    batch = Batch(x, y, torch.arange(len(x), device=x.device))
    config = TrainConfig(
        method=CEAT(peers.LAM, peers.MU),
        attack=AttackConfig(peers.EPS, peers.ALPHA, setting.steps, precision=setting.precision),
        batch_size=setting.batch,
        precision=setting.precision,
    )
    stepper = Stepper(config, ensemble.train(), Layout(x.device, setting.members), steps_per_epoch=391)
    steps = itertools.count()
    return lambda: stepper.step(next(steps) % 391, batch, setting.batch)


def step_candidates(setting: Setting, compiled: bool) -> dict[str, Callable[[], object]]:
    """One whole CEAT training step on one batch, each way."""
    x, y = setting.data()
    author, plain = setting.build(), setting.build()
    author_sgd, plain_sgd = sgd(author), sgd(plain)
    candidates: dict[str, Callable[[], object]] = {
        "author": lambda: peers.author_step(author, author_sgd, x, y, setting.steps),
        "eager": lambda: peers.eager_step(plain, peer_calls(plain, setting, False), plain_sgd, x, y, setting.steps),
    }
    if compiled:
        members = setting.build()
        calls, optimizers = peer_calls(members, setting, True), sgd(members)
        candidates["compiled"] = lambda: peers.eager_step(members, calls, optimizers, x, y, setting.steps)
    candidates["ceat_fast"] = our_step(setting, compiled)
    return candidates


def attack_flops(setting: Setting) -> int:
    """Floating-point operations of one attack: forward passes and input gradients of all members."""
    ensemble = Ensemble(setting.build(), "loop")
    x, _ = setting.data()
    with FlopCounterMode(display=False) as counter, frozen(ensemble) as view:
        point = x[:1].requires_grad_()
        view(point).sum().backward()
    return counter.get_total_flops() * setting.batch * setting.steps
