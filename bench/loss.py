"""The CEAT loss, forward and backward through autograd, against what one would write otherwise.

    python bench/loss.py [--json FILE] [--rounds N]

a  author style: Python loops over members and pairs of peers     b  vectorised eager torch
c  torch.compile of b                                             d  F.cross_entropy on the adversarial logits alone
floor  an autograd.Function that takes the exponentials of both logits for their gradients, and does nothing else:
       no loss with two softmaxes can be faster through autograd
bare   our kernel in such a Function, with nothing looked at and no setting that could be another
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peers import LAM, MU, author_loss, vectorised_loss
from records import write_record
from rich.console import Console
from rich.table import Table
from timing import Timing, compare
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.loss import ceat_loss
from ceat_fast.ops import dispatch
from ceat_fast.ops.reference import CeatSettings

SIZES = ((3, 128, 10), (3, 128, 100), (4, 512, 10), (3, 1024, 1000))
WAYS = ("ours", "a", "b", "c", "d", "floor", "bare")


class Exponentials(torch.autograd.Function):
    """(M,) zeros, with exp of the logits as gradients."""

    @staticmethod
    def forward(ctx: Any, adv: Tensor, nat: Tensor) -> Tensor:
        ctx.save_for_backward(adv.exp(), nat.exp())
        return adv.new_zeros(len(adv))

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


class Bare(torch.autograd.Function):
    """(M,) losses of the paper's setting, straight from the kernel."""

    @staticmethod
    def forward(ctx: Any, adv: Tensor, nat: Tensor, target: Tensor) -> Tensor:
        settings = CeatSettings(1.0, LAM, MU, LAM, MU, float("inf"), 0, 1, False)
        module = dispatch.module(dispatch.backend_name("auto", adv.device.type))
        losses, *gradients, _ = module.ceat_loss(adv, nat, target, settings, True, False)
        ctx.save_for_backward(*gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None


def measure(members: int, samples: int, classes: int, rounds: int, device: str) -> dict[str, Timing]:
    """Seconds per forward and backward of each way, interleaved."""
    torch.manual_seed(0)
    shape = (members, samples, classes)
    adv = torch.randn(shape, device=device, requires_grad=True)
    nat = torch.randn(shape, device=device, requires_grad=True)
    target = torch.randint(0, classes, (samples,), device=device)
    repeated = target.repeat(members)
    compiled = torch.compile(vectorised_loss)

    def run(loss: Tensor) -> None:
        adv.grad = nat.grad = None
        loss.backward()

    return compare(
        {
            "ours": lambda: run(ceat_loss(adv, nat, target, lam=LAM, mu=MU).sum()),
            "a": lambda: run(author_loss(list(adv), list(nat), target)),
            "b": lambda: run(vectorised_loss(adv, nat, target)),
            "c": lambda: run(compiled(adv, nat, target)),
            "d": lambda: run(F.cross_entropy(adv.view(-1, classes), repeated)),
            "floor": lambda: run(Exponentials.apply(adv, nat).sum()),
            "bare": lambda: run(Bare.apply(adv, nat, target).sum()),
        },
        rounds=rounds,
        device=device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds per size (default 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    table = Table(title="CEAT loss, forward + backward, median microseconds")
    ratios = ("a/ours", "b/ours", "c/ours", "ours/d", "a/floor", "b/floor", "c/floor", "floor/d", "bare/d")
    for heading in ("(M, B, K)", *WAYS, *ratios):
        table.add_column(heading, justify="right")
    results = []
    for size in SIZES:
        timings = measure(*size, arguments.rounds, arguments.device)
        t = {name: timing.median for name, timing in timings.items()}
        table.add_row(
            str(size),
            *(f"{t[name] * 1e6:,.0f}" for name in WAYS),
            *(f"{t[name] / t['ours']:.1f}" for name in ("a", "b", "c")),
            f"{t['ours'] / t['d']:.2f}",
            *(f"{t[name] / t['floor']:.1f}" for name in ("a", "b", "c")),
            *(f"{t[name] / t['d']:.2f}" for name in ("floor", "bare")),
        )
        results.append({"size": size, "seconds": {name: timing.as_dict() for name, timing in timings.items()}})
    Console(width=150).print(table)
    if arguments.json:
        write_record(arguments.json, {"results": results})


if __name__ == "__main__":
    main()
