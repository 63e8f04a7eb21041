"""The attack that papers on adversarial training call CW: PGD on the margin loss of Carlini and Wagner (2017).

L = min(max_{k != y} z_k - z_y, kappa), of which public code writes -max(z_y - max_k(z_k - 1e4 * [k = y]) + kappa, 0),
the same up to a constant. It is not Carlini and Wagner's search for the smallest L2 perturbation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from ceat_fast.attacks.fixed_step import FixedStepAttack
from ceat_fast.attacks.objective import Objective
from ceat_fast.checks import require_number


@dataclass(frozen=True)
class CW(FixedStepAttack):
    """PGD on the margin loss: `attack(model, x, y) -> x_adv`.

    z are log-probabilities, whose differences are those of the logits. The true class must be kept out of the maximum
    by a mask below every z_k: a mask of zero, as in some public code, is itself the maximum of log-probabilities, which
    are negative. Then no other class attracts the search, and the gradient vanishes where z_y < -kappa.

    The settings of `FixedStepAttack` but `loss`, and:

    Args:
        kappa: margin at which the loss ends to rise, at least 0.
    """

    loss: str = field(default="margin", init=False)
    kappa: float = 50.0

    name: ClassVar[str] = "CW"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("kappa", self.kappa, 0)

    def _objective(self, model: nn.Module, y: Tensor, target: Tensor | None, check_labels: bool) -> Objective:
        return Objective(model, y, self.goal, self.loss, check_labels, target, self.kappa)
