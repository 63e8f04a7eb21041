"""Attacks on inputs in [0, 1]: `attack(model, x, y) -> x_adv`."""

from __future__ import annotations

from ceat_fast.attacks.budget import Budget, parse_budget
from ceat_fast.attacks.noise import keyed_uniform
from ceat_fast.attacks.objective import GOALS, LOSSES
from ceat_fast.attacks.pgd import PGD

__all__ = ["GOALS", "LOSSES", "PGD", "Budget", "keyed_uniform", "parse_budget"]
