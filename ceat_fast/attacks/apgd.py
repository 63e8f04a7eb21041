"""Auto-PGD (Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020): gradient ascent with momentum that finds its own step size.

x_0     = a random point on the surface of the ball, clamped to [0, 1]
z_{t+1} = P(x_t + eta * s(grad f(x_t)))                              s, P: `geometry.steepest` and `geometry.project`
x_{t+1} = P(x_t + a (z_{t+1} - x_t) + (1 - a) (x_t - x_{t-1}))       a = 3/4, but 1 in the first step

eta is 2 eps at first. At checkpoint w_j it is halved, and the search goes back to the best point so far, where

1. f rose in at most rho (w_j - w_{j-1}) of the steps since the last checkpoint, or
2. eta was not halved at the last checkpoint, and the best f has not risen since.

w_0 = 0, w_1 = 0.22 T, and each period is 0.03 T shorter than the one before it, but at least 0.06 T, in whole steps.
(Condition 1 of the paper says "less than"; "at most" is what the authors' code does. They differ where rho times the
period is a whole number.)

f is the cross-entropy or the difference of logits ratio (DLR; `objective.dlr`), untargeted, or with a target class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import per_sample
from ceat_fast.attacks.geometry import project, random_direction, steepest
from ceat_fast.attacks.noise import name_key
from ceat_fast.attacks.objective import dlr
from ceat_fast.attacks.outputs import Loss, answers, cross_entropy, gradient
from ceat_fast.attacks.search_attack import SearchAttack
from ceat_fast.attacks.targets import likely_wrong
from ceat_fast.attacks.worklist import Passes, Rows, Search, Start, fresh
from ceat_fast.checks import require_ints, require_number
from ceat_fast.choices import require_choice

NAMES = {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}
_MOMENTUM = 0.75


@dataclass(frozen=True)
class APGD(SearchAttack):
    """Auto-PGD: `attack(model, x, y) -> x_adv`.

    Args (those of `SearchAttack` come first):
        loss: "ce", the cross-entropy; "dlr", the difference of logits ratio, for at least 3 classes; "dlr-targeted",
            its targeted form, for at least 4.
        steps: T, number of gradient steps, at least 1.
        restarts: searches from different random points, at least 1; for "dlr-targeted" that many for each class.
        targets: how many classes "dlr-targeted" aims at, one after the other: the likeliest wrong ones at x, all of
            them where there are fewer.
        rho: see condition 1, in [0, 1].
        eot: gradients averaged in each step, at least 1: for models with random answers.
    """

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    rho: float = 0.75
    eot: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("loss", self.loss, NAMES)
        require_ints(self, steps=1, restarts=1, targets=1, eot=1)
        require_number("rho", self.rho, 0, 1)

    @property
    def name(self) -> str:
        return NAMES[self.loss]

    def search(self, view: nn.Module, slack: float, classes: int) -> APGDSearch:
        return APGDSearch(self, view, slack, classes)


@dataclass
class APGDRows(Rows):
    point: Tensor  # x_t
    previous: Tensor  # x_{t-1}
    target: Tensor  # (n,) class, or -1
    loss: Tensor  # (n,) f(x_{t-1})
    best_point: Tensor  # the point with the highest f so far
    best_grad: Tensor
    best_loss: Tensor  # (n,)
    eta: Tensor  # (n,)
    rises: Tensor  # (n,) int64, steps since the last checkpoint that raised f
    halved: Tensor  # (n,) bool, at the last checkpoint
    checked_loss: Tensor  # (n,) best f at the last checkpoint


class APGDSearch(Search[APGDRows]):
    def __init__(self, settings: APGD, view: nn.Module, slack: float, classes: int) -> None:
        super().__init__(view, slack)
        least = {"ce": 2, "dlr": 3, "dlr-targeted": 4}[settings.loss]
        if classes < least:
            raise ValueError(f"loss={settings.loss!r} needs at least {least} classes, the model has {classes}")
        self.settings = settings
        self._is_targeted = settings.loss == "dlr-targeted"
        self.runs = settings.restarts * (min(settings.targets, classes - 1) if self._is_targeted else 1)
        self.steps = settings.steps + 1
        self.cost = 2 * settings.eot
        # The most rises of f that still count as oscillation, at checkpoints; -1 elsewhere.
        periods = checkpoint_periods(settings.steps)
        self._allowed = torch.full((self.steps,), -1)
        for checkpoint, period in zip(accumulate(periods), periods, strict=True):
            self._allowed[checkpoint] = int(settings.rho * period)
        self._purpose = (settings.seed, name_key(settings.name))
        self._without_gradient: Tensor | int = 0

    def begin(self, start: Start) -> APGDRows:
        reach = per_sample(start.eps, start.x.dim() - 1)
        direction = random_direction(start.noise_key, self._purpose, start.x, self.settings.norm)
        point = (start.x + reach * direction).clamp(0, 1)
        target = torch.full_like(start.y, -1)
        if self._is_targeted:
            target = likely_wrong(start.clean, start.y, start.run // self.settings.restarts)
        lowest = torch.full_like(start.eps, -torch.inf)
        return APGDRows(
            **fresh(start),
            point=point,
            previous=point,
            target=target,
            loss=lowest,
            best_point=point,
            best_grad=torch.zeros_like(point),
            best_loss=lowest,
            eta=2 * start.eps,
            rises=torch.full_like(start.y, -1),  # the first evaluation counts as a rise, and is none
            halved=torch.ones_like(start.y, dtype=torch.bool),
            checked_loss=lowest,
        )

    def advance(self, rows: APGDRows, step: Tensor) -> Passes:
        if bool((step == self.steps - 1).all()):
            self._observe(rows, answers(self.view, rows.point))
            return Passes(1, 0)
        logits, loss, grad = self._gradient(rows)
        self._observe(rows, logits)
        if bool((step == 0).any()):
            self._count_zero_gradients(grad, step)
        rows.rises = rows.rises + (loss > rows.loss)
        rows.loss = loss
        self._keep_best(rows, grad)
        allowed = self._allowed[step]
        if bool((allowed >= 0).any()):
            grad = self._check(rows, grad, allowed.to(loss.device))
        self._move(rows, grad, step)
        return Passes(self.settings.eot, self.settings.eot)

    def flags(self) -> list[str]:
        count = int(self._without_gradient)
        return [f"zero gradient at the start of {count} searches: the model may mask gradients"] if count else []

    def _loss(self, rows: APGDRows) -> Loss:
        if self.settings.loss == "ce":
            return partial(cross_entropy, label=rows.y)
        return partial(dlr, label=rows.y, target=rows.target if self._is_targeted else None)

    def _gradient(self, rows: APGDRows) -> tuple[Tensor, Tensor, Tensor]:
        """(outputs and losses of the last of the `eot` evaluations, mean gradient of all)."""
        logits, loss, total = gradient(self.view, rows.point, self._loss(rows))
        for _ in range(self.settings.eot - 1):
            logits, loss, grad = gradient(self.view, rows.point, self._loss(rows))
            total = total + grad
        return logits, loss, total / self.settings.eot

    def _observe(self, rows: APGDRows, logits: Tensor) -> None:
        margins, claims = self.success(logits, rows.y)
        rows.observe(rows.point, margins, claims)

    def _count_zero_gradients(self, grad: Tensor, step: Tensor) -> None:
        is_zero = (grad == 0).flatten(1).all(1)
        self._without_gradient = self._without_gradient + (is_zero & (step == 0).to(grad.device)).sum()

    def _keep_best(self, rows: APGDRows, grad: Tensor) -> None:
        better = rows.loss > rows.best_loss
        there = per_sample(better, grad.dim() - 1)
        rows.best_point = torch.where(there, rows.point, rows.best_point)
        rows.best_grad = torch.where(there, grad, rows.best_grad)
        rows.best_loss = torch.where(better, rows.loss, rows.best_loss)

    def _check(self, rows: APGDRows, grad: Tensor, allowed: Tensor) -> Tensor:
        """Halve eta and go back to the best point where a condition holds, in rows at a checkpoint; -> the gradient."""
        here = allowed >= 0
        halve = (rows.rises <= allowed) | (~rows.halved & (rows.checked_loss >= rows.best_loss))
        rows.halved = torch.where(here, halve, rows.halved)
        rows.checked_loss = torch.where(here, rows.best_loss, rows.checked_loss)
        rows.rises = rows.rises.masked_fill(here, 0)
        halve = halve & here
        rows.eta = torch.where(halve, rows.eta / 2, rows.eta)
        there = per_sample(halve, grad.dim() - 1)
        rows.point = torch.where(there, rows.best_point, rows.point)
        return torch.where(there, rows.best_grad, grad)

    def _move(self, rows: APGDRows, grad: Tensor, step: Tensor) -> None:
        norm, dims = self.settings.norm, grad.dim() - 1
        ahead = rows.point + per_sample(rows.eta, dims) * steepest(grad, norm)
        ahead = project(ahead, rows.x, rows.eps, norm)
        share = per_sample(torch.where(step == 0, 1.0, _MOMENTUM).to(grad), dims)
        point = rows.point + share * (ahead - rows.point) + (1 - share) * (rows.point - rows.previous)
        rows.previous = rows.point
        rows.point = project(point, rows.x, rows.eps, norm)


def checkpoint_periods(steps: int) -> list[int]:
    """The lengths w_j - w_{j-1} for T = `steps`: [22, 19, 16, 13, 10, 7, 6, 6] for 100."""
    # Exact hundredths: 0.06 * 50 is 3, but 0.03 * 100 is not quite 3 in floating point.
    first, least, decrease = (max(share * steps // 100, 1) for share in (22, 6, 3))
    periods = [first]
    while (following := max(periods[-1] - decrease, least)) + sum(periods) <= steps:
        periods.append(following)
    return periods
