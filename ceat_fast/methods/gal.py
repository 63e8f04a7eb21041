"""Gradient alignment loss (Kariyappa and Qureshi, arXiv 1901.09981), with adversarial training.

    sum_m L_m = mean_m [ CE(z_m(x), y) + CE(z_m(x~), y) ] + lam * log sum_{i<j} exp(cos(g_i, g_j))

g_m = dCE(z_m(x), y)/dx, flattened; x~ attacks the ensemble (eq. 3 of the CEAT paper). Means over the batch.

L_m holds 1/M of every term. The clean pass that gives CE also gives g; the loss is differentiated through it a second
time. The cosine does not depend on the length of a gradient, also where that is tiny.

| | lam | optimizer |
|---|---|---|
| original | 0.5; LeakyReLU(0.1); noise of std 0.045 on half of the images | Adam 1e-3 |
| CEAT paper, section 4.1 | not given | one Adam for all members, 1e-3, 150 epochs, /10 at 90 and 120 |

The networks here have ReLU; the noise is added to the clean input and clipped to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Batch, Method, StepOutput
from ceat_fast.methods.terms import cosines, cross_entropy, input_gradients


@dataclass
class GAL(Method):
    """Cross-entropies and the coherence of the members' input gradients.

    Args:
        lam: coefficient of the coherence, >= 0.
        noise_std: standard deviation of Gaussian noise on clean images, >= 0.
        noise_probability: share of the images with noise, in [0, 1].
    """

    lam: float = 0.5
    noise_std: float = 0.045
    noise_probability: float = 0.5

    least_members: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_number("lam", self.lam, 0)
        require_number("noise_std", self.noise_std, 0)
        require_number("noise_probability", self.noise_probability, 0, 1)

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adv_logits = ensemble.member_logits(adversarial, per_member=False)
        nat_logits, gradients = input_gradients(ensemble, self._noisy(batch.images), batch.labels)
        coherence = cosines(gradients).logsumexp(0)
        ce = cross_entropy(nat_logits, batch.labels) + cross_entropy(adv_logits, batch.labels)
        losses = (ce + self.lam * coherence).mean(1) / len(ce)
        return StepOutput(losses, {"coherence": coherence.detach()[None]}, adv_logits, nat_logits)

    def _noisy(self, images: Tensor) -> Tensor:
        if self.noise_std == 0 or self.noise_probability == 0:
            return images
        chosen = torch.rand(len(images), device=images.device) < self.noise_probability
        noise = self.noise_std * torch.randn_like(images)
        return (images + noise * chosen.view(-1, *[1] * (images.dim() - 1))).clamp(0, 1)
