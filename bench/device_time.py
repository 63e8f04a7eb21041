"""Where the time of a training step goes on a GPU: its parts, each as one CUDA graph, so that launches do not count.

    python bench/device_time.py [--json FILE] [--parts loss chains ...] [--device cuda]

loss           the loss op, value and both gradients, and a copy that moves as many bytes
convolutions   3x3, all members: torch's one after the other, and ours with residual and ReLU; the gradient with both
chains         a stage of ResNet-20 as one launch, and its gradient
attack         PGD-10 in each execution
training       clean and adversarial forward, loss and backward in each execution
step           attack, losses, backward and optimizer as the trainer makes them, on the host's clock
On a CPU, where there are no graphs, the calls are timed as they are; `loss` and `chains` are measured on a GPU alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from contenders import DTYPES, Setting, our_attack, our_step
from records import write_record
from rich.console import Console
from rich.table import Table
from timing import compare
from torch.nn import functional as F

from ceat_fast import Ensemble
from ceat_fast.ensemble.graphs import beside, capture
from ceat_fast.loss import ceat_loss
from ceat_fast.ops import convolution, dispatch, native
from ceat_fast.ops.chain import Chain, Link
from ceat_fast.ops.convolution import MemberWeights
from ceat_fast.ops.reference import CeatSettings

WIDTHS = ((16, 32), (32, 16), (64, 8))  # channels and sides of ResNet-20's stages
WAYS = ("streams", "streams+channels_last", "fused")
CPU_WAYS = ("loop", "loop+channels_last")
LOSSES = ((3, 128, 10), (3, 128, 100), (3, 1024, 1000), (4, 65536, 10), (3, 16384, 1000))
_LINKS = 6
_REPLAYS = 9
_BEYOND_CACHES = 1 << 29  # bytes
_SMALL = 1 << 20


def seconds(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Median time of a call in a graph of so many; on a CPU, of a call."""
    if not device.startswith("cuda"):
        return compare({"": call}, rounds=3, device=device)[""].median
    for _ in range(3):
        beside(call, torch.device(device))
    replay = capture(lambda: [call() for _ in range(repeats)])
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / repeats)
    return statistics.median(times)


def loss(setting: Setting) -> dict[str, float]:
    """Tensors larger than the caches take turns."""
    if not setting.device.startswith("cuda"):
        return {}
    settings = CeatSettings(1.0, peers.LAM, peers.MU, peers.LAM, peers.MU, float("inf"), 0, 1, False)
    module = dispatch.module(dispatch.backend_name("auto", torch.device(setting.device).type))
    found = {}
    for dtype, (members, batch, classes) in itertools.product((torch.float32, torch.bfloat16), LOSSES):
        moved = 4 * members * batch * classes * dtype.itemsize  # two logits in, two gradients out
        turns = max(1, min(32, _BEYOND_CACHES // moved)) if moved > _SMALL else 1
        size = turns, members, batch, classes
        adv, nat = (torch.randn(size, device=setting.device).to(dtype) for _ in range(2))
        sources = torch.zeros(turns, moved // 2, device=setting.device, dtype=torch.uint8)
        target = torch.randint(0, classes, (batch,), device=setting.device)

        def losses(adv=adv, nat=nat, target=target) -> object:
            return [module.ceat_loss(a, n, target, settings, True, False) for a, n in zip(adv, nat, strict=True)]

        def copies(sources=sources) -> object:
            return [source.clone() for source in sources]

        name = f"{members}x{batch}x{classes} {str(dtype).removeprefix('torch.')}"
        found[name] = seconds(losses, setting.device, 100 if turns == 1 else 1) / turns
        found[f"{name}, copy"] = seconds(copies, setting.device, 100 if turns == 1 else 1) / turns
    return found


def chains(setting: Setting) -> dict[str, float]:
    found: dict[str, float] = {}
    if not setting.device.startswith("cuda") or native.missing("cuda") is not None:
        return found
    dtype = torch.bfloat16
    for width, side in WIDTHS:
        x, grad = (
            torch.randn(setting.members, setting.batch, side, side, width, device=setting.device, dtype=dtype)
            for _ in range(2)
        )
        links = []
        for number in range(_LINKS):
            weight = torch.randn(setting.members, width, 3, 3, width, device=setting.device, dtype=dtype)
            bias = torch.randn(setting.members, width, device=setting.device, dtype=dtype)
            links.append(Link(MemberWeights(weight / (3 * width**0.5), bias, 1), number % 2 == 1, relu=True))
        chain = Chain(links)
        _, masks = chain.run(x, None, masked=True)
        time_of = partial(seconds, device=setting.device, repeats=10)
        found[f"{_LINKS} of {width}@{side}"] = time_of(partial(chain.run, x, None, masked=True))
        found[f"{_LINKS} of {width}@{side}, gradient"] = time_of(partial(chain.input_gradient, grad, masks))
    return found


def convolutions(setting: Setting) -> dict[str, float]:
    found, dtype = {}, DTYPES[setting.precision]
    for width, side in WIDTHS:
        size = setting.members, setting.batch, side, side, width
        x, residual, gate = (torch.randn(size, device=setting.device, dtype=dtype) for _ in range(3))
        weight = torch.randn(setting.members, width, 3, 3, width, device=setting.device, dtype=dtype) / (3 * width**0.5)
        bias = torch.randn(setting.members, width, device=setting.device, dtype=dtype)
        images, filters, skips = (t.permute(0, 1, 4, 2, 3) for t in (x, weight, residual))

        def by_torch(images=images, filters=filters, bias=bias, skips=skips) -> object:
            rows = zip(images, filters, bias, skips, strict=True)
            return [F.relu_(F.conv2d(i, w, b, padding=1).add_(s)) for i, w, b, s in rows]

        time_of = partial(seconds, device=setting.device, repeats=10)
        found[f"{width}@{side}, torch"] = time_of(by_torch)
        if convolution.missing(torch.device(setting.device).type, dtype) is None:
            ours = MemberWeights(weight, bias, 1)
            found[f"{width}@{side}, ours"] = time_of(partial(ours.convolve, x, residual, relu=True))
            found[f"{width}@{side}, ours, gradient"] = time_of(
                partial(ours.input_gradient, x, side, side, residual, gate)
            )
    return found


def attack_call(setting: Setting, backend: str) -> Callable[[], object]:
    ensemble, attack = Ensemble(setting.build(), backend), our_attack(setting)
    x, y = setting.data()
    index = torch.arange(len(x), device=x.device)
    return lambda: attack.perturb(ensemble, x, y, index)


def training_call(setting: Setting, backend: str) -> Callable[[], object]:
    ensemble = Ensemble(setting.build(), backend).train()
    x, y = setting.data()
    weights = list(ensemble.parameters())

    def call() -> object:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            adv, nat = ensemble.member_logits(x), ensemble.member_logits(x)
        return torch.autograd.grad(ceat_loss(adv, nat, y).sum(), weights)

    return call


def attack(setting: Setting) -> dict[str, float]:
    ways = WAYS if setting.device.startswith("cuda") else CPU_WAYS
    found = {name: seconds(attack_call(setting, name), setting.device) for name in ways}
    if "fused" in ways:
        one = dataclasses.replace(setting, members=1)
        found["fused, one member"] = seconds(attack_call(one, "fused"), setting.device)
    return found


def training(setting: Setting) -> dict[str, float]:
    ways = WAYS if setting.device.startswith("cuda") else CPU_WAYS
    return {name: seconds(training_call(setting, name), setting.device) for name in ways}


def step(setting: Setting) -> dict[str, float]:
    name = "captured" if setting.device.startswith("cuda") else "plain"
    return {name: compare({"": our_step(setting, compiled=False)}, rounds=5, device=setting.device)[""].median}


PARTS: dict[str, Callable[[Setting], dict[str, float]]] = {
    part.__name__: part for part in (loss, convolutions, chains, attack, training, step)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    precision = "bf16" if arguments.device.startswith("cuda") else "fp32"
    setting = Setting(device=arguments.device, precision=precision, batch=arguments.batch, steps=arguments.steps)
    found: dict[str, Any] = {"precision": precision}
    table = Table("part", "way", "microseconds")
    for name in arguments.parts:
        found[name] = PARTS[name](setting)
        for way, time in found[name].items():
            table.add_row(name, way, f"{1e6 * time:,.1f}")
        if arguments.json is not None:
            write_record(arguments.json, found)
    Console().print(table)


if __name__ == "__main__":
    main()
