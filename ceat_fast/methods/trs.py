"""Transferability reduced smooth ensembles (Yang et al., NeurIPS 2021, arXiv 2104.00671), with adversarial training.

    sum_m L_m = sum_m [ CE(z_m(x), y) + CE(z_m(x~), y) ]
                + similarity * mean_{i<j} |cos(g_i(x), g_j(x))| + smoothness * (2/M) * sum_m ||g_m(s)||^2

g_m(x) = dCE(z_m(x), y)/dx of each sample's own cross-entropy, x~ attacks the ensemble (eq. 3 of the CEAT paper). s is
the clean image in the first half of the batch; in the second half it maximises sum_m ||g_m(s)||^2 within
||s - x||_inf <= delta, by steps of delta/3 along the sign. delta grows linearly over the epochs. Means over the batch.

L_m holds m's own cross-entropies and gradient norm and 1/M of the similarity. Searching s and training are both
differentiated a second time; s is searched with the members in eval mode. Passes: x~, x, s.

The authors' code differentiates the mean over the batch, so that its ||g||^2 shrinks with the square of the batch size;
here it does not, and the default is their 2.5 at their batch size of 128. Theirs is for three members; here any M >= 2.

| | similarity, smoothness, delta | optimizer |
|---|---|---|
| original | 40, 2.5 / 128^2, 0.01 to 0.03; no adversarial training | Adam 1e-3, 120 epochs, /10 every 40 |
| CEAT paper, section 4.1 | not given | one Adam for all members, 1e-3, 150 epochs, /10 at 90 and 120 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ceat_fast.checks import require_ints, require_number
from ceat_fast.ensemble import Ensemble, frozen
from ceat_fast.methods.base import Attack, Batch, Epoch, Method, StepOutput
from ceat_fast.methods.terms import cosines, cross_entropy, input_gradients
from ceat_fast.ops import dispatch


@dataclass
class TRS(Method):
    """Cross-entropies, similarity of the members' input gradients, and their length nearby.

    Args:
        similarity: coefficient of the mean absolute cosine, >= 0.
        smoothness: coefficient of the squared gradient norms, >= 0.
        first_delta: radius of the search for long gradients in the first epoch, in [0, 1].
        last_delta: the same in the last epoch.
        inner_steps: steps of that search, at least 1.
    """

    similarity: float = 40.0
    smoothness: float = 2.5 / 128**2
    first_delta: float = 0.01
    last_delta: float = 0.03
    inner_steps: int = 6

    least_members: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_number("similarity", self.similarity, 0)
        require_number("smoothness", self.smoothness, 0)
        require_number("first_delta", self.first_delta, 0, 1)
        require_number("last_delta", self.last_delta, 0, 1)
        require_ints(self, inner_steps=1)
        self._delta = self.first_delta

    def begin_epoch(self, epoch: Epoch) -> None:
        share = epoch.number / max(epoch.total - 1, 1)
        self._delta = self.first_delta + share * (self.last_delta - self.first_delta)

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        """(2, B, ...): adversarial inputs, and those at which the gradients are measured."""
        half = len(batch.images) // 2
        images, labels = batch.images[half:], batch.labels[half:]
        steep = search_steep(ensemble, images, labels, self._delta, self.inner_steps)
        return torch.stack([super().perturb(attack, ensemble, batch), torch.cat([batch.images[:half], steep])])

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adversarial, near = adversarial
        adv_logits = ensemble.member_logits(adversarial, per_member=False)
        nat_logits, gradients = input_gradients(ensemble, batch.images, batch.labels)
        similarity = cosines(gradients).abs().mean(0)
        squared_norms = input_gradients(ensemble, near, batch.labels)[1].square().flatten(2).sum(2)
        ce = cross_entropy(nat_logits, batch.labels) + cross_entropy(adv_logits, batch.labels)
        own = ce + self.smoothness * 2 / len(ce) * squared_norms
        losses = (own + self.similarity / len(ce) * similarity).mean(1)
        parts = {"similarity": similarity.detach()[None], "squared_gradient_norm": squared_norms.detach()}
        return StepOutput(losses, parts, adv_logits, nat_logits)


def search_steep(ensemble: Ensemble, images: Tensor, labels: Tensor, delta: float, steps: int) -> Tensor:
    """Images within `delta` at which the members' input gradients are long, (B, ...), found from (B, ...)."""
    with torch.inference_mode(False), torch.enable_grad(), frozen(ensemble) as view:
        x = images.detach()
        for _ in range(steps):
            x = x.detach().requires_grad_()
            _, gradients = input_gradients(cast(Ensemble, view), x, labels)
            (ascent,) = torch.autograd.grad(gradients.square().sum(), x)
            x = dispatch.pgd_step(x.detach(), ascent, images, delta / 3, delta)
    return x
