"""FAB, the fast adaptive boundary attack (Croce and Hein, "Minimally distorted adversarial examples with a fast
adaptive boundary attack", ICML 2020), and its targeted form FAB-T: a search for the nearest misclassified point.

With z the outputs, y the label and t another class, the decision boundary is taken for the hyperplane
z_t - z_y + (p - x_i) . grad(z_t - z_y) = 0. FAB takes the class whose hyperplane is nearest to x_i, FAB-T a given one.

d_i, d_0 = the moves from x_i and from x onto the hyperplane within [0, 1]                   `projection.to_hyperplane`
a        = min(|d_i| / (|d_i| + |d_0|), alpha_max)
x_{i+1}  = clamp((1 - a) (x_i + eta d_i) + a (x + eta d_0), 0, 1)
x_{i+1}  = x + beta (x_{i+1} - x) where that point is misclassified, and it is a result
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ceat_fast.attacks.ball import LEAST, per_sample
from ceat_fast.attacks.geometry import DUAL_ORDERS, NORM_ORDERS, length, random_direction
from ceat_fast.attacks.noise import name_key
from ceat_fast.attacks.outputs import answers, gradient, outputs, require_gradient
from ceat_fast.attacks.projection import to_hyperplane
from ceat_fast.attacks.search_attack import SearchAttack
from ceat_fast.attacks.targets import likely_wrong
from ceat_fast.attacks.worklist import Passes, Rows, Search, Start, fresh
from ceat_fast.checks import require_ints, require_number
from ceat_fast.ensemble import is_ensemble


@dataclass(frozen=True)
class FAB(SearchAttack):
    """The fast adaptive boundary attack: `attack(model, x, y) -> x_adv`.

    Args (those of `SearchAttack` come first):
        targeted: take the boundaries to the likeliest wrong classes at x one after the other (FAB-T), instead of the
            nearest one at each point. The latter needs the gradient of every class.
        steps: at least 1.
        restarts: searches, at least 1; for `targeted` that many for each class. The first starts at x, others at a
            random point at a distance of eps / 2.
        targets: how many classes, of which there are K - 1 at most, `targeted` takes.
        minimal: carry every search through to its end; x_adv is then the nearest misclassified point that was found, at
            any distance. Otherwise the search for a sample ends at the first one in the ball.
        alpha_max, eta, beta: as in the equations above; in [0, 1], at least 1, and in [0, 1].
    """

    targeted: bool = False
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    minimal: bool = False
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ints(self, steps=1, restarts=1, targets=1)
        require_number("alpha_max", self.alpha_max, 0, 1)
        require_number("eta", self.eta, 1)
        require_number("beta", self.beta, 0, 1)

    @property
    def name(self) -> str:
        return "fab-t" if self.targeted else "fab"

    def search(self, view: nn.Module, slack: float, classes: int) -> FABSearch:
        return FABSearch(self, view, slack, classes)


@dataclass
class FABRows(Rows):
    point: Tensor  # x_i
    target: Tensor  # (n,) class, or -1


class FABSearch(Search[FABRows]):
    def __init__(self, settings: FAB, view: nn.Module, slack: float, classes: int) -> None:
        super().__init__(view, slack)
        self.settings = settings
        self.runs = settings.restarts * (min(settings.targets, classes - 1) if settings.targeted else 1)
        self.steps = settings.steps
        self.cost = 3  # two passes forwards and one back
        self.minimal = settings.minimal
        self._classes = classes
        self._is_compiled = any(hasattr(module, "_orig_mod") for module in view.modules())
        self._purpose = (settings.seed, name_key(settings.name))

    def begin(self, start: Start) -> FABRows:
        point, restart = start.x, start.run % self.settings.restarts
        if self.settings.restarts > 1:
            direction = random_direction(start.noise_key, self._purpose, point, self.settings.norm)
            reach = torch.where(restart > 0, start.eps / 2, 0)
            point = (point + per_sample(reach, point.dim() - 1) * direction).clamp(0, 1)
        target = torch.full_like(start.y, -1)
        if self.settings.targeted:
            target = likely_wrong(start.clean, start.y, start.run // self.settings.restarts)
        return FABRows(**fresh(start), point=point, target=target)

    def advance(self, rows: FABRows, step: Tensor) -> Passes:
        offset, normal, passes = self._boundary(rows)
        point = self._toward(rows, offset, normal)
        margins, claims = self.success(answers(self.view, point), rows.y)
        self._observe(rows, point, margins, claims, step)
        back = rows.x + self.settings.beta * (point - rows.x)
        rows.point = torch.where(per_sample(margins > 0, point.dim() - 1), back, point)
        return Passes(passes[0] + 1, passes[1])

    def _boundary(self, rows: FABRows) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(z_t - z_y, its gradient, forward and backward passes that it took) at the points."""
        if not self.settings.targeted:
            return self._nearest_boundary(rows)
        _, gap, grad = gradient(self.view, rows.point, partial(_gap, target=rows.target, label=rows.y))
        return gap, grad, (1, 1)

    def _nearest_boundary(self, rows: FABRows) -> tuple[Tensor, Tensor, tuple[int, int]]:
        shortest = torch.full_like(rows.eps, torch.inf)
        nearest_gap, nearest_grad = torch.zeros_like(rows.eps), torch.zeros_like(rows.x)
        for number, (gap, grad) in enumerate(self._boundaries(rows)):
            distance = gap.abs() / length(grad, DUAL_ORDERS[self.settings.norm]).clamp(min=LEAST)
            nearer = (distance < shortest) & (rows.y != number)
            shortest = torch.where(nearer, distance, shortest)
            nearest_gap = torch.where(nearer, gap, nearest_gap)
            nearest_grad = torch.where(per_sample(nearer, grad.dim() - 1), grad, nearest_grad)
        return nearest_gap, nearest_grad, (self._classes if self._is_differentiable_once(rows) else 1, self._classes)

    def _is_differentiable_once(self, rows: FABRows) -> bool:
        """Whether a backward pass frees what a second one would need: those of compiled modules and CUDA graphs do."""
        return self._is_compiled or (is_ensemble(self.view) and self.view.execution(rows.x.device).graph)

    def _boundaries(self, rows: FABRows) -> Iterator[tuple[Tensor, Tensor]]:
        """(z_k - z_y, its gradient) for k = 0, 1, ..."""
        others = [torch.full_like(rows.y, number) for number in range(self._classes)]
        if self._is_differentiable_once(rows):
            for other in others:
                yield gradient(self.view, rows.point, partial(_gap, target=other, label=rows.y))[1:]
            return
        with torch.enable_grad():
            point = rows.point.detach().requires_grad_()
            logits = outputs(self.view, point)
            require_gradient(logits)
            gaps = [_gap(logits, other, rows.y) for other in others]
        for gap in gaps:
            # One row's answer does not depend on another's input, so a sum over rows has the rows' gradients.
            (grad,) = torch.autograd.grad(gap, point, torch.ones_like(gap), retain_graph=gap is not gaps[-1])
            yield gap.detach(), grad

    def _toward(self, rows: FABRows, offset: Tensor, normal: Tensor) -> Tensor:
        """x_{i+1}, before the way back."""
        here, start, plane = rows.point.flatten(1), rows.x.flatten(1), normal.flatten(1)
        start_offset = offset + (plane * (start - here)).sum(1)
        moves = to_hyperplane(
            torch.cat([here, start]), plane.repeat(2, 1), torch.cat([offset, start_offset]), self.settings.norm
        )
        from_here, from_start = length(moves, NORM_ORDERS[self.settings.norm]).clamp(min=1e-8).chunk(2)
        share = (from_here / (from_here + from_start)).clamp(max=self.settings.alpha_max)[:, None]
        move_here, move_start = (self.settings.eta * moves).chunk(2)
        point = (1 - share) * (here + move_here) + share * (start + move_start)
        return point.clamp(0, 1).view_as(rows.x)

    def _observe(self, rows: FABRows, point: Tensor, margins: Tensor, claims: Tensor, step: Tensor) -> None:
        distance = length(point - rows.x, NORM_ORDERS[self.settings.norm])
        if not self.minimal:
            inside = distance <= rows.eps
            rows.observe(point, margins.where(inside | margins.isnan(), -torch.inf), claims & inside)
            return
        rows.observe(point, (-distance).where(claims, -torch.inf) + 0 * margins, torch.zeros_like(claims))
        is_last = (step == self.steps - 1).to(claims.device)
        rows.claimed = is_last & (rows.score > -torch.inf)


def _gap(logits: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """z_target - z_label: (n, K), (n,), (n,) -> (n,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, label[:, None])).squeeze(1)
