"""Attacks on inputs in [0, 1]: `attack(model, x, y) -> x_adv`."""

from __future__ import annotations

from ceat_fast.attacks.apgd import APGD
from ceat_fast.attacks.autoattack import AutoAttack
from ceat_fast.attacks.budget import Budget, parse_budget
from ceat_fast.attacks.cw import CW
from ceat_fast.attacks.fab import FAB
from ceat_fast.attacks.fixed_step import FixedStepAttack
from ceat_fast.attacks.mim import MDI2, MIM
from ceat_fast.attacks.noise import keyed_uniform
from ceat_fast.attacks.objective import GOALS, LOSSES
from ceat_fast.attacks.pgd import PGD
from ceat_fast.attacks.result import AttackResult
from ceat_fast.attacks.square import Square

__all__ = [
    "APGD",
    "CW",
    "FAB",
    "GOALS",
    "LOSSES",
    "MDI2",
    "MIM",
    "PGD",
    "AttackResult",
    "AutoAttack",
    "Budget",
    "FixedStepAttack",
    "Square",
    "keyed_uniform",
    "parse_budget",
]
