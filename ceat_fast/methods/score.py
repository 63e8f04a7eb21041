"""Self-consistent robust error (Pang et al., SCORE, ICML 2022, arXiv 2202.10103), for every member by itself.

    L_m = ||p_m(x) - onehot(y)||^2 + beta * relu(||p_m(x~) - p_m(x)||^2 - clip)

Squared distances are summed over the classes and averaged over the batch; p_m(x) carries gradient in both. x~ is the
configured attack on member m (eq. 2 of the CEAT paper); the original searches it by the second distance instead of the
cross-entropy. Passes: x~, x.

Original: beta 6, clip 0.4, SGD 0.05, weight decay 5e-4, 110 epochs. Not among the methods of the CEAT paper, which
takes its distances from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, Method, StepOutput
from ceat_fast.methods.terms import widened


@dataclass
class SCORE(Method):
    """Squared distances of probabilities in place of the cross-entropy.

    Args:
        beta: coefficient of the distance between adversarial and clean probabilities, >= 0.
        clip: that distance counts only above this, in [0, 2].
    """

    beta: float = 6.0
    clip: float = 0.4

    goal: ClassVar[str] = "members"

    def __post_init__(self) -> None:
        require_number("beta", self.beta, 0)
        require_number("clip", self.clip, 0, 2)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial, per_member=True)
        nat_logits = ensemble.member_logits(batch.images, per_member=False)
        adv_prob, nat_prob = widened(adv_logits).softmax(-1), widened(nat_logits).softmax(-1)
        nat = (nat_prob - F.one_hot(batch.labels, nat_prob.shape[-1])).square().sum(-1)
        adv = (adv_prob - nat_prob).square().sum(-1)
        losses = (nat + self.beta * (adv - self.clip).relu()).mean(1)
        return StepOutput(losses, {"nat": nat.detach(), "adv": adv.detach()}, adv_logits, nat_logits)
