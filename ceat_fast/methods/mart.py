"""Misclassification-aware adversarial training (Wang et al., MART, ICLR 2020), for every member by itself.

    L_m = -log p~_y - log(1 - max_{k != y} p~_k) + beta * KL(p || p~) * (1 - p_y)

p = p_m(x), p~ = p_m(x~), x~ attacks member m (eq. 2 of the CEAT paper). Means over the batch; p carries gradient in the
divergence and in its weight. Passes: x~, x. The second logarithm is taken as log(sum of the other probabilities), which
is exact where the runner-up has nearly all of the probability.

Original: beta 5, SGD 0.01, weight decay 3.5e-3, 120 epochs, /10 at 75, 90 and 100. Not among the methods of the CEAT
paper, whose recipe resembles this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, Method, StepOutput
from ceat_fast.methods.terms import divergence, widened


@dataclass
class MART(Method):
    """Boosted cross-entropy, and a divergence that weighs misclassified samples more.

    Args:
        beta: coefficient of the weighted divergence, >= 0.
    """

    beta: float = 5.0

    goal: ClassVar[str] = "members"

    def __post_init__(self) -> None:
        require_number("beta", self.beta, 0)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial, per_member=True)
        nat_logits = ensemble.member_logits(batch.images, per_member=False)
        adv, nat = widened(adv_logits).log_softmax(-1), widened(nat_logits).log_softmax(-1)
        labels = batch.labels.expand(len(adv), -1).unsqueeze(-1)
        runner_up = adv.scatter(-1, labels, -torch.inf).argmax(-1, keepdim=True)
        rest = adv.scatter(-1, runner_up, -torch.inf).logsumexp(-1)
        boosted = -adv.gather(-1, labels).squeeze(-1) - rest
        weighted = divergence(nat, adv) * (1 - nat.gather(-1, labels).squeeze(-1).exp())
        parts = {"boosted_ce": boosted.detach(), "weighted_divergence": weighted.detach()}
        return StepOutput((boosted + self.beta * weighted).mean(1), parts, adv_logits, nat_logits)
