"""What an attack maximises, and its gradient with respect to the input.

With z the logits or log-probabilities of a row, y its label and t the class that a targeted attack wants:

             untargeted                                      targeted
    ce       -log p_y                                        log p_t
    margin   min(max_{k != y} z_k - z_y, kappa)              min(z_t - max_{k != t} z_k, kappa)
    dlr      (max_{k != y} z_k - z_y) / (z_(1) - z_(3))      (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

z_(1) >= z_(2) >= ... are the sorted entries. "margin" is Carlini and Wagner's loss, positive where the attack succeeds;
"dlr" is the difference of logits ratio of Croce and Hein (2020), untouched by a shift or scale of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ceat_fast.attacks.outputs import plain_logits, require_gradient
from ceat_fast.ensemble import Ensemble, is_ensemble
from ceat_fast.ops import dispatch, reference

GOALS = ("ensemble", "members")
LOSSES = ("ce", "margin", "dlr")
_PER_SAMPLE = reference.REDUCTIONS.index("none")


class Judgement(NamedTuple):
    """What a model says of one input per row."""

    losses: Tensor  # (rows,), what the attack maximises
    success: Tensor  # (rows,) bool: misclassified, or classified as the target


class Objective:
    """Loss of a frozen model at an input batch of N samples with labels (N,).

    * goal "ensemble": x (N, ...) is shared by all members; rows are the model's output (eq. 1 for an Ensemble).
    * goal "members", for an `Ensemble`: x (M, N, ...) holds an own input for each member; M * N rows,
      one per member and sample.

    `target` (N,) makes it targeted; `kappa` is the margin beyond which a row has no gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor,
        goal: str = "ensemble",
        loss: str = "ce",
        check_labels: bool = False,
        target: Tensor | None = None,
        kappa: float = math.inf,
    ) -> None:
        self.searches = 1  # how many inputs per sample the goal asks for
        if goal == "members":
            assert isinstance(model, Ensemble)
            self.searches = len(model.members)
        self.model = model
        self.goal = goal
        self.loss = loss
        self.kappa = kappa
        self.labels = labels.repeat(self.searches)
        self.target = None if target is None else target.repeat(self.searches)
        self._check_labels = check_labels

    def gradient(self, x: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(losses of the rows, their gradient with respect to x); each row depends on one batch entry of x.

        `transform` is a differentiable map of x that the model sees in its place.
        """
        x = x.detach().requires_grad_()
        logits = self._logits(x if transform is None else transform(x))
        require_gradient(logits)
        if self.loss == "ce":
            label = self.labels if self.target is None else self.target
            losses, outer = dispatch.ensemble_cross_entropy(logits.detach(), label, _PER_SAMPLE)
            if self.target is not None:
                losses, outer = -losses, -outer
            (grad,) = torch.autograd.grad(logits, x, outer.to(logits.dtype))
        else:
            # Margin and ratio do not change with the shift that makes log-probabilities of one model's logits.
            losses = self._losses(logits[0] if len(logits) == 1 else reference.ensemble_log_prob(logits))
            (grad,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), grad

    @torch.no_grad()
    def judge(self, x: Tensor) -> Judgement:
        """Losses and success of the rows at x."""
        log_prob = reference.ensemble_log_prob(self._logits(x))
        predicted = log_prob.argmax(1)
        success = predicted != self.labels if self.target is None else predicted == self.target
        return Judgement(self._losses(log_prob), success)

    def select(self, samples: Tensor) -> Objective:
        """The same for some of the samples: (n,) int64 indices."""

        def pick(labels: Tensor) -> Tensor:
            return labels.view(self.searches, -1)[0].index_select(0, samples)

        target = None if self.target is None else pick(self.target)
        return Objective(self.model, pick(self.labels), self.goal, self.loss, False, target, self.kappa)

    def _losses(self, log_prob: Tensor) -> Tensor:
        if self.loss == "dlr":
            return dlr(log_prob, self.labels, self.target)
        if self.target is None:
            losses = -_entry(log_prob, self.labels) if self.loss == "ce" else margin(log_prob, self.labels)
        else:
            losses = _entry(log_prob, self.target) if self.loss == "ce" else -margin(log_prob, self.target)
        return losses if self.loss == "ce" or self.kappa == math.inf else losses.clamp(max=self.kappa)

    def _logits(self, x: Tensor) -> Tensor:
        """(m, rows, K): the mean of the m probabilities is a row's output."""
        logits = self._output(x)
        if self._check_labels:
            self._check_labels = False
            for name, labels in (("y", self.labels), ("target", self.target)):
                if labels is not None and len(labels) and int(labels.max()) >= logits.shape[-1]:
                    raise ValueError(f"{name} must lie in [0, {logits.shape[-1]}), got {int(labels.max())}")
        # fp16 and bf16 outputs are judged in fp32: the gradient of a confident row underflows in fp16.
        return logits.to(reference.compute_dtype(logits.dtype))

    def _output(self, x: Tensor) -> Tensor:
        if self.goal == "members":
            assert isinstance(self.model, Ensemble)
            return self.model.member_logits(x, per_member=True).flatten(0, 1).unsqueeze(0)
        if not is_ensemble(self.model):
            return plain_logits(self.model, x).unsqueeze(0)
        own = type(self.model).combine is not Ensemble.combine or "combine" in vars(self.model)
        if self.model.average == "prob" and not own:
            return self.model.member_logits(x, per_member=False)
        return self.model.combine(self.model.member_logits(x, per_member=False)).unsqueeze(0)


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """max_{k != label} z_k - z_label: (N, K), (N,) -> (N,).

    The label's entry is masked by -inf, as a mask of -1e4 does for logits above -1e4. A mask of 0, as in some public
    code, is wrong on log-probabilities: all of them are negative, so the maximum would be the mask itself, a constant.
    """
    others = logits.scatter(1, label[:, None], -torch.inf)
    return others.amax(1) - _entry(logits, label)


def dlr(logits: Tensor, label: Tensor, target: Tensor | None = None) -> Tensor:
    """The difference of logits ratio, untargeted or targeted: (N, K), (N,), (N,) -> (N,).

    Raises:
        ValueError: fewer than 3 classes, or than 4 with a target: the scale is not defined.
    """
    needed = 3 if target is None else 4
    if logits.shape[1] < needed:
        kind = "untargeted" if target is None else "targeted"
        raise ValueError(f"loss='dlr' needs at least {needed} classes where it is {kind}, got {logits.shape[1]}")
    top = logits.topk(needed, dim=1).values
    if target is None:
        return margin(logits, label) / (top[:, 0] - top[:, 2] + _TINY)
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return (_entry(logits, target) - _entry(logits, label)) / (scale + _TINY)


_TINY = 1e-12  # as in the authors' code: keeps the ratio of equal logits finite


def _entry(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label[:, None]).squeeze(1)
