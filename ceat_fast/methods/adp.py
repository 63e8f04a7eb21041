"""Adaptive diversity promoting (Pang et al., ICML 2019, arXiv 1901.08846), with adversarial training.

    sum_m L_m = sum_m [ CE(z_m(x), y) + CE(z_m(x~), y) ] - alpha * H(mean_m p_m) - beta * log det(G + 1e-6 I)

p_m = softmax(z_m(x)); H is the entropy; G (M x M) holds the inner products of the members' probabilities of the wrong
classes, each scaled to Euclidean length 1. x~ attacks the ensemble (eq. 3 of the CEAT paper). Means over the batch.

L_m holds m's own two cross-entropies and 1/M of the other terms; all of p_m carries gradient into all members.
The direction of the wrong-class probabilities is that of a softmax over the wrong classes alone, which does not
underflow where a member is confident. The determinant is taken in fp64, where 1e-6 is far above the rounding.

| | alpha, beta | optimizer |
|---|---|---|
| original | 2, 0.5 | Adam 1e-3; diversity on adversarial inputs too (`diversify_adversarial`) |
| CEAT paper, section 4.1 | not given | one Adam for all members, 1e-3, 150 epochs, /10 at 90 and 120 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.loss import ensemble_log_prob
from ceat_fast.methods.base import Batch, Method, StepOutput
from ceat_fast.methods.terms import cross_entropy, widened

OFFSET = 1e-6


@dataclass
class ADP(Method):
    """Cross-entropies, entropy of the ensemble and diversity of the wrong-class probabilities.

    Args:
        alpha: coefficient of the entropy of the mean probability, >= 0.
        beta: coefficient of the log-determinant, >= 0.
        diversify_adversarial: both terms also on the adversarial input.
    """

    alpha: float = 2.0
    beta: float = 0.5
    diversify_adversarial: bool = False

    least_members: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, 0)
        require_number("beta", self.beta, 0)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial, per_member=False)
        nat_logits = ensemble.member_logits(batch.images, per_member=False)
        entropy, log_det = diversity(nat_logits, batch.labels)
        shared = self.alpha * entropy + self.beta * log_det
        if self.diversify_adversarial:
            adv_entropy, adv_log_det = diversity(adv_logits, batch.labels)
            shared = shared + self.alpha * adv_entropy + self.beta * adv_log_det
        ce = cross_entropy(nat_logits, batch.labels) + cross_entropy(adv_logits, batch.labels)
        parts = {"entropy": entropy.detach()[None], "log_det": log_det.detach()[None]}
        return StepOutput((ce - shared / len(ce)).mean(1), parts, adv_logits, nat_logits)


def diversity(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(M, B, K) logits -> (B,) entropies of the mean probability, (B,) log-determinants.

    Raises:
        ValueError: more members than wrong classes, where the determinant is 0 whatever the members say.
    """
    members, _, classes = logits.shape
    if members > classes - 1:
        raise ValueError(f"ADP needs no more members than wrong classes, got {members} members and {classes} classes")
    logits = widened(logits)
    log_prob = ensemble_log_prob(logits)
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    wrong = logits.scatter(-1, labels.expand(members, -1).unsqueeze(-1), -torch.inf).softmax(-1).double()
    unit = wrong / torch.linalg.vector_norm(wrong, dim=-1, keepdim=True)
    gram = torch.einsum("mbk,nbk->bmn", unit, unit)
    gram = gram + OFFSET * torch.eye(members, dtype=gram.dtype, device=gram.device)
    # The _ex variant does not wait for the device to look for errors: the offset keeps the matrix positive definite.
    factor = torch.linalg.cholesky_ex(gram).L
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return entropy, log_det.to(entropy.dtype)
