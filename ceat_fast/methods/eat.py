"""Ensemble adversarial training, the baseline (eq. 5 and 6 of the CEAT paper, arXiv 2509.00089).

    L_m = CE(z_m(x + delta_en), y)

delta_en is the perturbation found against the ensemble (eq. 3), shared by the members, each with its own optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, StepOutput
from ceat_fast.methods.smoothing import LabelSmoothing
from ceat_fast.methods.terms import cross_entropy, true_class_disparity


@dataclass
class EAT(LabelSmoothing):
    """Cross-entropy of every member on the ensemble's adversarial input (eq. 5)."""

    capturable: ClassVar[bool] = True

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        logits = ensemble.member_logits(adversarial, per_member=self.goal == "members")
        ce = cross_entropy(logits, batch.labels)
        parts = {"ce": ce.detach(), "adv_disparity": true_class_disparity(ce.detach())}
        return StepOutput(self.smoothed(ce.mean(1), logits, batch.labels), parts, logits, None)
