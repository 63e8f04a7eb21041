"""Projected gradient descent in the Linf ball (eq. 2 and 3 of the paper).

x_0 = clip(x + u),  u uniform in [-eps, eps]
x_{t+1} = clip(x_t + alpha * sign(dL/dx_t))      clip: to the eps ball around x and to [0, 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ceat_fast.attacks.budget import Budget, parse_budget
from ceat_fast.attacks.noise import keyed_uniform
from ceat_fast.attacks.objective import GOALS, LOSSES, Objective
from ceat_fast.choices import require_choice
from ceat_fast.ensemble import frozen
from ceat_fast.ops import dispatch

# Keeps the random starts of attacks with the same seed apart.
_NOISE_KEY = int.from_bytes(b"PGD", "big")


@dataclass(frozen=True)
class PGD:
    """Linf PGD: `attack(model, x, y) -> x_adv`.

    Args:
        eps: radius in [0, 1]: a number, a Fraction or text such as "8/255".
        alpha: step size, above 0, in the same forms.
        steps: number of gradient steps, at least 0.
        random_start: start at a uniform point of the ball instead of x.
        restarts: independent searches, at least 1, run as one batch. Of several the worst for the model is kept per
            sample: a misclassified result before a correct one, then the higher loss. With one, the last iterate is it.
        loss: "ce", the cross-entropy, or "margin", max_{k != y} log p_k - log p_y (Carlini and Wagner's).
        goal: "ensemble" perturbs one input against the model's output (eq. 3; eq. 1 for an `Ensemble`); "members"
            perturbs one for each member of an `Ensemble` against that member (eq. 2), all members in one batch.
        seed: keys the random start by (seed, restart, sample index), the same for every batch size, order, device and
            member. None draws it from torch's generator of the device.

    Raises:
        ValueError, TypeError: an argument outside the range above; names it, its value and what is allowed.
    """

    eps: Budget = "8/255"
    alpha: Budget = "2/255"
    steps: int = 10
    random_start: bool = True
    restarts: int = 1
    loss: str = "ce"
    goal: str = "ensemble"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.radius > 1:
            raise ValueError(f"eps must be in [0, 1], got {self.eps!r}")
        if self.step_size == 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}")
        for name, least in (("steps", 0), ("restarts", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an int or None, got {self.seed!r}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} without random_start would repeat one search")
        require_choice("loss", self.loss, LOSSES)
        require_choice("goal", self.goal, GOALS)

    @cached_property
    def radius(self) -> float:
        """eps as a number."""
        return parse_budget("eps", self.eps)

    @cached_property
    def step_size(self) -> float:
        """alpha as a number."""
        return parse_budget("alpha", self.alpha)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """Perturb x so that the model errs on y.

        Args:
            model: an `Ensemble`, or any module that maps x to logits (B, K); in eval mode. Its parameters, their
                gradients and flags, and its buffers are left as they are.
            x: (B, ...) fp32 or fp64 in [0, 1].
            y: (B,) int64 labels in [0, K).
            index: (B,) int64 sample indices that key the noise with a seed; default 0 to B-1.

        Returns:
            (B, ...) for goal "ensemble", (M, B, ...) for "members"; same dtype, in the ball and in [0, 1], no gradient.

        Raises:
            ValueError: input outside these ranges, a model in train mode, or a model that returns NaN.
            TypeError: goal "members" with a model that is no `Ensemble`.
        """
        _check_input(x, y, index)
        for name, module in model.named_modules():
            if module.training:
                raise ValueError(f"model is in train mode ({name or type(module).__name__}): call model.eval() first")
        x_adv, losses = self._search(model, x, y, index, check_labels=True)
        if losses is not None and bool(losses.isnan().any()):
            raise ValueError(f"model returned NaN logits on {int(losses.isnan().sum())} of {len(losses)} attacked rows")
        return x_adv

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        """The same without the checks of x, y and the model's output, which wait for the device: for training loops.

        The model may be in train mode: it is attacked in eval mode, and restored.
        """
        return self._search(model, x, y, index, check_labels=False)[0]

    def _search(
        self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None, check_labels: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(x_adv, losses of the last gradient or judgement)."""
        losses: Tensor | None = None
        with torch.inference_mode(False), torch.enable_grad(), frozen(model):
            x, y = _ordinary(x), _ordinary(y)
            objective = Objective(model, y.repeat(self.restarts), self.goal, self.loss, check_labels)
            center = x.repeat(self.restarts, *[1] * (x.dim() - 1))
            x_adv = self._start(x, index) if self.random_start else center
            if self.goal == "members":
                center, x_adv = (t.repeat(objective.searches, *[1] * t.dim()) for t in (center, x_adv))
            for _ in range(self.steps):
                losses, grad = objective.gradient(x_adv)
                x_adv = dispatch.pgd_step(x_adv, grad, center, self.step_size, self.radius)
            if self.restarts > 1:
                losses, wrong = objective.judge(x_adv)
                runs = x_adv.view(objective.searches, self.restarts, *x.shape)
                best = _worst(losses.view(runs.shape[:3]), wrong.view(runs.shape[:3]))
                best = best.view(*best.shape, *[1] * (x.dim() - 1)).expand(-1, -1, *x.shape)
                x_adv = runs.gather(1, best).squeeze(1)
                x_adv = x_adv if self.goal == "members" else x_adv.squeeze(0)
        return x_adv, losses

    def _start(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Uniform points of the ball, clipped to [0, 1]: (B, ...) -> (restarts * B, ...)."""
        if self.seed is None:
            noise = torch.rand((self.restarts, *x.shape), dtype=x.dtype, device=x.device)
        else:
            index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)
            keys = ((self.seed, _NOISE_KEY, restart) for restart in range(self.restarts))
            noise = torch.stack([keyed_uniform(index, x.shape[1:], key, x.dtype) for key in keys])
        return (x + (2 * noise - 1) * self.radius).clamp(0, 1).flatten(0, 1)


def _worst(losses: Tensor, wrong: Tensor) -> Tensor:
    """The restart to keep: misclassified before correct, then the higher loss; (S, R, B) -> (S, 1, B) indices."""
    beaten = wrong.any(1, keepdim=True) & ~wrong
    return losses.masked_fill(beaten, -torch.inf).argmax(1, keepdim=True)


def _ordinary(tensor: Tensor) -> Tensor:
    """Detached, and usable in autograd where it came out of inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check_input(x: Tensor, y: Tensor, index: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        raise ValueError(f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}")
    for name, tensor in (("y", y), ("index", index)):
        if tensor is not None and (tensor.dtype != torch.int64 or tensor.shape != x.shape[:1]):
            raise ValueError(f"{name} must be int64 of shape ({len(x)},), got {tensor.dtype} {tuple(tensor.shape)}")
    if not bool(((x >= 0) & (x <= 1)).all()):
        extent = "NaN" if bool(x.isnan().any()) else f"values from {x.min().item():.6g} to {x.max().item():.6g}"
        raise ValueError(f"x must lie in [0, 1], got {extent}")
    if len(y) and int(y.min()) < 0:
        raise ValueError(f"y must not be negative, got {int(y.min())}")
