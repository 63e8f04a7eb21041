"""The loss, the ensemble output and the PGD step in plain torch: the readable specification.

Every other backend is tested against this file, which is itself the backend "torch".
Gradients come from autograd. Shapes: M members, B samples, K classes; `adv`, `nat` are logits (M, B, K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PAIR_REDUCTIONS = ("max", "mean", "sum")
REDUCTIONS = ("none", "mean", "sum")


class CeatSettings(NamedTuple):
    """Scalars of eq. 22 as every backend takes them, in this order (see `ceat_fast.loss` for their meaning)."""

    ce_coefficient: float  # 1 for the whole loss, 0 for the calibrated distance alone
    nat_coefficient: float  # lam, divided by K for distance_reduction="mean"
    adv_coefficient: float  # mu, divided by K for distance_reduction="mean"
    nat_exponent: float
    adv_exponent: float
    max_weight: float  # inf: no cap
    pair_reduction: int  # index into PAIR_REDUCTIONS
    reduction: int  # index into REDUCTIONS, over the batch
    detach_nat: bool


class CeatParts(NamedTuple):
    """The pieces of eq. 22 per member and sample, each (M, B), without gradient.

    The loss is `ce + lam * nat_weight * nat + mu * adv_weight * adv`.
    """

    ce: Tensor  # cross-entropy of the adversarial input, eq. 6
    nat: Tensor  # squared distance of the clean probabilities to the one-hot label, eq. 20
    adv: Tensor  # squared distance of adversarial and clean probabilities, eq. 17
    nat_disparity: Tensor  # D of the peers on the clean input
    adv_disparity: Tensor  # D of the peers on the adversarial input
    nat_weight: Tensor  # e^D of eq. 21
    adv_weight: Tensor  # e^D of eq. 18


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in fp32, fp64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def disparity(true_prob: Tensor, pair_reduction: str = "max") -> Tensor:
    """Leave-one-out pairwise disparity: (M, B) true-class probabilities -> (M, B).

    D_m = R over pairs {i < j, i != m, j != m} of |h_i - h_j|; zero where M <= 2 leaves no pair.
    """
    members = true_prob.shape[0]
    if members <= 2:
        return torch.zeros_like(true_prob)
    rows = []
    for m in range(members):
        peers = torch.cat([true_prob[:m], true_prob[m + 1 :]])
        i, j = torch.triu_indices(members - 1, members - 1, offset=1, device=true_prob.device)
        gaps = (peers[i] - peers[j]).abs()
        reduced = gaps.amax(0) if pair_reduction == "max" else gaps.sum(0)
        rows.append(reduced / len(i) if pair_reduction == "mean" else reduced)
    return torch.stack(rows)


def ceat_loss(adv: Tensor, nat: Tensor, target: Tensor, settings: CeatSettings) -> tuple[Tensor, CeatParts]:
    """Eq. 22: ((M,) or (M, B) losses, parts). Computed in fp32, or fp64 for fp64 logits."""
    dtype = compute_dtype(adv.dtype)
    adv, nat = adv.to(dtype), nat.to(dtype)
    members, _, classes = adv.shape
    labels = target.expand(members, -1)
    ce = F.cross_entropy(adv.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    adv_prob, nat_prob = adv.softmax(-1), nat.softmax(-1)
    # F.one_hot looks at the labels, which vmap over derivatives forbids.
    onehot = (target.unsqueeze(-1) == torch.arange(classes, device=target.device)).to(dtype)
    peer_prob = nat_prob.detach() if settings.detach_nat else nat_prob
    nat_distance = (nat_prob - onehot).square().sum(-1)
    adv_distance = (adv_prob - peer_prob).square().sum(-1)

    def true_prob(prob: Tensor) -> Tensor:
        return prob.detach().gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    pair_reduction = PAIR_REDUCTIONS[settings.pair_reduction]
    nat_disparity = disparity(true_prob(nat_prob), pair_reduction)
    adv_disparity = disparity(true_prob(adv_prob), pair_reduction)
    nat_weight = (settings.nat_exponent * nat_disparity).exp().clamp(max=settings.max_weight)
    adv_weight = (settings.adv_exponent * adv_disparity).exp().clamp(max=settings.max_weight)

    loss = (
        settings.ce_coefficient * ce
        + settings.nat_coefficient * nat_weight * nat_distance
        + settings.adv_coefficient * adv_weight * adv_distance
    )
    parts = CeatParts(
        ce.detach(),
        nat_distance.detach(),
        adv_distance.detach(),
        nat_disparity,
        adv_disparity,
        nat_weight,
        adv_weight,
    )
    return reduce_batch(loss, settings.reduction), parts


def reduce_batch(loss: Tensor, reduction: int) -> Tensor:
    """(..., B) -> (...) for "mean" and "sum"; unchanged for "none"."""
    if REDUCTIONS[reduction] == "none":
        return loss
    return loss.mean(-1) if REDUCTIONS[reduction] == "mean" else loss.sum(-1)


def ensemble_log_prob(logits: Tensor) -> Tensor:
    """Eq. 1: log of the mean member probability, (M, B, K) -> (B, K), in fp32 (fp64 for fp64 logits).

    logsumexp keeps the value and the gradient finite where a clamp on the mean would not.
    """
    log_prob = logits.to(compute_dtype(logits.dtype)).log_softmax(-1)
    members = torch.full((), logits.shape[0], dtype=log_prob.dtype, device=logits.device)  # no copy from the host
    return log_prob.logsumexp(0) - members.log()


def ensemble_cross_entropy(logits: Tensor, target: Tensor, reduction: int) -> Tensor:
    """Cross-entropy of eq. 1: (M, B, K), (B,) -> () or (B,)."""
    losses = F.nll_loss(ensemble_log_prob(logits), target, reduction="none")
    return reduce_batch(losses, reduction)


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float | Tensor) -> Tensor:
    """Clamp x_adv + alpha * sign(grad) to the Linf ball of radius eps around x and to [0, 1]; NaN stays NaN.

    eps is one radius, or a tensor of radii that broadcasts over x.
    """
    sign = torch.where(grad.isnan(), grad, grad.sign())  # torch.sign(NaN) is 0
    step = x_adv + alpha * sign.to(x_adv.dtype)
    return torch.minimum(torch.maximum(step, x - eps), x + eps).clamp(0.0, 1.0)
