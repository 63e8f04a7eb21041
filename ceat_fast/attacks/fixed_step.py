"""The engine of attacks that take a fixed number of steps of fixed length along the gradient.

x_0 = x, or a random point of the ball around x
x_{t+1} = P(x_t + alpha * s(d_t))      d_t: the gradient of the loss, or what the attack makes of it

s and P belong to the norm (`ball`), the loss to `objective`; an attack adds how d_t comes about.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import NORMS, Ball, ball, per_sample
from ceat_fast.attacks.budget import Budget, parse_budget
from ceat_fast.attacks.captured import CapturedSearch, can_capture
from ceat_fast.attacks.cycles import MIN_STEPS, walk_to_cycles
from ceat_fast.attacks.inputs import require_eval_mode, require_inputs
from ceat_fast.attacks.noise import Noise
from ceat_fast.attacks.objective import GOALS, LOSSES, Objective
from ceat_fast.checks import require_ints
from ceat_fast.choices import require_choice
from ceat_fast.ensemble import PRECISIONS, Ensemble, frozen

# What turns the gradients of one search, step by step, into directions; it may remember earlier ones.
Direction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedStepAttack(ABC):
    """`attack(model, x, y) -> x_adv`, the settings that all fixed-step attacks have.

    Args:
        eps: radius of the ball, a number, a Fraction or text such as "8/255"; in [0, 1] for norm "Linf".
        alpha: step size, above 0, in the same forms.
        steps: number of gradient steps, at least 0.
        random_start: start at a uniform point of the ball instead of x.
        restarts: independent searches, at least 1, run as one batch. Of several the worst for the model is kept per
            sample: a success before a failure, then the higher loss. With one, the last iterate is it.
        loss: "ce", the cross-entropy; "margin", max_{k != y} log p_k - log p_y (Carlini and Wagner's); or "dlr", the
            difference of logits ratio (AutoAttack's), for at least 3 classes, 4 with targets.
        goal: "ensemble" perturbs one input against the model's output (eq. 3; eq. 1 for an `Ensemble`); "members"
            perturbs one for each member of an `Ensemble` against that member (eq. 2), all members in one batch.
        seed: keys the noise by (seed, attack, restart, sample index), the same for every batch size, order, device and
            member. None draws it from torch's generator of the device. An int64 tensor () is for CUDA graphs: it is
            read on the device, at each replay.
        norm: "Linf" or "L2".
        precision: what the search computes in: "fp32", "bf16", "fp16" or "auto". The choice among restarts is fp32's.

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
    seed: int | Tensor | None = None
    norm: str = "Linf"
    precision: str = "fp32"

    name: ClassVar[str]  # keys the noise: a change of it changes the results of every seed

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        if self.norm == "Linf" and self.radius > 1:
            raise ValueError(f"eps must be in [0, 1], got {self.eps!r}")
        if self.step_size == 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha!r}")
        require_ints(self, steps=0, restarts=1)
        _require_seed(self.seed)
        if self.restarts > 1 and not self._is_random:
            raise ValueError(f"restarts={self.restarts} without random_start would repeat one search")
        require_choice("loss", self.loss, LOSSES)
        require_choice("goal", self.goal, GOALS)
        require_choice("precision", self.precision, PRECISIONS)

    @cached_property
    def radius(self) -> float:
        """eps as a number."""
        return parse_budget("eps", self.eps)

    @cached_property
    def step_size(self) -> float:
        """alpha as a number."""
        return parse_budget("alpha", self.alpha)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        target: Tensor | None = None,
        eps: Tensor | None = None,
    ) -> Tensor:
        """Perturb x so that the model errs on y.

        Args:
            model: an `Ensemble`, or any module that maps x to logits (B, K); in eval mode. Its parameters, their
                gradients and flags, and its buffers are left as they are.
            x: (B, ...) fp32 or fp64 in [0, 1].
            y: (B,) int64 labels in [0, K).
            index: (B,) int64 sample indices that key the noise with a seed; default 0 to B-1.
            target: (B,) int64 classes in [0, K), none equal to its label: the model shall answer these.
            eps: (B,) radii, one per sample, in place of the attack's; the step size stays.

        Returns:
            (B, ...) for goal "ensemble", (M, B, ...) for "members"; same dtype, in the ball and in [0, 1], no gradient.

        Raises:
            ValueError: input outside these ranges, a model in train mode, or one with NaN logits or gradients.
            TypeError: goal "members" with a model that is no `Ensemble`.
        """
        require_inputs(x, y, index, target, eps)
        require_eval_mode(model)
        x_adv, losses = self._search(model, x, y, index, target, eps, checked=True)
        if losses is not None and bool((broken := losses.isnan()).any()):
            raise ValueError(f"model returned NaN logits on {int(broken.sum())} of {len(losses)} attacked rows")
        if bool(x_adv.isnan().any()):
            raise ValueError(f"the gradient of the model is NaN or infinite where precision is {self.precision!r}")
        return x_adv

    def perturb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        *,
        target: Tensor | None = None,
        eps: Tensor | None = None,
    ) -> Tensor:
        """The same without the checks of x, y and the model's output, which wait for the device: for training loops.

        The model may be in train mode: it is attacked in eval mode, and restored.
        """
        return self._search(model, x, y, index, target, eps, checked=False)[0]

    @property
    def _is_random(self) -> bool:
        """Whether restarts differ."""
        return self.random_start

    @property
    def _is_memoryless(self) -> bool:
        """Whether an iterate follows from the one before alone, so that a repeated one means a cycle."""
        return True

    def _direction(self, sample_dims: int) -> Direction:
        """How the gradients of a new search become directions."""
        return lambda gradient: gradient

    def _transform(self, noise: Noise, step: int) -> Callable[[Tensor], Tensor] | None:
        """What the model sees of an iterate in that step, if not the iterate itself."""
        return None

    def _objective(self, model: nn.Module, y: Tensor, target: Tensor | None, check_labels: bool) -> Objective:
        return Objective(model, y, self.goal, self.loss, check_labels, target)

    def _search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        index: Tensor | None,
        target: Tensor | None,
        eps: Tensor | None,
        checked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(x_adv, losses of the last gradient or judgement)."""
        if self.goal == "members" and not isinstance(model, Ensemble):
            raise TypeError(f"goal='members' needs an Ensemble, got {type(model).__name__}")
        with torch.inference_mode(False), torch.enable_grad():
            x, y = _ordinary(x), _ordinary(y)
            plain = self.restarts == 1 and target is None and eps is None and not checked
            labels = y.repeat(self.restarts)
            targets = None if target is None else _ordinary(target).repeat(self.restarts)
            radius = self.radius if eps is None else _ordinary(eps).to(x).repeat(self.restarts)
            with frozen(model, self.precision) as view:
                if plain and isinstance(self.seed, int) and isinstance(view, Ensemble) and can_capture(view, x):
                    return self._captured(view, x, y, index, self.seed), None
                x_adv, losses = self._walk(view, x, labels, targets, radius, index, checked)
            if self.restarts > 1:
                with frozen(model) as view:
                    objective = self._objective(view, labels, targets, checked)
                    losses, success = objective.judge(x_adv)
                runs = x_adv.view(objective.searches, self.restarts, *x.shape)
                worst = _worst(losses.view(runs.shape[:3]), success.view(runs.shape[:3]))
                x_adv = runs.gather(1, per_sample(worst, x.dim() - 1).expand(-1, -1, *x.shape)).squeeze(1)
                x_adv = x_adv if self.goal == "members" else x_adv.squeeze(0)
        return x_adv, losses

    def _walk(
        self,
        view: nn.Module,
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        radius: float | Tensor,
        index: Tensor | None,
        checked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """All restarts from start to end: (last iterates, losses of the last gradient)."""
        around = ball(self.norm, x.repeat(self.restarts, *[1] * (x.dim() - 1)), radius, x.dim() - 1)
        noise = Noise(self.seed, self.name, index, self.restarts, x)
        x_adv = around.random_point(noise.uniform) if self.random_start else around.center
        objective = self._objective(view, labels, targets, checked)
        if self.goal == "members":
            around, x_adv = around.repeat(objective.searches), x_adv.repeat(objective.searches, *[1] * x.dim())
        return self._run(objective, around, x_adv, noise, checked)

    def _captured(self, view: Ensemble, x: Tensor, y: Tensor, index: Tensor | None, seed: int) -> Tensor:
        """The search as a CUDA graph, which the view keeps."""
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device)

        def search(x: Tensor, y: Tensor, index: Tensor, seed: Tensor) -> Tensor:
            return replace(self, seed=seed)._walk(view, x, y, None, self.radius, index, False)[0]

        key = replace(self, seed=None), x.shape, x.dtype
        return view.captures.get(key, lambda: CapturedSearch(search))(x, y, index, seed)

    def _run(
        self, objective: Objective, around: Ball, x_adv: Tensor, noise: Noise, checked: bool
    ) -> tuple[Tensor, Tensor | None]:
        """All steps from x_adv: (last iterate, losses of the last gradient)."""
        if checked and self.steps > MIN_STEPS and self._is_memoryless:
            return walk_to_cycles(objective, around, self.step_size, x_adv, self.steps)
        losses: Tensor | None = None
        direction = self._direction(around.sample_dims)
        for step in range(self.steps):
            losses, gradient = objective.gradient(x_adv, self._transform(noise, step))
            x_adv = around.step(x_adv, direction(gradient), self.step_size)
        return x_adv, losses


def _require_seed(seed: object) -> None:
    is_scalar = isinstance(seed, Tensor) and seed.dim() == 0 and seed.dtype == torch.int64
    if seed is not None and not is_scalar and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int, an int64 tensor () or None, got {seed!r}")


def _worst(losses: Tensor, success: Tensor) -> Tensor:
    """The restart to keep: success before failure, then the higher loss; (S, R, B) -> (S, 1, B) indices."""
    beaten = success.any(1, keepdim=True) & ~success
    return losses.masked_fill(beaten, -torch.inf).argmax(1, keepdim=True)


def _ordinary(tensor: Tensor) -> Tensor:
    """Detached, and usable in autograd where it came out of inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
