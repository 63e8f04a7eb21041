"""The CEAT loss, forward and backward through autograd, against what one would write otherwise.

    python bench/loss.py [--json FILE] [--rounds N]

a  author style: Python loops over members and pairs of peers     b  vectorised eager torch
c  torch.compile of b                                             d  F.cross_entropy on the adversarial logits alone
floor  an autograd.Function of both logits that computes nothing: what torch itself takes for such a loss
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import Timing, compare
from torch import Tensor
from torch.nn import functional as F

from ceat_fast.environment import describe_environment
from ceat_fast.loss import ceat_loss

SIZES = ((3, 128, 10), (3, 128, 100), (4, 512, 10), (3, 1024, 1000))
LAM, MU = 1.0, 5.0


def author_loss(adv: list[Tensor], nat: list[Tensor], target: Tensor) -> Tensor:
    """Eq. 22 as a research script writes it: one member at a time, one pair of peers at a time."""
    total = torch.zeros((), device=target.device)
    onehot = F.one_hot(target, adv[0].shape[1]).float()
    for m in range(len(adv)):
        adv_prob, nat_prob = F.softmax(adv[m], dim=1), F.softmax(nat[m], dim=1)
        adv_gap = torch.zeros(len(target), device=target.device)
        nat_gap = torch.zeros(len(target), device=target.device)
        for i in range(len(adv)):
            for j in range(i + 1, len(adv)):
                if m not in (i, j):
                    index = target.unsqueeze(1)
                    adv_h = [F.softmax(adv[n], dim=1).gather(1, index).squeeze(1).detach() for n in (i, j)]
                    nat_h = [F.softmax(nat[n], dim=1).gather(1, index).squeeze(1).detach() for n in (i, j)]
                    adv_gap = torch.maximum(adv_gap, (adv_h[0] - adv_h[1]).abs())
                    nat_gap = torch.maximum(nat_gap, (nat_h[0] - nat_h[1]).abs())
        nat_distance = ((nat_prob - onehot) ** 2).sum(1)
        adv_distance = ((adv_prob - nat_prob) ** 2).sum(1)
        total = total + F.cross_entropy(adv[m], target)
        total = total + (LAM * torch.exp(LAM * nat_gap) * nat_distance).mean()
        total = total + (MU * torch.exp(MU * adv_gap) * adv_distance).mean()
    return total


def vectorised_loss(adv: Tensor, nat: Tensor, target: Tensor) -> Tensor:
    """Eq. 22 in a few tensor operations, the spread of the peers by masking each member out."""
    members, _, classes = adv.shape
    labels = target.expand(members, -1)
    adv_log, nat_prob = adv.log_softmax(-1), nat.softmax(-1)
    adv_prob = adv_log.exp()
    index = labels.unsqueeze(-1)
    ce = -adv_log.gather(-1, index).squeeze(-1)
    self_mask = torch.eye(members, dtype=torch.bool, device=adv.device).unsqueeze(-1)

    def spread(prob: Tensor) -> Tensor:
        h = prob.detach().gather(-1, index).squeeze(-1).expand(members, -1, -1)
        return h.masked_fill(self_mask, -1).amax(1) - h.masked_fill(self_mask, 2).amin(1)

    onehot = F.one_hot(target, classes).to(adv.dtype)
    nat_distance = (nat_prob - onehot).square().sum(-1)
    adv_distance = (adv_prob - nat_prob).square().sum(-1)
    loss = ce + LAM * (LAM * spread(nat_prob)).exp() * nat_distance + MU * (MU * spread(adv_prob)).exp() * adv_distance
    return loss.mean(-1).sum()


class Nothing(torch.autograd.Function):
    """(M,) zeros, and gradients that were made before."""

    @staticmethod
    def forward(ctx: Any, adv: Tensor, nat: Tensor, grads: tuple[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(*grads)
        return adv.new_zeros(len(adv))

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
    ready = torch.zeros_like(adv), torch.zeros_like(nat)

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
            "floor": lambda: run(Nothing.apply(adv, nat, ready).sum()),
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
    for heading in ("(M, B, K)", "ours", "a", "b", "c", "d", "floor", "a/ours", "b/ours", "c/ours", "ours/d"):
        table.add_column(heading, justify="right")
    results = []
    for size in SIZES:
        timings = measure(*size, arguments.rounds, arguments.device)
        t = {name: timing.median for name, timing in timings.items()}
        table.add_row(
            str(size),
            *(f"{t[name] * 1e6:,.0f}" for name in ("ours", "a", "b", "c", "d", "floor")),
            *(f"{t[name] / t['ours']:.1f}" for name in ("a", "b", "c")),
            f"{t['ours'] / t['d']:.2f}",
        )
        results.append({"size": size, "seconds": {name: timing.as_dict() for name, timing in timings.items()}})
    Console().print(table)
    if arguments.json:
        record = {"command": "python bench/loss.py", "environment": describe_environment(), "results": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
