"""Fast ensemble learning (Huang et al., FASTEN, IEEE TIFS 2023), with adversarial training.

Inputs. Two members j are drawn per batch. For each, x*_j = x + d_j is one step from a random point of the ball, away
from the features of x in a layer of member j (see `vulnerable`; the layer is drawn once per epoch), clipped to
||d_j||_inf <= eps. From the second epoch on the new perturbation is mixed with the one that was stored last for this
image, d_j <- r d_j + (1 - r) d_stored with one r ~ U(0, 1) for the batch; the result is stored, so that the second of
the two members starts from what the first one left.

Loss. Member i gets x* from the drawn member that is not i, or from one of the two at random. With P = {p(x), p(x*),
p(x + delta_i)}, J = 3, their mean q_i, and delta_i the attack on member i alone (eq. 2 of the CEAT paper):

    L_i = CE(z_i(x*), y) + adversarial * CE(z_i(x + delta_i), y) + consistency / J * sum_{p in P} KL(q_i || p)
          - diversity * consistency / (M - 1) * sum_{k != i} KL(q_k || q_i)

p(x) is a constant, and so are the q_k of the other members; everything else carries gradient, into member i only. (In
the public code the last term is built from constants altogether and has no gradient.) Means over the batch. The paper's
own adversarial inputs take one step from x*; here they are those of the configured attack.
Passes: x + delta_i, x (without gradient, unless `plus_ceat` needs it), x*.

Stored perturbations are 8-bit integers, eps/127 apart, and belong to the image as it was cropped and flipped then.

| | eps, consistency, diversity | optimizer |
|---|---|---|
| original | 0.06, 3, 0.05 | SGD 0.1 per member, 200 epochs, from a standard-trained ensemble |
| CEAT paper, section 4.1 | not given | SGD 0.01 per member, 120 epochs, /10 at 75 and 95 |
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ceat_fast.attacks import keyed_uniform
from ceat_fast.checks import require_number
from ceat_fast.ensemble import Ensemble
from ceat_fast.methods.base import Attack, Batch, StepOutput
from ceat_fast.methods.terms import cross_entropy, divergence, widened
from ceat_fast.methods.vulnerable import FeatureMethod, search_features

_LEVELS = 127


@dataclass
class FASTEN(FeatureMethod):
    """Cross-entropies, agreement of a member with itself on three inputs, and disagreement with the others.

    Args:
        eps: radius and step size of the search by features, in (0, 1].
        adversarial: coefficient of the cross-entropy on the adversarial input, >= 0.
        consistency: coefficient of the agreement, >= 0.
        diversity: coefficient of the disagreement, in units of `consistency`, >= 0.
    """

    eps: float = 0.06
    adversarial: float = 1.0
    consistency: float = 3.0
    diversity: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("eps", self.eps, 0, 1, above=True)
        require_number("adversarial", self.adversarial, 0)
        require_number("consistency", self.consistency, 0)
        require_number("diversity", self.diversity, 0)
        self._stored: Tensor | None = None

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        """(2, M, B, ...): each member's adversarial input, and the x* it is given."""
        members = len(ensemble.members)
        self.require_members(members)
        draws = random.Random(int(torch.randint(2**62, ()).item()))
        pair = draws.sample(range(members), 2)
        new = self._search(ensemble, pair, batch)
        # One after the other: the second continues from what the first stored.
        starred = {j: self._recycled(batch, step, draws.random()) for j, step in zip(pair, new, strict=True)}
        sources = [pair[1 - pair.index(i)] if i in pair else draws.choice(pair) for i in range(members)]
        stars = torch.stack([starred[j] for j in sources])
        return torch.stack([super().perturb(attack, ensemble, batch), stars])

    def member_losses(self, ensemble: Ensemble, adversarial: Tensor, batch: Batch) -> StepOutput:
        adversarial, stars = adversarial
        adv_logits = ensemble.member_logits(adversarial, per_member=True)
        with torch.set_grad_enabled(self.plus_ceat is not None):
            nat_logits = ensemble.member_logits(batch.images, per_member=False)
        star_logits = ensemble.member_logits(stars, per_member=True)
        adv_ce, star_ce = (cross_entropy(logits, batch.labels) for logits in (adv_logits, star_logits))
        log_probs = torch.stack([widened(z).log_softmax(-1) for z in (nat_logits.detach(), star_logits, adv_logits)])
        mean = log_probs.logsumexp(0) - math.log(3)
        agreement = divergence(mean, log_probs).mean(0)
        disagreement = self._disagreement(mean)
        own = star_ce + self.adversarial * adv_ce + self.consistency * agreement
        losses = (own - self.diversity * self.consistency * disagreement).mean(1)
        parts = {"star_ce": star_ce, "agreement": agreement, "disagreement": disagreement}
        return StepOutput(losses, {name: part.detach() for name, part in parts.items()}, adv_logits, nat_logits)

    @staticmethod
    def _disagreement(log_mean: Tensor) -> Tensor:
        """(M, B, K) log-probabilities -> (M, B): mean over the peers k of KL(q_k || q_i), the q_k constant."""
        members = len(log_mean)
        peers = log_mean.detach()
        gaps = torch.stack([divergence(peers.roll(-k, 0), log_mean) for k in range(1, members)])
        return gaps.sum(0) / (members - 1)

    def _search(self, ensemble: Ensemble, members: list[int], batch: Batch) -> Tensor:
        """New perturbations, one for each of these members, (J, B, ...)."""
        x, eps = batch.images, self.eps
        noise = [keyed_uniform(batch.indices, x.shape[1:], (self.epoch.seed, j), x.dtype) for j in members]
        start = (x + (2 * torch.stack(noise) - 1) * eps).clamp(0, 1)
        layers = self.draw_layers(ensemble)
        found = search_features(ensemble, layers, start, x, x, eps=eps, alpha=eps, steps=1, away=True, members=members)
        return found - x

    def _recycled(self, batch: Batch, new: Tensor, share: float) -> Tensor:
        """x*: the new perturbation mixed with what is stored for these images, and stored, (B, ...)."""
        x, eps = batch.images, self.eps
        if self._stored is None:
            self._stored = torch.zeros(self.epoch.samples, *x.shape[1:], dtype=torch.int8, device=x.device)
        if self.epoch.number > 0:
            new = share * new + (1 - share) * self._stored[batch.indices].to(x.dtype) * (eps / _LEVELS)
        self._stored[batch.indices] = (new * (_LEVELS / eps)).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
        return (x + new).clamp(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._stored is None else {"stored": self._stored}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._stored = state.get("stored")
