"""What an attack maximises, and its gradient with respect to the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ceat_fast.ensemble import Ensemble
from ceat_fast.ops import dispatch, reference

GOALS = ("ensemble", "members")
LOSSES = ("ce", "margin")
_PER_SAMPLE = reference.REDUCTIONS.index("none")


class Objective:
    """Loss of a frozen model at an input batch of N rows with labels (N,).

    * goal "ensemble": x (N, ...) is shared by all members; rows are the model's output (eq. 1 for an Ensemble).
    * goal "members": x (M, N, ...) holds an own input for each member; M * N rows, one per member and sample.

    Loss "ce" is the cross-entropy of a row; "margin" is max_{k != y} log p_k - log p_y, positive where it is wrong.
    """

    def __init__(self, model: nn.Module, labels: Tensor, goal: str, loss: str, check_labels: bool) -> None:
        self.searches = 1  # how many inputs per sample the goal asks for
        if goal == "members":
            if not isinstance(model, Ensemble):
                raise TypeError(f"goal='members' needs an Ensemble, got {type(model).__name__}")
            self.searches = len(model.members)
        self.model = model
        self.goal = goal
        self.loss = loss
        self.labels = labels.repeat(self.searches)
        self._check_labels = check_labels

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(losses of the rows, their gradient with respect to x); each row depends on one batch entry of x."""
        x = x.detach().requires_grad_()
        logits = self._logits(x)
        if self.loss == "ce":
            losses, outer = dispatch.ensemble_cross_entropy(logits.detach(), self.labels, _PER_SAMPLE, True)
            (grad,) = torch.autograd.grad(logits, x, outer.to(logits.dtype))
        else:
            losses = self._margin(reference.ensemble_log_prob(logits))
            (grad,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), grad

    @torch.no_grad()
    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(losses, whether misclassified) of the rows at x."""
        log_prob = reference.ensemble_log_prob(self._logits(x))
        if self.loss == "margin":
            losses = self._margin(log_prob)
        else:
            losses = -log_prob.gather(1, self.labels[:, None]).squeeze(1)
        return losses, log_prob.argmax(1) != self.labels

    def _margin(self, log_prob: Tensor) -> Tensor:
        true = log_prob.gather(1, self.labels[:, None])
        others = log_prob.scatter(1, self.labels[:, None], -torch.inf)
        return others.amax(1) - true.squeeze(1)

    def _logits(self, x: Tensor) -> Tensor:
        """(m, rows, K): the mean of the m probabilities is a row's output."""
        logits = self._output(x)
        if logits.dim() != 3:
            raise ValueError(f"model must return logits (B, K), got {tuple(logits.shape[1:])}")
        if self._check_labels:
            self._check_labels = False
            if len(self.labels) and int(self.labels.max()) >= logits.shape[-1]:
                raise ValueError(f"y must lie in [0, {logits.shape[-1]}), got {int(self.labels.max())}")
        # fp16 and bf16 outputs are judged in fp32: the gradient of a confident row underflows in fp16.
        return logits.to(reference.compute_dtype(logits.dtype))

    def _output(self, x: Tensor) -> Tensor:
        if not isinstance(self.model, Ensemble):
            logits: Tensor = self.model(x)
            return logits.unsqueeze(0)
        if self.goal == "members":
            return self.model.member_logits(x, per_member=True).flatten(0, 1).unsqueeze(0)
        if self.model.average == "prob":
            return self.model.member_logits(x, per_member=False)
        return self.model.combine(self.model.member_logits(x, per_member=False)).unsqueeze(0)
