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
from typing import ClassVar

from torch import Tensor

from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import ceat_loss
from ceat_fast.methods.base import Batch, StepOutput
from ceat_fast.methods.calibrated import DistanceSettings
from ceat_fast.methods.smoothing import LabelSmoothing
from ceat_fast.methods.terms import cross_entropy


@dataclass
class CEAT(DistanceSettings, LabelSmoothing):
    """Cross-entropy plus the calibrated distances (eq. 22); the settings are those of `DistanceSettings`."""

    always_in_label: ClassVar[tuple[str, ...]] = ("lam", "mu")
    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        LabelSmoothing.__post_init__(self)
        if self.plus_ceat is not None:
            raise ValueError(f"plus_ceat must be left out of CEAT, which has that distance, got {self.plus_ceat}")

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial, per_member=False)
        nat_logits = ensemble.member_logits(batch.images, per_member=False)
        if self.samples == "all":
            losses, pieces = ceat_loss(adv_logits, nat_logits, batch.labels, return_parts=True, **self.loss_settings)
            parts = pieces._asdict()
        else:
            distances, parts = self.distances(adv_logits, nat_logits, batch.labels)
            losses = cross_entropy(adv_logits, batch.labels).mean(1) + distances
        return StepOutput(self.smoothed(losses, adv_logits, batch.labels), parts, adv_logits, nat_logits)
