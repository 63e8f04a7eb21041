"""Latent feature diversification (Zhuang, Huang and Gao, Pattern Recognition 2024), with adversarial training.

    L_i = diversification * softCE(z_i(x'_c | mixed), t_i) + CE(z_i(x + delta_i), y)

x'_j is distilled from member j as in DVERGE (see `vulnerable`); c is a peer of i drawn anew for every batch. On the
way of x'_c through member i, the features h of the drawn layer are mixed with member i's own features of what the
M - 2 other peers gave:

    h <- a * h + (1 - a) * mean_{j != i, c} h_i(x'_j)         a ~ U(0, 1), one number per sample

t_i is the label smoothed by the level i * smoothing: 1 - i * smoothing for the true class, i * smoothing / (K - 1) for
each other one. delta_i attacks member i alone (eq. 2 of the CEAT paper). With two members nothing is left to mix.

Re-derived from the description: the public code never mixes, fixes `a` for batches of 64, smooths to targets that do
not sum to 1, and divides by M - 2. Gradient flows through both mixed features. Passes of member i: x + delta_i; the
M - 2 others up to the layer; x'_c.

| | eps, alpha, steps, smoothing | optimizer |
|---|---|---|
| original | 0.07, 0.007, 10, 0.1 | SGD 0.1 per member, 200 epochs, from a standard-trained ensemble |
| CEAT paper, section 4.1 | not given | SGD 0.01 per member, 120 epochs, /10 at 75 and 95 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, StepOutput
from ceat_fast.methods.features import features, replaced_output
from ceat_fast.methods.terms import cross_entropy, widened
from ceat_fast.methods.vulnerable import DistillingMethod


@dataclass
class LAFED(DistillingMethod):
    """Smoothed cross-entropy on mixed features of the peers' inputs, and cross-entropy on the own adversarial input.

    Args:
        smoothing: label smoothing per level, >= 0; the last of M members has M - 1 levels.
        diversification: coefficient of the loss on mixed features, >= 0.
    """

    smoothing: float = 0.1
    diversification: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("smoothing", self.smoothing, 0)
        require_number("diversification", self.diversification, 0)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adversarial, distilled = adversarial
        adv_logits = ensemble.member_logits(adversarial, per_member=True)
        adv_ce = cross_entropy(adv_logits, batch.labels)
        targets = smoothed_targets(batch.labels, adv_logits.shape[0], adv_logits.shape[2], self.smoothing)
        rows = []
        for i, member in enumerate(ensemble.members):
            order = [j for j in torch.randperm(len(distilled)).tolist() if j != i]
            share = torch.rand(len(batch.labels), device=distilled.device)
            rows.append(mixed_logits(member, self.drawn_layers[i], distilled[order[0]], distilled[order[1:]], share))
        soft_ce = -(targets * widened(torch.stack(rows)).log_softmax(-1)).sum(-1)
        losses = (self.diversification * soft_ce + adv_ce).mean(1)
        return StepOutput(losses, {"mixed_ce": soft_ce.detach()}, adv_logits, None)


def mixed_logits(member: nn.Module, layer: str, x: Tensor, others: Sequence[Tensor] | Tensor, share: Tensor) -> Tensor:
    """Logits (B, K) of x (B, ...) whose features at `layer` are mixed with the mean of those of `others`.

    share: (B,) in [0, 1], what remains of the features of x. Without `others` these are plain logits.
    """
    if len(others) == 0:
        logits: Tensor = member(x)
        return logits
    mean = torch.stack([features(member, layer, other) for other in others]).mean(0)

    def mix(own: Tensor) -> Tensor:
        a = share.to(own.dtype).view(-1, *[1] * (own.dim() - 1))
        return a * own + (1 - a) * mean

    with replaced_output(member, layer, mix):
        mixed: Tensor = member(x)
    return mixed


def smoothed_targets(labels: Tensor, members: int, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (M, B, K) target probabilities, each row of sum 1.

    Raises:
        ValueError: so much smoothing that for the last member the true class is not the likeliest.
    """
    level = smoothing * torch.arange(members, device=labels.device).view(-1, 1, 1)
    if smoothing * (members - 1) >= (classes - 1) / classes:
        raise ValueError(
            f"smoothing must be below {(classes - 1) / classes / (members - 1):.3g} for {members} members and "
            f"{classes} classes, so that the true class stays the likeliest for the last member, got {smoothing!r}"
        )
    onehot = nn.functional.one_hot(labels, classes)
    return torch.where(onehot == 1, 1 - level, level / (classes - 1))
