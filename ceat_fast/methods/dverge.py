"""Diversifying vulnerabilities (Yang et al., NeurIPS 2020, arXiv 2009.14720), with adversarial training.

    L_i = distillation * sum_{j != i} CE(z_i(x'_j), y) + CE(z_i(x + delta_i), y)

x'_j looks like x, but in a layer of member j it has the features of another image (see `vulnerable`); delta_i attacks
member i alone (eq. 2 of the CEAT paper). The layer is drawn once per epoch. The sum over j is not averaged; means over
the batch.

x'_j is a constant: each member learns from its own loss only. Passes of member i: x + delta_i, then x'_{i+1} to
x'_{i+M-1} (modulo M), each normalised by its own BatchNorm statistics.

| | eps, alpha, steps, distillation | optimizer |
|---|---|---|
| original | 0.07, 0.007, 10, 1 | SGD 0.1 per member, 200 epochs, from a standard-trained ensemble |
| CEAT paper, section 4.1 | not given | SGD 0.01 per member, 120 epochs, /10 at 75 and 95 |

The original takes features before the activation, in training mode; here they are those of the normalisation layers, in
eval mode, so that the search leaves the running statistics alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, StepOutput
from ceat_fast.methods.terms import cross_entropy
from ceat_fast.methods.vulnerable import DistillingMethod


@dataclass
class DVERGE(DistillingMethod):
    """Cross-entropy on the other members' distilled inputs and on the member's own adversarial input.

    Args:
        distillation: coefficient of the cross-entropy on distilled inputs, >= 0.
    """

    distillation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("distillation", self.distillation, 0)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adversarial, distilled = adversarial
        adv_logits = ensemble.member_logits(adversarial, per_member=True)
        adv_ce = cross_entropy(adv_logits, batch.labels)
        others = torch.zeros_like(adv_ce)
        for offset in range(1, len(distilled)):
            logits = ensemble.member_logits(distilled.roll(-offset, 0), per_member=True)
            others = others + cross_entropy(logits, batch.labels)
        losses = (self.distillation * others + adv_ce).mean(1)
        return StepOutput(losses, {"distilled_ce": others.detach()}, adv_logits, None)
