"""Collaborative ensemble adversarial training (eq. 17 to 22 of the CEAT paper, arXiv 2509.00089).

    L_m = CE(z_adv_m, y) + lam * e^(lam * D_nat_m) * ||p_nat_m - onehot(y)||^2
                         + mu * e^(mu * D_adv_m) * ||p_adv_m - p_nat_m||^2

D_m is the disparity of the other members' true-class probabilities. The adversarial input is the ensemble's (eq. 3).
The adversarial and the clean batch pass the members one after the other, so BatchNorm normalises each by its own
statistics and updates its running statistics twice, adversarial first.

The weights reach e^lam and e^mu, 148 in the paper's settings, and multiply the gradient lam- or mu-fold on top.
At learning rates above the paper's 0.01 members can collapse to a constant output, from which they do not return;
`optimizer.grad_clip` and `max_weight` are the remedies (docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import CEATLoss, ceat_loss
from ceat_fast.methods.base import Batch, Method, StepOutput


@dataclass
class CEAT(Method):
    """Cross-entropy plus the calibrated distances (eq. 22); `ceat_fast.loss.ceat_loss` says more about each setting.

    Args:
        lam: coefficient of the clean distance and, unless lam_exponent is given, exponent of its weight, >= 0.
        mu: the same for the adversarial distance, >= 0.
        lam_exponent: exponent of the clean weight, if it is not lam.
        mu_exponent: exponent of the adversarial weight, if it is not mu.
        pair_reduction: how the disparities of several peer pairs become one: "max", "mean" or "sum".
        distance_reduction: squared distances are a "sum" or a "mean" over classes.
        detach_nat: no gradient through the clean probabilities of the adversarial distance.
        max_weight: upper bound of the exponential weights, >= 1; none by default.
        impl: backend of the loss: "auto", "native", "triton" or "torch".
    """

    lam: float = 1.0
    mu: float = 5.0
    lam_exponent: float | None = None
    mu_exponent: float | None = None
    pair_reduction: str = "max"
    distance_reduction: str = "sum"
    detach_nat: bool = False
    max_weight: float | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        CEATLoss(**self.settings)  # refuses what is out of range

    def step(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial)
        nat_logits = ensemble.member_logits(batch.images)
        losses, parts = ceat_loss(adv_logits, nat_logits, batch.labels, return_parts=True, **self.settings)
        return StepOutput(losses, parts._asdict(), adv_logits.detach(), nat_logits.detach())
