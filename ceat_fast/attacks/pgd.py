"""Projected gradient descent (Madry et al., 2018): eq. 2 and 3 of the paper for norm "Linf".

x_{t+1} = P(x_t + alpha * s(dL/dx_t))      s: the sign for "Linf", the unit vector for "L2"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ceat_fast.attacks.fixed_step import FixedStepAttack


@dataclass(frozen=True)
class PGD(FixedStepAttack):
    """PGD: `attack(model, x, y) -> x_adv`; the settings are those of `FixedStepAttack`.

    A deterministic search of more than 50 steps stops where its iterates run into a cycle, and returns what the full
    search would.
    """

    name: ClassVar[str] = "PGD"
