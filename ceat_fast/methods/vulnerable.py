"""Inputs that carry the non-robust features of each member, as DVERGE, LAFED and FASTEN train on.

    x'_j = argmin (or argmax) over ||x' - x||_inf <= eps of || feat_j(x') - reference_j ||^2

by momentum-sign steps: g <- g + grad / ||grad||_1,  x' <- clip(x' -+ alpha * sign(g)); clip: to the ball and to [0, 1].

The members are in eval mode and each has features of its own layer. The reference is computed once, and a pass ends at
the layer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ceat_fast.checks import require_ints, require_number
from ceat_fast.choices import require_choice
from ceat_fast.ensemble import Ensemble, frozen
from ceat_fast.methods.base import Attack, Batch, Epoch, Method
from ceat_fast.methods.features import MemberFeatures, layers_at
from ceat_fast.ops import dispatch

REDRAWS = ("epoch", "step")


@dataclass
class FeatureMethod(Method):
    """Base of the methods that search inputs by the features of a layer that is drawn at random.

    Args:
        layers: names of the modules to draw from, which every member must have; by default the normalisation and linear
            layers of each, matched by relative depth.
        redraw: draw a layer once per "epoch", as the originals do, or for every "step".
    """

    layers: list[str] | None = None
    redraw: str = "epoch"

    goal: ClassVar[str] = "members"
    least_members: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_choice("redraw", self.redraw, REDRAWS)
        if self.layers is not None and not self.layers:
            raise ValueError("layers must name at least one module, got []")
        self._epoch: Epoch | None = None
        self.drawn_layers: list[str] = []

    @property
    def epoch(self) -> Epoch:
        """The epoch that was begun last.

        Raises:
            RuntimeError: none was.
        """
        if self._epoch is None:
            raise RuntimeError(f"{type(self).__name__}: call begin_epoch before the first batch")
        return self._epoch

    def begin_epoch(self, epoch: Epoch) -> None:
        self._epoch = epoch

    def draw_layers(self, ensemble: Ensemble) -> list[str]:
        """A layer for each member, all at the same relative depth; they are kept as `drawn_layers`."""
        depth = random.Random(self.epoch.seed).random() if self.redraw == "epoch" else torch.rand(()).item()
        self.drawn_layers = layers_at(list(ensemble.members), depth, self.layers)
        return self.drawn_layers


@dataclass
class DistillingMethod(FeatureMethod):
    """Base of the methods that train on what is distilled from each member.

    Args:
        eps: radius of the distillation, in [0, 1].
        alpha: its step size, above 0.
        steps: its steps, at least 1.
    """

    eps: float = 0.07
    alpha: float = 0.007
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("eps", self.eps, 0, 1)
        require_number("alpha", self.alpha, 0, above=True)
        require_ints(self, steps=1)

    def perturb(self, attack: Attack, ensemble: Ensemble, batch: Batch) -> Tensor:
        """(2, M, B, ...): each member's adversarial input, and what is distilled from each member."""
        layers = self.draw_layers(ensemble)
        distilled = distill(ensemble, layers, batch.images, eps=self.eps, alpha=self.alpha, steps=self.steps)
        return torch.stack([super().perturb(attack, ensemble, batch), distilled])


def search_features(
    ensemble: Ensemble,
    layers: Sequence[str],
    start: Tensor,
    center: Tensor,
    reference: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    away: bool = False,
    members: Sequence[int] | None = None,
) -> Tensor:
    """Inputs near `center` whose features, in each member for itself, come near those of `reference`.

    Args:
        ensemble: in any mode; modes, gradients and running statistics stay as they are.
        layers: a layer of every member of the ensemble.
        start: (B, ...) where all searches begin, or (J, B, ...) where each does.
        center: (B, ...) centre of the ball.
        reference: (B, ...) inputs whose features are the aim.
        eps, alpha, steps: radius, step size, number of steps.
        away: move away from the features of `reference` instead.
        members: search for these members only.

    Returns:
        (J, B, ...), one for each of the J members; without gradient.
    """
    with torch.inference_mode(False), torch.enable_grad(), frozen(ensemble) as view:
        outputs = MemberFeatures(cast(Ensemble, view), layers, members)
        shape = (len(outputs), *center.shape)
        with torch.no_grad():
            aims = outputs(reference.expand(shape))
        x, centers = start.detach().expand(shape).contiguous(), center.detach().expand(shape).contiguous()
        momentum, direction = torch.zeros_like(x), 1.0 if away else -1.0
        for _ in range(steps):
            x.requires_grad_()
            distances = [(output - aim).square().mean() for output, aim in zip(outputs(x), aims, strict=True)]
            (gradient,) = torch.autograd.grad(torch.stack(distances).sum(), x)
            norm = gradient.flatten(2).abs().sum(2).clamp_min(torch.finfo(gradient.dtype).tiny)
            momentum = momentum + gradient / norm.view(*norm.shape, *[1] * (x.dim() - 2))
            x = dispatch.pgd_step(x.detach(), direction * momentum, centers, alpha, eps)
    return x.detach()


def distill(
    ensemble: Ensemble, layers: Sequence[str], images: Tensor, *, eps: float, alpha: float, steps: int
) -> Tensor:
    """DVERGE's distilled inputs: like the image, but with the features of another image of the batch, (M, B, ...).

    Batches are shuffled, so the image before it in the batch is a random other one.
    """
    target = images.roll(1, 0)
    return search_features(ensemble, layers, images, images, target, eps=eps, alpha=alpha, steps=steps)
