"""Training on clean inputs: the undefended baseline, and the surrogate of transfer attacks.

L_m = CE(z_m(x), y)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Attack, Batch, StepOutput
from ceat_fast.methods.smoothing import LabelSmoothing
from ceat_fast.methods.terms import cross_entropy


@dataclass
class Standard(LabelSmoothing):
    """Cross-entropy of every member on the clean input; nothing is attacked."""

    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plus_ceat is not None:
            raise ValueError(f"plus_ceat must be left out: Standard has no adversarial inputs, got {self.plus_ceat}")

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        return batch.images

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        logits = ensemble.member_logits(batch.images, per_member=False)
        ce = cross_entropy(logits, batch.labels)
        return StepOutput(self.smoothed(ce.mean(1), logits, batch.labels), {"nat_ce": ce.detach()}, None, logits)
