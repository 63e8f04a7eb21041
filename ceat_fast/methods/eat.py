"""Ensemble adversarial training, the baseline (eq. 5 and 6 of the CEAT paper, arXiv 2509.00089).

    L_m = CE(z_m(x + delta_en), y)

delta_en is the perturbation found against the ensemble (eq. 3), shared by the members, each with its own optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import disparity
from ceat_fast.methods.base import Batch, Method, StepOutput


@dataclass
class EAT(Method):
    """Cross-entropy of every member on the ensemble's adversarial input (eq. 5); it has no settings."""

    def step(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        logits = ensemble.member_logits(adversarial)
        labels = batch.labels.expand(logits.shape[0], -1)
        ce = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        parts = {"ce": ce.detach(), "adv_disparity": disparity((-ce.detach()).exp())}  # p[y] = e^-CE
        return StepOutput(ce.mean(1), parts, logits.detach(), None)
