"""What one would use without this package: the author-style loops, and the best that plain PyTorch does.

* author  Python loops over members and pairs of peers; the attack runs in train mode, computes the gradients of all
          weights at every step and throws them away, and draws its noise on the host
* eager   the best eager loop: eval mode, no weight gradients, one gradient call per step
* compiled   the same with every member through torch.compile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ceat_fast.methods.features import features

EPS, ALPHA = 0.031, 0.007
LAM, MU = 1.0, 5.0
DISTILL_EPS, DISTILL_ALPHA, DISTILL_STEPS = 0.07, 0.007, 10

Members = Sequence[nn.Module]


def author_loss(adv: Sequence[Tensor], nat: Sequence[Tensor], target: Tensor) -> Tensor:
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
    adv_log, nat_prob = adv.float().log_softmax(-1), nat.float().softmax(-1)
    adv_prob = adv_log.exp()
    index = labels.unsqueeze(-1)
    ce = -adv_log.gather(-1, index).squeeze(-1)
    self_mask = torch.eye(members, dtype=torch.bool, device=adv.device).unsqueeze(-1)

    def spread(prob: Tensor) -> Tensor:
        h = prob.detach().gather(-1, index).squeeze(-1).expand(members, -1, -1)
        return h.masked_fill(self_mask, -1).amax(1) - h.masked_fill(self_mask, 2).amin(1)

    onehot = F.one_hot(target, classes).to(adv_log.dtype)
    nat_distance = (nat_prob - onehot).square().sum(-1)
    adv_distance = (adv_prob - nat_prob).square().sum(-1)
    loss = ce + LAM * (LAM * spread(nat_prob)).exp() * nat_distance + MU * (MU * spread(adv_prob)).exp() * adv_distance
    return loss.mean(-1).sum()


def author_pgd(members: Members, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Eq. 3 as research scripts write it; the members are in train mode."""
    x_adv = (x + torch.empty_like(x, device="cpu").uniform_(-EPS, EPS).to(x.device)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        prob = sum(F.softmax(member(x_adv), dim=1) for member in members) / len(members)
        loss = F.nll_loss(torch.log(prob.clamp(min=1e-40)), y)
        for member in members:
            member.zero_grad()
        loss.backward()
        x_adv = x_adv.detach() + ALPHA * x_adv.grad.sign()
        x_adv = torch.max(torch.min(x_adv, x + EPS), x - EPS).clamp(0, 1)
    return x_adv.detach()


def author_step(
    members: Members, optimizers: Sequence[torch.optim.Optimizer], x: Tensor, y: Tensor, steps: int
) -> None:
    """Attack and update in the author's style: one backward and one optimizer per member."""
    x_adv = author_pgd(members, x, y, steps)
    adv, nat = [member(x_adv) for member in members], [member(x) for member in members]
    for optimizer in optimizers:
        optimizer.zero_grad()
    author_loss(adv, nat, y).backward()
    for optimizer in optimizers:
        optimizer.step()


def author_distill(member: nn.Module, layer: str, x: Tensor, target: Tensor) -> Tensor:
    """DVERGE's search by features as its authors describe it: those of the target are computed at every step."""
    x_adv, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(DISTILL_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.mse_loss(features(member, layer, x_adv), features(member, layer, target))
        member.zero_grad()
        loss.backward()
        norm = x_adv.grad.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
        momentum = momentum + x_adv.grad / norm
        x_adv = x_adv.detach() - DISTILL_ALPHA * momentum.sign()
        x_adv = torch.max(torch.min(x_adv, x + DISTILL_EPS), x - DISTILL_EPS).clamp(0, 1)
    return x_adv.detach()


def author_dverge_step(
    members: Members,
    optimizers: Sequence[torch.optim.Optimizer],
    layers: Sequence[str],
    x: Tensor,
    y: Tensor,
    steps: int,
) -> None:
    """DVERGE with adversarial training in the author's style: everything one member at a time, in train mode.

    layers: one layer of every member.
    """
    target = x.roll(1, 0)
    distilled = [author_distill(member, layer, x, target) for member, layer in zip(members, layers, strict=True)]
    adversarial = [author_pgd([member], x, y, steps) for member in members]
    for i, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        loss = F.cross_entropy(member(adversarial[i]), y)
        for j, other in enumerate(distilled):
            if j != i:
                loss = loss + F.cross_entropy(member(other), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def eager_pgd(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Eq. 3 on members in eval mode whose parameters need no gradient."""
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    x_adv = torch.empty_like(x).uniform_(-EPS, EPS).add_(x).clamp_(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        log_prob = torch.stack([call(x_adv).float() for call in calls]).log_softmax(-1).logsumexp(0)
        (grad,) = torch.autograd.grad(F.nll_loss(log_prob, y, reduction="sum"), x_adv)
        x_adv = torch.clamp(x_adv.detach() + ALPHA * grad.sign(), low, high)
    return x_adv


def eager_step(
    members: Members,
    calls: Sequence[Callable[[Tensor], Tensor]],
    optimizers: Sequence[torch.optim.Optimizer],
    x: Tensor,
    y: Tensor,
    steps: int,
) -> None:
    """The best plain loop for a whole step: eval mode for the attack, the vectorised loss for the update."""
    for member in members:
        member.eval().requires_grad_(False)
    x_adv = eager_pgd(calls, x, y, steps)
    for member in members:
        member.train().requires_grad_(True)
    adv, nat = torch.stack([call(x_adv) for call in calls]), torch.stack([call(x) for call in calls])
    for optimizer in optimizers:
        optimizer.zero_grad()
    vectorised_loss(adv, nat, y).backward()
    for optimizer in optimizers:
        optimizer.step()
